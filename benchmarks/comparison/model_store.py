"""Models on disk, made when they are needed: one folder a shape, one file or folder a form.

Forms are named ``hf`` (a Hugging Face checkpoint in float16), ``gguf-f16``, ``gguf-q8_0``, ``gguf-q4_0``, and
``flash-E-R`` with bundles in encoding E and resident matrices in R. The flash files of Llama shapes are converted from
the checkpoint; those of OPT shapes are written with random weights and predictors, and need no checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Final, get_args

from comparison.checkpoint_files import write_checkpoint
from comparison.gguf_files import GgufType, write_gguf
from flashfmt.convert import EncodingChoice, convert
from flashfmt.encodings import Encoding
from reference_engine.synthetic import Shape, synthetic_nbytes, write_synthetic

_GGUF_BITS: Final = {"f16": 16.0, "q8_0": 8.5, "q4_0": 4.5}


def predictor_ranks(shape: Shape) -> tuple[int, ...]:
    """Those of LLM in a flash for OPT-6.7B, 128 and 1024 in the last four layers, in proportion to the width."""
    n_last = min(4, shape.n_layers)
    return (shape.d_model // 32,) * (shape.n_layers - n_last) + (shape.d_model // 4,) * n_last


def nominal_nbytes(shape: Shape, form: str) -> int:
    """Bytes of a form, to within a hundredth; predictors are not counted."""
    kind, _, rest = form.partition("-")
    if kind == "flash":
        encoding, residents = (Encoding(name) for name in rest.split("-"))
        return synthetic_nbytes(shape, encoding=encoding, residents=residents)
    bits = 16.0 if kind == "hf" else _GGUF_BITS[rest]
    return int(synthetic_nbytes(shape) * bits / 16)


class ModelStore:
    """Models below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, shape: Shape, form: str) -> Path:
        """Where a form lies once it is made."""
        suffix = {"flash": ".flash", "gguf": ".gguf", "hf": ""}[form.partition("-")[0]]
        return self.folder / shape.name / f"{form}{suffix}"

    def require(self, shape: Shape, form: str) -> Path:
        """Path of a form; writes it where it is not there."""
        path = self.path(shape, form)
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        kind, _, rest = form.partition("-")
        unfinished = path.with_name(f"unfinished-{path.name}")
        _remove(unfinished)
        if kind == "hf":
            write_checkpoint(unfinished, shape)
        elif kind == "gguf":
            write_gguf(unfinished, shape, _gguf_type(rest))
        else:
            self._write_flash(unfinished, shape, *rest.split("-"))
        unfinished.rename(path)
        return path

    def make_room(self, shape: Shape, form: str, *, keep: Collection[str], room: int) -> None:
        """Remove forms, `keep` of `shape` excepted, where there would not be room for `form` below `room` bytes."""
        needed = nominal_nbytes(shape, form)
        if form.startswith("flash") and not shape.plain:  # converted from a checkpoint
            needed += 0 if self.path(shape, "hf").exists() else nominal_nbytes(shape, "hf")
        used = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        if self.path(shape, form).exists() or used + needed <= room:
            return
        kept = {self.path(shape, name) for name in keep}
        for path in self.folder.glob("*/*"):
            if path not in kept:
                _remove(path)

    def clear(self) -> None:
        """Remove all models."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _write_flash(self, path: Path, shape: Shape, encoding: str, residents: str) -> None:
        if shape.plain:
            write_synthetic(
                path,
                shape,
                encoding=Encoding(encoding),
                residents=Encoding(residents),
                predictor_ranks=predictor_ranks(shape),
            )
            return
        checkpoint = self.require(shape, "hf")
        convert(checkpoint, path, encoding=_choice(encoding), residents=_choice(residents))


def files_of(path: Path) -> list[Path]:
    """The files of a model: itself, or those in a folder."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _gguf_type(text: str) -> GgufType:
    for known in get_args(GgufType):
        if text == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(f"no GGUF type {text}")


def _choice(text: str) -> EncodingChoice:
    for known in get_args(EncodingChoice):
        if text == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(f"no encoding {text}")
