"""The plan of a conversion: which arrays the file gets, in which encodings, from which source tensors. Pure.

Everything that can be refused without reading weights is refused here: unknown maths, missing, unexpected and
misshapen tensors, encodings that do not fit.

Knows: names, shapes, encodings. Does not know: bytes, files, families' details.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from flashfmt import __version__
from flashfmt.convert.checkpoint import Checkpoint, SourceInfo
from flashfmt.convert.config import Config
from flashfmt.convert.families import family_of
from flashfmt.convert.special_tokens import special_tokens
from flashfmt.convert.translation import FfnSources, TensorMap
from flashfmt.encodings import QUANTISED_ROW_MULTIPLE, Encoding
from flashfmt.errors import CheckpointError
from flashfmt.manifest import FORMAT_VERSION, ArrayRule, Decoder, Manifest, Provenance, required_arrays

EncodingChoice = Literal["auto", "f32", "f16", "bf16", "q8", "q4"]

_LOOKUP_TABLES = ("embedding/positions",)
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A resident array: from the source tensor `source`, or made from the config where `source` is None."""

    name: str
    encoding: Encoding
    shape: tuple[int, ...]
    source: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """All of a conversion but the bytes."""

    manifest: Manifest
    tensors: tuple[PlannedTensor, ...]
    ffn: tuple[FfnSources, ...]
    bundle_encoding: Encoding
    mapping: TensorMap

    @property
    def decoder(self) -> Decoder:
        """The decoder that the file will describe."""
        return self.manifest.decoder


def make_plan(checkpoint: Checkpoint, *, encoding: EncodingChoice, residents: EncodingChoice, name: str | None) -> Plan:
    """Plan the conversion of a checkpoint.

    Parameters
    ----------
    encoding : of the bundles; ``auto`` keeps the source's float type, and is f16 for a quantised source.
    residents : of the resident matrices, likewise; vectors are f32, lookup tables never quantised.
    name : the model's name; by default the source's.

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be converted; names the config key, the tensor or the array.
    """
    config = Config(checkpoint.config, checkpoint.path)
    family = family_of(config)
    decoder = family.describe(config)
    mapping = family.tensor_map(config, decoder, checkpoint.tensors.keys())
    manifest = Manifest(
        version=FORMAT_VERSION,
        metadata_crc32c="00000000",
        name=name or checkpoint.source.removesuffix(".gguf"),
        decoder=decoder,
        tokens=special_tokens(checkpoint, decoder.vocab_size),
        provenance=Provenance(
            writer=f"flashfmt {__version__}",
            source=checkpoint.source,
            source_format=checkpoint.source_format,
            source_sha256=checkpoint.sha256,
            architecture=config.architecture,
            licence=checkpoint.licence,
        ),
    )
    rules = {name: rule for name, rule in required_arrays(manifest).items() if not rule.integers}
    _check_names(checkpoint, mapping)
    _check_shapes(checkpoint, mapping, rules, decoder)
    bundle_encoding = _bundle_encoding(checkpoint, mapping, decoder, encoding)
    tensors = tuple(_plan_tensor(checkpoint, mapping, name, rule, residents) for name, rule in rules.items())
    return Plan(manifest, tensors, mapping.ffn, bundle_encoding, mapping)


def _check_names(checkpoint: Checkpoint, mapping: TensorMap) -> None:
    used = {*mapping.arrays.values(), *(source for ffn in mapping.ffn for source in ffn.by_part.values())}
    missing = sorted(used - checkpoint.tensors.keys())
    if missing:
        hint = "; the output matrix is not declared tied" if missing == ["lm_head.weight"] else ""
        raise CheckpointError(f"missing tensors: {_some(missing)}{hint}", path=checkpoint.path, where=missing[0])
    extra = sorted(
        name for name in checkpoint.tensors.keys() - used - mapping.copies.keys() if not mapping.ignorable(name)
    )
    if extra:
        raise CheckpointError(
            f"unexpected tensors, which the architecture does not have: {_some(extra)}",
            path=checkpoint.path,
            where=extra[0],
        )


def _check_shapes(checkpoint: Checkpoint, mapping: TensorMap, rules: Mapping[str, ArrayRule], decoder: Decoder) -> None:
    expected = {source: rules[name].shape for name, source in mapping.arrays.items()}
    rows, columns = (decoder.ffn.d_ff, decoder.d_model), (decoder.d_model, decoder.ffn.d_ff)
    for ffn in mapping.ffn:
        expected |= {source: columns if part == "down" else rows for part, source in ffn.by_part.items()}
    expected |= {copy: expected[original] for copy, original in mapping.copies.items() if copy in checkpoint.tensors}
    for source, shape in expected.items():
        if checkpoint.tensors[source].shape != shape:
            raise CheckpointError(
                "tensor has another shape than the config implies",
                path=checkpoint.path,
                where=source,
                expected=list(shape),
                actual=list(checkpoint.tensors[source].shape),
            )


def _bundle_encoding(checkpoint: Checkpoint, mapping: TensorMap, decoder: Decoder, choice: EncodingChoice) -> Encoding:
    sources = [checkpoint.tensors[source] for ffn in mapping.ffn for source in ffn.by_part.values()]
    encoding = _lossless(sources) if choice == "auto" else Encoding(choice)
    _check_row(checkpoint, "the bundles", encoding, decoder.d_model, "encoding")
    return encoding


def _plan_tensor(
    checkpoint: Checkpoint, mapping: TensorMap, name: str, rule: ArrayRule, choice: EncodingChoice
) -> PlannedTensor:
    source = mapping.arrays.get(name)
    if source is None or not rule.encodable:
        return PlannedTensor(name, Encoding.F32, rule.shape, source)
    encoding = checkpoint.tensors[source].lossless_encoding
    if choice != "auto" and not (name in _LOOKUP_TABLES and Encoding(choice).is_quantised):
        encoding = Encoding(choice)
    _check_row(checkpoint, name, encoding, rule.shape[-1], "residents")
    return PlannedTensor(name, encoding, rule.shape, source)


def _lossless(sources: Iterable[SourceInfo]) -> Encoding:
    """Smallest plain encoding that holds all sources: their common one, or f32."""
    encodings = {info.lossless_encoding for info in sources}
    return encodings.pop() if len(encodings) == 1 else Encoding.F32


def _check_row(checkpoint: Checkpoint, what: str, encoding: Encoding, n_values: int, option: str) -> None:
    if encoding.is_quantised and n_values % QUANTISED_ROW_MULTIPLE:
        raise CheckpointError(
            f"rows do not fit {encoding}; choose {option}=f16",
            path=checkpoint.path,
            where=what,
            expected=f"a multiple of {QUANTISED_ROW_MULTIPLE} values a row",
            actual=n_values,
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
