"""Conversion of checkpoints into flash files: plan, then perform.

    checkpoint (Hugging Face safetensors directory, hub id, or GGUF file)
      -> families           the decoder and where each array comes from; one small file a family
      -> plan               encodings and checks; everything refusable without reading weights
      -> perform            weights read, checked, re-encoded, interleaved, written

Knows: the order of these steps. Does not know: what happens inside them.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flashfmt import __version__
from flashfmt.convert.checkpoint import Checkpoint, identity
from flashfmt.convert.gguf_source import GgufCheckpoint
from flashfmt.convert.hub import download, is_hub_id
from flashfmt.convert.perform import check_copies, payload_nbytes, write_weights
from flashfmt.convert.plan import EncodingChoice, Plan, make_plan
from flashfmt.convert.safetensors_source import SafetensorsCheckpoint
from flashfmt.encodings import Encoding
from flashfmt.errors import CheckpointError
from flashfmt.specs import BundlesSpec, FileSpec, TensorSpec
from flashfmt.writer import FlashWriter

__all__ = ["ConversionReport", "EncodingChoice", "convert", "open_checkpoint"]

GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What a conversion made: `nbytes` of the file or directory, `seconds` it took, weights and their encodings.

    `resumed` says that an earlier, interrupted conversion was continued. `files` are the roles of the embedded files.
    """

    target: Path
    nbytes: int
    seconds: float
    n_parameters: int
    architecture: str
    bundle_encoding: Encoding
    resident_encodings: tuple[Encoding, ...]
    files: tuple[str, ...]
    resumed: bool


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint directory, a GGUF file, or a hub id.

    Raises
    ------
    CheckpointError
        If there is no such checkpoint, or it is incomplete or of an unsupported kind.
    MissingExtraError
        If reading it needs a package that is not installed.
    """
    path = Path(source)
    try:
        if path.is_dir():
            return SafetensorsCheckpoint(path)
        if path.is_file():
            return _open_file(path)
    except OSError as error:
        raise CheckpointError(f"cannot be opened: {error.strerror or error}", path=path) from error
    if is_hub_id(os.fspath(source)):
        return SafetensorsCheckpoint(download(os.fspath(source)), source=os.fspath(source))
    raise CheckpointError("no such checkpoint directory or GGUF file", path=path)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    encoding: EncodingChoice = "auto",
    residents: EncodingChoice = "auto",
    container: Literal["file", "directory"] | None = None,
    name: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Convert a checkpoint into a flash file or directory.

    Memory stays below 1 GiB plus the largest tensor. An interrupted conversion leaves ``<target>.partial``; the same
    call continues it.

    Parameters
    ----------
    source : directory of a Hugging Face checkpoint (safetensors), GGUF file, or hub id ``org/name``.
    target : where the result goes.
    encoding : of the FFN bundles: f32, f16, bf16, q8, q4, or ``auto``: the source's own float type; f16 for a
        quantised GGUF.
    residents : the same for the resident matrices. Vectors are f32; position tables are never quantised.
    container : ``file`` or ``directory``; by default a file if `target` ends in ``.flash``.
    name : the model's name in the manifest; by default the source's.
    overwrite : whether an existing target is replaced.
    progress : called with the payload bytes written so far, and in all.

    Raises
    ------
    CheckpointError
        If the source cannot be converted: unknown, incomplete, misshapen, or with values that are not finite.
    MissingExtraError
        If reading the source needs a package that is not installed.
    FlashWriteError
        If the result cannot be written, or exists and `overwrite` is false.
    """
    started = time.monotonic()
    with closing(open_checkpoint(source)) as checkpoint:
        plan = make_plan(checkpoint, encoding=encoding, residents=residents, name=name)
        check_copies(checkpoint, plan)
        writer = FlashWriter(
            target,
            plan.manifest,
            tensors=[TensorSpec(tensor.name, tensor.encoding, tensor.shape) for tensor in plan.tensors],
            bundles=_bundle_specs(plan),
            files=_file_specs(checkpoint),
            container=container,
            fingerprint=_fingerprint(checkpoint, plan),
            overwrite=overwrite,
        )
        total = payload_nbytes(plan)
        done = 0

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, total)

        try:
            with writer:
                for role, file in sorted(checkpoint.files.items()):
                    writer.write_file(role, file.content)
                write_weights(checkpoint, plan, writer, advance)
        except CheckpointError:
            writer.discard()  # a source that was refused is not the one that a later run would go on with
            raise
        return ConversionReport(
            target=Path(target),
            nbytes=_nbytes(Path(target)),
            seconds=time.monotonic() - started,
            n_parameters=_n_parameters(plan),
            architecture=plan.manifest.provenance.architecture,
            bundle_encoding=plan.bundle_encoding,
            resident_encodings=tuple(sorted({tensor.encoding for tensor in plan.tensors})),
            files=tuple(checkpoint.files),
            resumed=done < total,
        )


def _open_file(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        magic = file.read(len(GGUF_MAGIC))
    if magic == GGUF_MAGIC:
        return GgufCheckpoint(path)
    hint = "; give the directory that holds it" if path.suffix == ".safetensors" else ""
    raise CheckpointError(f"neither a checkpoint directory nor a GGUF file{hint}", path=path)


def _bundle_specs(plan: Plan) -> list[BundlesSpec]:
    ffn = plan.decoder.ffn
    return [
        BundlesSpec(
            layer=layer,
            encoding=plan.bundle_encoding,
            parts=ffn.parts,
            n_neurons=ffn.d_ff,
            d_model=plan.decoder.d_model,
        )
        for layer in range(plan.decoder.n_layers)
    ]


def _file_specs(checkpoint: Checkpoint) -> list[FileSpec]:
    return [
        FileSpec(
            role=role,
            filename=file.filename,
            nbytes=len(file.content),
            sha256=hashlib.sha256(file.content).hexdigest(),
        )
        for role, file in checkpoint.files.items()
    ]


def _fingerprint(checkpoint: Checkpoint, plan: Plan) -> str:
    """What an interrupted conversion must share with this one to be continued: source, encodings, writer."""
    tensors = [[tensor.name, tensor.encoding, list(tensor.shape)] for tensor in plan.tensors]
    return identity(
        {
            "source": checkpoint.fingerprint,
            "tensors": tensors,
            "bundles": plan.bundle_encoding,
            "name": plan.manifest.name,
            "writer": __version__,
        }
    )


def _n_parameters(plan: Plan) -> int:
    ffn = plan.decoder.ffn
    bundles = len(ffn.parts) * ffn.d_ff * plan.decoder.d_model * plan.decoder.n_layers
    return bundles + sum(math.prod(tensor.shape) for tensor in plan.tensors if tensor.source is not None)


def _nbytes(target: Path) -> int:
    if target.is_dir():
        return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return target.stat().st_size
