"""Stored arrays: what the metadata says of each, and a tensor's values in storage form (SPEC.md "Tensors").

Knows: extents, shapes, encodings, compressed frames. Does not know: containers, the manifest.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Final, Literal, NoReturn

import numpy as np

from flashfmt.container import Bytes, Extent
from flashfmt.encodings import Array, Encoding, F32Array, PartLayout, decode
from flashfmt.errors import FlashFormatError, UnsupportedError
from flashfmt.layout import BundleGeometry

Compression = Literal["raw", "zstd", "blosc"]

# Limits of this reader, against bombs (FF-RD-12). Weights hardly compress to half; even masks do not come near.
FREE_DECOMPRESSED_BYTES: Final = 16 << 20
MAX_EXPANSION: Final = 256

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_BLOCK_HEADER_NBYTES = 3
_ZSTD_RLE_BLOCK = 1
_ZSTD_CHECKSUM_NBYTES = 4
_BLOSC_HEADER_NBYTES = 16


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: logical `shape`, `storage_shape` of the Zarr array, where its stored bytes lie, their CRC-32C."""

    name: str
    encoding: Encoding
    shape: tuple[int, ...]
    storage_shape: tuple[int, ...]
    extent: Extent
    codec: Compression
    crc32c: int

    @property
    def nbytes(self) -> int:
        """Bytes in storage form, uncompressed."""
        return prod(self.storage_shape) * self.encoding.storage_dtype.itemsize


@dataclass(frozen=True, slots=True)
class BundlesInfo:
    """The bundles of one layer; bundle i lies at ``extent.offset + i * geometry.stride``."""

    name: str
    layer: int
    encoding: Encoding
    parts: tuple[str, ...]
    d_model: int
    part: PartLayout
    geometry: BundleGeometry
    extent: Extent
    crc32c: int


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One embedded file, such as the tokenizer; `filename` is its name in the source."""

    role: str
    filename: str
    extent: Extent
    sha256: str
    crc32c: int


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """Values of a tensor in storage form.

    `data` is read-only, C-contiguous, of the encoding's storage dtype: `shape` when plain, uint8 [rows, part_nbytes]
    for q8 and q4.
    """

    encoding: Encoding
    shape: tuple[int, ...]
    data: Array

    def decode(self) -> F32Array:
        """Weights as float32 of the logical shape; a view for f32, else a new array.

        Raises
        ------
        ValueError
            If the encoding holds integers.
        """
        return decode(self.data, self.encoding, self.shape[-1])


def stored_tensor(info: TensorInfo, payload: Bytes) -> StoredTensor:
    """Values of a tensor from its stored bytes: a view when uncompressed, else decompressed.

    Raises
    ------
    FlashFormatError
        FF-TEN-3, if a compressed payload does not hold exactly the bytes that the shape calls for. The size it
        states is compared before any memory is taken for it.
    UnsupportedError
        If a compressed payload of more than 16 MiB decompressed expands more than 256 times.
    """
    raw = payload if info.codec == "raw" else decompress(info, payload)
    data = raw.view(info.encoding.storage_dtype).reshape(info.storage_shape)
    data.flags.writeable = False
    return StoredTensor(info.encoding, info.shape, data)


def most_decompressed_nbytes(stored_nbytes: int) -> int:
    """Bytes that this reader is willing to expand a compressed payload of `stored_nbytes` to."""
    return max(FREE_DECOMPRESSED_BYTES, MAX_EXPANSION * stored_nbytes)


def decompress(info: TensorInfo, payload: Bytes) -> Bytes:
    """Decompressed bytes of a compressed tensor, a new uint8 array of ``info.nbytes``; raises as `stored_tensor`."""

    def fail(message: str, actual: object) -> NoReturn:
        raise FlashFormatError(
            message,
            path=info.extent.path,
            where=info.name,
            rule="FF-TEN-3",
            expected=f"{info.nbytes} bytes",
            actual=actual,
        )

    stated = _zstd_content_nbytes(payload) if info.codec == "zstd" else _blosc_content_nbytes(payload)
    if stated != info.nbytes:
        fail(f"the {info.codec} frame does not state the size of the array", stated)
    most = most_decompressed_nbytes(payload.nbytes)
    if info.nbytes > most:
        message = "a compressed tensor takes more memory than this reader gives for its stored bytes"
        path = info.extent.path
        raise UnsupportedError(message, path=path, where=info.name, expected=f"at most {most}", actual=info.nbytes)
    if info.codec == "zstd" and _zstd_frame_nbytes(payload) != payload.nbytes:
        fail("the payload is not exactly one zstd frame", f"{payload.nbytes} bytes stored")
    out = np.empty(info.nbytes, np.uint8)
    try:
        if info.codec == "zstd":
            from numcodecs.zstd import decompress as decompress_zstd

            decompress_zstd(payload, out)
        else:
            from numcodecs.blosc import decompress as decompress_blosc

            decompress_blosc(payload, out)
    except (RuntimeError, ValueError) as error:
        fail(f"the {info.codec} frame is damaged: {error}", "an error")
    return out


def _zstd_size_field(descriptor: int) -> tuple[int, int]:
    """Place and length of the content size in a Zstandard frame whose header has this descriptor."""
    single_segment = descriptor >> 5 & 1
    position = 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    return position, (single_segment, 2, 4, 8)[descriptor >> 6]


def _zstd_content_nbytes(frame: Bytes) -> int | None:
    """Content size in the header of a Zstandard frame (RFC 8878, 3.1.1.1), or None where there is none."""
    head = frame[:18].tobytes()
    if len(head) < 6 or head[:4] != _ZSTD_MAGIC:
        return None
    position, n_size = _zstd_size_field(head[4])
    field = head[position : position + n_size]
    if n_size == 0 or len(field) < n_size:
        return None
    return int.from_bytes(field, "little") + (256 if n_size == 2 else 0)


def _zstd_frame_nbytes(frame: Bytes) -> int:
    """Length of the Zstandard frame at the start of these bytes, by the headers of its blocks (RFC 8878, 3.1.1.2).

    The decompressor also takes what may follow: more frames, empty ones and skippable ones, whose bytes show nowhere.
    """
    memory = frame.data
    descriptor = memory[4]
    position = sum(_zstd_size_field(descriptor))
    last = False
    while not last and position + _ZSTD_BLOCK_HEADER_NBYTES <= len(memory):
        header = int.from_bytes(memory[position : position + _ZSTD_BLOCK_HEADER_NBYTES], "little")
        last = bool(header & 1)
        stored_nbytes = 1 if header >> 1 & 3 == _ZSTD_RLE_BLOCK else header >> 3
        position += _ZSTD_BLOCK_HEADER_NBYTES + stored_nbytes
    return position + (_ZSTD_CHECKSUM_NBYTES if descriptor & 4 else 0)


def _blosc_content_nbytes(frame: Bytes) -> int | None:
    """Content size in the header of a Blosc buffer, or None where the header is not one of these bytes."""
    if frame.nbytes < _BLOSC_HEADER_NBYTES:
        return None
    nbytes, blocksize, compressed_nbytes = (int(value) for value in frame[4:16].view("<u4"))
    if compressed_nbytes != frame.nbytes or not 0 < blocksize <= max(nbytes, 1):
        return None
    return nbytes
