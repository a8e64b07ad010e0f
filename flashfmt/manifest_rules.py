"""What a manifest must obey beyond its types, and how one is read from the root's attributes (SPEC.md "Manifest").

Knows: the manifest. Does not know: containers, arrays, checksums.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from flashfmt.errors import FlashFormatError, UnsupportedError
from flashfmt.json_document import convert
from flashfmt.layout import MAX_NEURONS
from flashfmt.manifest import FORMAT_MAJOR, FORMAT_VERSION, KNOWN_FEATURES, Decoder, Manifest, Predictor

MANIFEST_ATTRIBUTE: Final = "flashfmt"

_VERSION: Final = re.compile(r"(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})")
_PLACE: Final = "zarr.json"
_JSON_ROOT: Final = "$.attributes.flashfmt"


class Breach(NamedTuple):
    """One broken rule: where in the manifest, what it asks for, what was found."""

    rule: str
    place: str
    message: str
    expected: object
    actual: object


def manifest_object(root: dict[str, Any], path: Path) -> dict[str, Any]:
    """The manifest, not yet checked, of a root document.

    Raises
    ------
    FlashFormatError
        FF-MAN-1, for a Zarr hierarchy that is not a flash model.
    """
    attributes = root.get("attributes")
    manifest = attributes.get(MANIFEST_ATTRIBUTE) if isinstance(attributes, dict) else None
    if not isinstance(manifest, dict):
        message = "a Zarr hierarchy, but not a flash model: the root has no manifest"
        raise FlashFormatError(message, path=path, where=_PLACE, rule="FF-MAN-1")
    return manifest


def check_version(manifest: dict[str, Any], path: Path) -> None:
    """Refuse a manifest of an unknown major version, whatever else it holds.

    Raises
    ------
    UnsupportedError
        FF-VER-1.
    FlashFormatError
        FF-VER-3, where the version is missing or no version.
    """
    version = manifest.get("version")
    match = _VERSION.fullmatch(version) if isinstance(version, str) else None
    where = f"{_PLACE} {_JSON_ROOT}.version"
    if match is None:
        raise FlashFormatError(
            "no version", path=path, where=where, rule="FF-VER-3", expected="major.minor", actual=repr(version)[:80]
        )
    if int(match[1]) != FORMAT_MAJOR:
        raise UnsupportedError(
            "this version of the format is not supported; a newer flashfmt may read it",
            path=path,
            where=where,
            rule="FF-VER-1",
            expected=f"{FORMAT_MAJOR}.x, as {FORMAT_VERSION}",
            actual=version,
        )


def read_manifest(manifest: dict[str, Any], path: Path) -> Manifest:
    """Typed manifest, checked in full.

    Raises
    ------
    UnsupportedError
        FF-VER-2, for a required feature that this reader does not know.
    FlashFormatError
        For any other rule of the manifest.
    """
    features = manifest.get("required_features", [])
    if isinstance(features, list):
        unknown = [feature for feature in features if isinstance(feature, str) and feature not in KNOWN_FEATURES]
        if unknown:
            raise UnsupportedError(
                "the model needs features that this reader does not know",
                path=path,
                where=f"{_PLACE} {_JSON_ROOT}.required_features",
                rule="FF-VER-2",
                expected=f"only {sorted(KNOWN_FEATURES)}",
                actual=[feature[:64] for feature in unknown[:8]],
            )
    typed = convert(manifest, Manifest, path=path, where=_PLACE, rule="FF-MAN-2", root=_JSON_ROOT)
    for check in _CHECKS:
        for breach in check(typed):
            raise FlashFormatError(
                breach.message,
                path=path,
                where=f"{_PLACE} {_JSON_ROOT}.{breach.place}",
                rule=breach.rule,
                expected=breach.expected,
                actual=breach.actual,
            )
    return typed


def _rotary(m: Manifest) -> Iterator[Breach]:
    d = m.decoder
    names = [table.name for table in d.rotary]
    for index, table in enumerate(d.rotary):
        place = f"decoder.rotary[{index}]"
        if table.name in names[:index]:
            yield Breach("FF-MAN-3", f"{place}.name", "a rotary table repeats a name", "unique names", table.name)
        if table.n_dims > d.attention.head_dim:
            yield Breach(
                "FF-MAN-5",
                f"{place}.n_dims",
                "a rotary table is wider than a head",
                f"at most {d.attention.head_dim}",
                table.n_dims,
            )
    for index, layer in enumerate(d.layers):
        if layer.rotary is not None and layer.rotary not in names:
            yield Breach(
                "FF-MAN-3", f"decoder.layers[{index}].rotary", "no rotary table of this name", names, layer.rotary
            )


def _attention(m: Manifest) -> Iterator[Breach]:
    a = m.decoder.attention
    if a.n_heads % a.n_kv_heads:
        yield Breach(
            "FF-MAN-4",
            "decoder.attention.n_heads",
            "heads do not share key/value heads evenly",
            f"a multiple of {a.n_kv_heads}",
            a.n_heads,
        )


def _embedding(m: Manifest) -> Iterator[Breach]:
    d = m.decoder
    needed = d.embedding.d_embed != d.d_model
    if d.embedding.projection != needed:
        yield Breach(
            "FF-MAN-6",
            "decoder.embedding.projection",
            "a projection is there exactly where d_embed differs from d_model",
            needed,
            d.embedding.projection,
        )
    p = d.positions
    if p is not None and d.context_tokens + p.offset > p.n_rows:
        yield Breach(
            "FF-MAN-8",
            "decoder.positions.n_rows",
            "too few learned positions",
            f"at least {d.context_tokens + p.offset}",
            p.n_rows,
        )


def _tokens(m: Manifest) -> Iterator[Breach]:
    ids = [("bos", m.tokens.bos)] if m.tokens.bos is not None else []
    ids += [(f"eos[{index}]", token) for index, token in enumerate(m.tokens.eos)]
    for place, token in ids:
        if token >= m.decoder.vocab_size:
            yield Breach(
                "FF-MAN-7",
                f"tokens.{place}",
                "a token id is outside the vocabulary",
                f"below {m.decoder.vocab_size}",
                token,
            )


def _combinations(m: Manifest) -> Iterator[Breach]:
    d = m.decoder
    if d.block.shared_norm and d.block.order != "parallel":
        yield Breach("FF-MAN-9", "decoder.block.shared_norm", "a shared norm needs parallel order", False, True)
    if d.ffn.gate_bias and d.ffn.kind != "gated":
        yield Breach("FF-MAN-9", "decoder.ffn.gate_bias", "a gate bias needs a gated FFN", False, True)
    if d.ffn.d_ff > MAX_NEURONS:
        yield Breach("FF-LIM-5", "decoder.ffn.d_ff", "too many neurons", f"at most {MAX_NEURONS}", d.ffn.d_ff)


def _predictors(m: Manifest) -> Iterator[Breach]:
    seen: set[int] = set()
    for index, predictor in enumerate(m.predictors):
        yield from _predictor(predictor, f"predictors[{index}]", m.decoder, seen)
        seen.add(predictor.layer)


def _predictor(p: Predictor, place: str, d: Decoder, seen: set[int]) -> Iterator[Breach]:
    if p.layer >= d.n_layers:
        yield Breach("FF-PRED-1", f"{place}.layer", "no layer of this number", f"below {d.n_layers}", p.layer)
    if p.layer in seen:
        yield Breach("FF-PRED-1", f"{place}.layer", "a second predictor of a layer", "one a layer", p.layer)
    if p.tap.layer > p.layer:
        yield Breach("FF-PRED-2", f"{place}.tap.layer", "the tap lies in a later layer", f"<= {p.layer}", p.tap.layer)
    low_rank = p.kind == "low_rank"
    if low_rank != (p.rank is not None):
        yield Breach("FF-PRED-3", f"{place}.rank", f"the rank does not fit {p.kind}", low_rank, p.rank)
    if p.bias and not low_rank:
        yield Breach("FF-PRED-3", f"{place}.bias", f"{p.kind} has no bias", False, True)
    if low_rank and not 0 <= p.threshold <= 1:
        yield Breach("FF-PRED-4", f"{place}.threshold", "not a probability", "0 to 1", p.threshold)


_CHECKS: Final[tuple[Callable[[Manifest], Iterator[Breach]], ...]] = (
    _attention,
    _embedding,
    _rotary,
    _tokens,
    _combinations,
    _predictors,
)
