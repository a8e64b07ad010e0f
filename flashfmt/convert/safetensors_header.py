"""The header of a safetensors file, parsed strictly: 8 bytes of length, a JSON object, then the tensors' bytes.

Knows: the header's rules. Does not know: shards, checkpoints. The `safetensors` library is not used: it maps whole
files, whose pages count against the memory of the process, and its numpy side has no bfloat16.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashfmt.convert.checkpoint import parse_json_object, read_exactly
from flashfmt.encodings import Encoding
from flashfmt.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8

_ENCODINGS = {"F32": Encoding.F32, "F16": Encoding.F16, "BF16": Encoding.BF16}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of a file, by offset from the file's start; `encoding` is None unless it is f32, f16 or bf16."""

    dtype: str
    encoding: Encoding | None
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """Tensors of a file by name, its metadata, and the raw header bytes."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, Any]
    raw: bytes


def read_header(fd: int, path: Path) -> SafetensorsHeader:
    """Parse and check the header of an open safetensors file.

    Raises
    ------
    CheckpointError
        If the file is truncated, or the header is not JSON, oversized, or describes tensors that overlap, leave gaps,
        reach past the end, or whose size contradicts their shape.
    """
    file_nbytes = os.fstat(fd).st_size
    prefix = os.pread(fd, 8, 0)
    header_nbytes = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or header_nbytes > min(MAX_HEADER_BYTES, file_nbytes - 8):
        limit = min(MAX_HEADER_BYTES, max(file_nbytes - 8, 0))
        raise CheckpointError(
            "not a safetensors file, or truncated: the header does not fit",
            path=path,
            where=0,
            expected=f"a header of at most {limit} bytes",
            actual=f"{header_nbytes} bytes",
        )
    raw = bytearray(header_nbytes)
    read_exactly(fd, memoryview(raw), 8, path)
    document = parse_json_object(bytes(raw), path)
    metadata = document.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise CheckpointError("__metadata__ is not an object", path=path, where="__metadata__")
    start = 8 + header_nbytes
    tensors = {name: _entry(name, value, start, path) for name, value in document.items()}
    _check_coverage(tensors, start, file_nbytes, path)
    return SafetensorsHeader(tensors, metadata, bytes(raw))


def _entry(name: str, value: Any, start: int, path: Path) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError("tensor entry lacks dtype, shape or data_offsets", path=path, where=name)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str):
        raise CheckpointError("dtype is not a string", path=path, where=name, actual=dtype, expected="a string")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError("bad shape", path=path, where=name, expected="up to 8 sizes", actual=shape)
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError("bad data_offsets", path=path, where=name, expected="[begin, end]", actual=offsets)
    encoding, nbytes = _ENCODINGS.get(dtype), offsets[1] - offsets[0]
    if encoding is not None and math.prod(shape) * encoding.storage_dtype.itemsize != nbytes:
        raise CheckpointError(
            "size contradicts shape and dtype",
            path=path,
            where=name,
            expected=math.prod(shape) * encoding.storage_dtype.itemsize,
            actual=nbytes,
        )
    return TensorEntry(dtype, encoding, tuple(shape), start + offsets[0], nbytes)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62 for value in values
    )


def _check_coverage(tensors: dict[str, TensorEntry], start: int, file_nbytes: int, path: Path) -> None:
    position = start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != position:
            raise CheckpointError(
                "tensors overlap or leave a gap", path=path, where=name, expected=position, actual=entry.offset
            )
        position += entry.nbytes
    if position != file_nbytes:
        raise CheckpointError(
            "truncated, or with bytes after the last tensor",
            path=path,
            expected=f"{position} bytes",
            actual=file_nbytes,
        )
