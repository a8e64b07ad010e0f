"""What the metadata of a model says, summed up: its arrays, sizes by role, number of parameters; all of it as JSON.

Knows: an open model. Does not know: how it is shown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from flashfmt.encodings import Encoding
from flashfmt.reader import FlashModel

_NOT_PARAMETERS: Final = ("rotary/", "extensions/")
_ROLES_OF_KIND: Final = {"bundles": "bundles", "file": "files"}
_ROLES_OF_GROUP: Final = {"predictor": "predictors", "statistics": "statistics"}


@dataclass(frozen=True, slots=True)
class ArraySummary:
    """One array: `shape` is logical; `nbytes` are stored bytes, from `offset` of `path`."""

    name: str
    kind: str
    encoding: Encoding
    shape: tuple[int, ...]
    codec: str
    path: str
    offset: int
    nbytes: int

    @property
    def role(self) -> str:
        """What the array is for, as the sizes are summed up."""
        if self.kind != "tensor":
            return _ROLES_OF_KIND[self.kind]
        segments = self.name.split("/")
        if segments[0] == "layers" and segments[2] in _ROLES_OF_GROUP:
            return _ROLES_OF_GROUP[segments[2]]
        if segments[0] == "extensions":
            return "extensions"
        return "checksums" if segments[-1] == "bundle_crc32c" else "residents"


def summaries(model: FlashModel) -> list[ArraySummary]:
    """Every array of a model, by file and offset."""
    found = [
        ArraySummary(
            t.name, "tensor", t.encoding, t.shape, t.codec, str(t.extent.path), t.extent.offset, t.extent.nbytes
        )
        for t in model.tensors.values()
    ]
    for b in model.layers:
        shape = (b.geometry.n_neurons, len(b.parts), b.d_model)
        place = str(b.extent.path), b.extent.offset, b.extent.nbytes
        found.append(ArraySummary(b.name, "bundles", b.encoding, shape, "raw", *place))
    for f in model.files.values():
        place = str(f.extent.path), f.extent.offset, f.extent.nbytes
        found.append(ArraySummary(f"files/{f.role}", "file", Encoding.U8, (f.extent.nbytes,), "raw", *place))
    return sorted(found, key=lambda array: (array.path, array.offset))


def sizes(model: FlashModel) -> dict[str, int]:
    """Stored bytes by role; `overhead` is what documents, padding and the container take."""
    by_role: dict[str, int] = {}
    for array in summaries(model):
        by_role[array.role] = by_role.get(array.role, 0) + array.nbytes
    by_role["overhead"] = model.nbytes - sum(by_role.values())
    return by_role


def n_parameters(model: FlashModel) -> int:
    """Weights of the decoder: neither tables computed from the config, nor predictors and statistics."""
    return sum(
        math.prod(array.shape)
        for array in summaries(model)
        if array.role in ("bundles", "residents") and not array.name.startswith(_NOT_PARAMETERS)
    )


def as_json(model: FlashModel) -> dict[str, Any]:
    """All that the metadata says, as JSON types."""
    arrays = []
    for array in summaries(model):
        entry = {
            "name": array.name,
            "kind": array.kind,
            "encoding": array.encoding,
            "shape": list(array.shape),
            "codec": array.codec,
            "path": array.path,
            "offset": array.offset,
            "nbytes": array.nbytes,
        }
        arrays.append(entry | _details(model, array))
    return {
        "path": str(model.path),
        "container": model.container,
        "nbytes": model.nbytes,
        "n_parameters": n_parameters(model),
        "nbytes_by_role": sizes(model),
        "manifest": msgspec.to_builtins(model.manifest),
        "arrays": arrays,
    }


def _details(model: FlashModel, array: ArraySummary) -> dict[str, Any]:
    """What only bundles or only files have."""
    if array.kind == "file":
        file = model.files[array.name.partition("/")[2]]
        return {"filename": file.filename, "sha256": file.sha256, "crc32c": f"{file.crc32c:08x}"}
    if array.kind == "bundles":
        info = next(info for info in model.layers if info.name == array.name)
        g = info.geometry
        geometry = {"row_nbytes": g.row_nbytes, "stride": g.stride, "alignment": g.alignment}
        return {"parts": list(info.parts), **geometry, "crc32c": f"{info.crc32c:08x}"}
    return {"crc32c": f"{model.tensors[array.name].crc32c:08x}"}
