"""The header of a GGUF file, parsed with strict limits: metadata and tensor descriptions.

The header is walked here, before anything else sees the file: the `gguf` package (0.19) hangs on malformed headers.
Implements ggml's docs/gguf.md, versions 2 and 3, little-endian; arrays of arrays are refused, as no model has them.

Knows: the header's bytes. Does not know: architectures, what a metadata key means.
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np

from flashfmt.errors import CheckpointError
from flashfmt.layout import round_up

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)

MAX_PAIRS: Final = 1 << 16
MAX_TENSORS: Final = 1 << 17
MAX_KEY_BYTES: Final = 1 << 16
MAX_STRING_BYTES: Final = 16 << 20
MAX_ARRAY_LENGTH: Final = 1 << 24
MAX_HEADER_BYTES: Final = 512 << 20
MAX_DIMENSIONS: Final = 4
MAX_ALIGNMENT: Final = 1 << 20

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS: Final[Mapping[int, str]] = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    _BOOL: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor: shape with the fastest dimension last, ggml's type number, and its bytes as offsets from file start."""

    shape: tuple[int, ...]
    type_id: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata (strings, numbers, lists) and tensors of a file, and the size of the header in bytes."""

    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    nbytes: int


def read_header(file: io.BufferedReader, path: Path, block_sizes: Mapping[int, tuple[int, int]]) -> GgufHeader:
    """Parse and check the header of an open GGUF file.

    Parameters
    ----------
    block_sizes : type number -> (weights a block, bytes a block); other types are refused.

    Raises
    ------
    CheckpointError
        If the file is truncated, of another version, or its header breaks a limit or contradicts the file's size.
    """
    cursor = _Cursor(file, path)
    if cursor.take(4) != MAGIC:
        cursor.refuse("not a GGUF file", expected=MAGIC, actual="other bytes", where=0)
    version = cursor.u32()
    if version not in VERSIONS:
        hint = " (big-endian?)" if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS else ""
        cursor.refuse(f"unsupported GGUF version{hint}", expected="2 or 3", actual=version, where=4)
    n_tensors = cursor.count("tensors", MAX_TENSORS, least_bytes=24)
    n_pairs = cursor.count("metadata pairs", MAX_PAIRS, least_bytes=13)
    metadata: dict[str, Any] = {}
    for _ in range(n_pairs):
        key = cursor.string(MAX_KEY_BYTES)
        if key in metadata:
            cursor.refuse("duplicate metadata key", expected="unique keys", actual=key)
        metadata[key] = cursor.value(cursor.u32())
    tensors = _read_tensors(cursor, n_tensors, _alignment(cursor, metadata), block_sizes)
    return GgufHeader(version, metadata, tensors, cursor.position)


class _Cursor:
    """Reads forward through the header; refuses to read more bytes than the file has, or than a limit allows."""

    def __init__(self, file: io.BufferedReader, path: Path) -> None:
        self.file = file
        self.path = path
        self.file_nbytes = os.fstat(file.fileno()).st_size
        self.position = 0

    def refuse(self, reason: str, *, expected: object, actual: object, where: int | str | None = None) -> NoReturn:
        place = self.position if where is None else where
        raise CheckpointError(reason, path=self.path, where=place, expected=expected, actual=actual)

    def take(self, nbytes: int) -> bytes:
        left = min(self.file_nbytes, MAX_HEADER_BYTES) - self.position
        data = self.file.read(nbytes) if nbytes <= left else b""
        if len(data) != nbytes:
            self.refuse("the header is truncated or too large", expected=f"{nbytes} more bytes", actual=max(left, 0))
        self.position += nbytes
        return data

    def u32(self) -> int:
        value: int = struct.unpack("<I", self.take(4))[0]
        return value

    def u64(self) -> int:
        value: int = struct.unpack("<Q", self.take(8))[0]
        return value

    def count(self, what: str, limit: int, least_bytes: int) -> int:
        value = self.u64()
        limit = min(limit, (self.file_nbytes - self.position) // least_bytes)
        if value > limit:
            self.refuse(f"too many {what} for this file", expected=f"at most {limit}", actual=value)
        return value

    def string(self, limit: int) -> str:
        nbytes = self.u64()
        if nbytes > limit:
            self.refuse("string too long", expected=f"at most {limit} bytes", actual=nbytes)
        try:
            return self.take(nbytes).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError("string is not UTF-8", path=self.path, where=self.position) from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string(MAX_STRING_BYTES)
        if kind == _ARRAY:
            return self.array(self.u32())
        return self.numbers(kind, 1)[0]

    def array(self, kind: int) -> list[Any]:
        if kind == _STRING:
            length = self.count("array elements", MAX_ARRAY_LENGTH, least_bytes=8)
            return [self.string(MAX_STRING_BYTES) for _ in range(length)]
        if kind not in _SCALARS:
            self.refuse("unsupported type of array elements", expected="numbers or strings", actual=f"type {kind}")
        return self.numbers(kind, self.count("array elements", MAX_ARRAY_LENGTH, least_bytes=1))

    def numbers(self, kind: int, length: int) -> list[Any]:
        if kind not in _SCALARS:
            self.refuse("unknown type of metadata value", expected="0 to 12", actual=kind)
        dtype = np.dtype(_SCALARS[kind])
        values: list[Any] = np.frombuffer(self.take(dtype.itemsize * length), dtype).tolist()
        return [bool(value) for value in values] if kind == _BOOL else values


def _alignment(cursor: _Cursor, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        cursor.refuse("bad alignment", expected="a power of two from 8", actual=alignment, where="general.alignment")
    return alignment


def _read_tensors(
    cursor: _Cursor, n_tensors: int, alignment: int, block_sizes: Mapping[int, tuple[int, int]]
) -> dict[str, GgufTensor]:
    described = {}
    for _ in range(n_tensors):
        name = cursor.string(MAX_KEY_BYTES)
        if name in described:
            cursor.refuse("duplicate tensor", expected="unique names", actual=name)
        n_dims = cursor.u32()
        if not 1 <= n_dims <= MAX_DIMENSIONS:
            cursor.refuse("bad number of dimensions", expected=f"1 to {MAX_DIMENSIONS}", actual=n_dims, where=name)
        shape = tuple(cursor.u64() for _ in range(n_dims))[::-1]
        described[name] = (shape, cursor.u32(), cursor.u64())
    start, end = round_up(cursor.position, alignment), 0
    tensors = {}
    for name, (shape, type_id, offset) in sorted(described.items(), key=lambda item: item[1][2]):
        nbytes = _tensor_nbytes(cursor, name, shape, type_id, block_sizes)
        if offset % alignment or offset < end or start + offset + nbytes > cursor.file_nbytes:
            limit = cursor.file_nbytes - start - nbytes
            cursor.refuse(
                "tensor is misaligned, overlaps another, or reaches past the end of the file",
                expected=f"a multiple of {alignment} from {end} to {limit}",
                actual=offset,
                where=name,
            )
        end = offset + nbytes
        tensors[name] = GgufTensor(shape, type_id, start + offset, nbytes)
    return {name: tensors[name] for name in described}


def _tensor_nbytes(
    cursor: _Cursor, name: str, shape: tuple[int, ...], type_id: int, block_sizes: Mapping[int, tuple[int, int]]
) -> int:
    if type_id not in block_sizes:
        cursor.refuse("unsupported tensor type", expected="a type that can be dequantised", actual=type_id, where=name)
    block_weights, block_nbytes = block_sizes[type_id]
    if 0 in shape or shape[-1] % block_weights or math.prod(shape) > cursor.file_nbytes * 256:
        cursor.refuse(
            "bad shape", expected=f"positive sizes, rows of whole blocks of {block_weights}", actual=shape, where=name
        )
    return math.prod(shape) // block_weights * block_nbytes
