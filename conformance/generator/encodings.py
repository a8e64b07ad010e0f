"""Reproducible numbers, and the five encodings written down a second time (SPEC.md section "Encodings").

Knows: rows of float32. Does not know: arrays of a model, files.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

STORAGE = {"f32": "<f4", "f16": "<f2", "bf16": "<u2", "q8": "u1", "q4": "u1", "u8": "u1", "u32": "<u4"}
DATA_TYPE = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "uint16",
    "q8": "uint8",
    "q4": "uint8",
    "u8": "uint8",
    "u32": "uint32",
}
QUANTISED = ("q8", "q4")


def stream(seed: str, nbytes: int) -> bytes:
    """Bytes that depend on `seed` alone, the same on every machine."""
    return hashlib.shake_256(seed.encode()).digest(nbytes)


def uniform(seed: str, shape: tuple[int, ...], scale: float = 1.0) -> F32:
    """float32 in [-scale, scale)."""
    count = int(np.prod(shape))
    words = np.frombuffer(stream(seed, 4 * count), "<u4").astype(np.float64)
    return ((words / 2.0**31 - 1.0) * scale).astype(np.float32).reshape(shape)


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple that is not below `value`."""
    return (value + multiple - 1) // multiple * multiple


def values_offset(encoding: str, n: int) -> int:
    """Where the values of a quantised row of `n` weights begin."""
    return round_up(4 if encoding == "q8" else n // 32 * 2, 64)


def row_nbytes(encoding: str, n: int) -> int:
    """Bytes of one encoded row of `n` weights."""
    if encoding in QUANTISED:
        return round_up(values_offset(encoding, n) + (n if encoding == "q8" else n // 2), 64)
    return n * np.dtype(STORAGE[encoding]).itemsize


def encode(weights: F32, encoding: str) -> npt.NDArray[Any]:
    """Storage form of rows along the last axis."""
    if encoding == "f32":
        return weights.astype("<f4")
    if encoding == "f16":
        return weights.astype("<f2")
    if encoding == "bf16":
        bits = np.ascontiguousarray(weights).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    rows = weights.reshape(-1, weights.shape[-1])
    packed = [(_q8_row if encoding == "q8" else _q4_row)(row) for row in rows]
    return np.frombuffer(b"".join(packed), np.uint8).reshape(*weights.shape[:-1], -1)


def decode(stored: npt.NDArray[Any], encoding: str, n: int) -> F32:
    """float32 weights of rows in storage form; one float32 product a weight where there are scales."""
    if encoding in ("f32", "f16"):
        return stored.astype(np.float32)
    if encoding == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    at = values_offset(encoding, n)
    rows = np.ascontiguousarray(stored.reshape(-1, stored.shape[-1]))
    out = np.empty((len(rows), n), np.float32)
    for row, target in zip(rows, out, strict=True):
        if encoding == "q8":
            target[:] = row[at : at + n].view(np.int8).astype(np.float32) * row[:4].view("<f4")[0]
        else:
            scales = row[: n // 32 * 2].view("<f2").astype(np.float32)
            for j in range(n):
                byte = int(row[at + j // 64 * 32 + j % 32])
                nibble = byte & 15 if j % 64 < 32 else byte >> 4
                target[j] = scales[j // 32] * np.float32(nibble - 8)
    return out.reshape(*stored.shape[:-1], n)


def pack_q8(scale: float, values: npt.NDArray[np.int8]) -> bytes:
    """One q8 row from its scale and values."""
    head = np.float32(scale).astype("<f4").tobytes().ljust(64, b"\0")
    return (head + values.tobytes()).ljust(row_nbytes("q8", len(values)), b"\0")


def pack_q4(scales: npt.NDArray[np.float16], nibbles: npt.NDArray[np.uint8]) -> bytes:
    """One q4 row from its scales and values 0 to 15."""
    n = len(nibbles)
    head = scales.astype("<f2").tobytes().ljust(values_offset("q4", n), b"\0")
    blocks = nibbles.reshape(n // 64, 2, 32)
    return (head + (blocks[:, 0] | blocks[:, 1] << 4).astype(np.uint8).tobytes()).ljust(row_nbytes("q4", n), b"\0")


def _q8_row(row: F32) -> bytes:
    scale = np.float32(np.abs(row).max() / np.float32(127))
    return pack_q8(float(scale), np.rint(row / scale).clip(-127, 127).astype(np.int8))


def _q4_row(row: F32) -> bytes:
    groups = row.reshape(-1, 32)
    scales = (np.abs(groups).max(axis=1) / np.float32(-7)).astype("<f2")
    nibbles = np.rint(groups / scales.astype(np.float32)[:, None]) + 8
    return pack_q4(scales, nibbles.clip(0, 15).astype(np.uint8).reshape(-1))
