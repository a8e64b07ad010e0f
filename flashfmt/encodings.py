"""How a row of weights becomes bytes: f32, f16, bf16, q8 and q4 (SPEC.md section "Encodings").

A *part* is one encoded row: the up row of a neuron, or one row of a resident matrix. Plain parts are the values
themselves. Quantised parts are their scales, zero padding to a multiple of 64 bytes, then the values:

====  =======================  ==========================  ===========================================
      scales                   values                      value of weight j
====  =======================  ==========================  ===========================================
q8    one float32              n int8                      ``scale * q[j]``
q4    n/32 float16, one a      n/2 bytes, blocks of 64     ``scale[j // 32] * (nibble[j] - 8)``
      group of 32 weights      weights in 32 bytes
====  =======================  ==========================  ===========================================

In a q4 block the low nibbles are weights 0..31 and the high nibbles weights 32..63, so that a vector unit
separates them with one mask and one shift. Rows of q8 and q4 have a length that is a multiple of 64.

Knows: rows of numbers. Does not know: neurons, layers, files.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from flashfmt.layout import round_up

QUANTISED_ROW_MULTIPLE: Final = 64
Q4_GROUP: Final = 32
Q4_BLOCK: Final = 64
VALUES_ALIGNMENT: Final = 64

Array = npt.NDArray[Any]
F32Array = npt.NDArray[np.float32]


class Encoding(StrEnum):
    """Logical type of stored weights, or of stored integers (`u8`, `u32`)."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8 = "q8"
    Q4 = "q4"
    U8 = "u8"
    U32 = "u32"

    @property
    def is_quantised(self) -> bool:
        """Whether rows are packed scales and values (dtype uint8) instead of plain numbers."""
        return self in (Encoding.Q8, Encoding.Q4)

    @property
    def is_weight(self) -> bool:
        """Whether the encoding stands for real numbers."""
        return self not in (Encoding.U8, Encoding.U32)

    @property
    def storage_dtype(self) -> np.dtype[Any]:
        """Little-endian dtype of the stored array; bf16 is held as uint16 bits."""
        return _STORAGE[self]


_STORAGE: Final[dict[Encoding, np.dtype[Any]]] = {
    Encoding.F32: np.dtype("<f4"),
    Encoding.F16: np.dtype("<f2"),
    Encoding.BF16: np.dtype("<u2"),
    Encoding.Q8: np.dtype("u1"),
    Encoding.Q4: np.dtype("u1"),
    Encoding.U8: np.dtype("u1"),
    Encoding.U32: np.dtype("<u4"),
}


@dataclass(frozen=True, slots=True)
class PartLayout:
    """Byte layout of one encoded row of `n_values` weights."""

    encoding: Encoding
    n_values: int
    scales_nbytes: int
    values_offset: int
    nbytes: int

    @property
    def storage_length(self) -> int:
        """Elements of the storage dtype in one row: weights when plain, bytes when quantised."""
        return self.nbytes // self.encoding.storage_dtype.itemsize


def part_layout(encoding: Encoding, n_values: int) -> PartLayout:
    """Layout of a row of `n_values` weights.

    Raises
    ------
    ValueError
        If the encoding is quantised and `n_values` is not a multiple of 64.
    """
    if not encoding.is_quantised:
        return PartLayout(encoding, n_values, 0, 0, n_values * encoding.storage_dtype.itemsize)
    if n_values % QUANTISED_ROW_MULTIPLE:
        raise ValueError(f"{encoding} rows need a multiple of {QUANTISED_ROW_MULTIPLE} weights, not {n_values}")
    if encoding is Encoding.Q8:
        scales_nbytes, values_nbytes = 4, n_values
    else:
        scales_nbytes, values_nbytes = n_values // Q4_GROUP * 2, n_values // 2
    values_offset = round_up(scales_nbytes, VALUES_ALIGNMENT)
    return PartLayout(
        encoding, n_values, scales_nbytes, values_offset, round_up(values_offset + values_nbytes, VALUES_ALIGNMENT)
    )


def encode(weights: Array, encoding: Encoding) -> Array:
    """Encode rows along the last axis.

    Parameters
    ----------
    weights : float array [..., n]; float32 or float16 (a bf16 source passes through float32 without loss).

    Returns
    -------
    Array of the storage dtype, [..., n] when plain and [..., part_nbytes] uint8 when quantised. Always a new array
    unless dtype and encoding already agree.

    Raises
    ------
    ValueError
        If values do not fit the encoding: not finite, or beyond its range.
    """
    if encoding is Encoding.F32:
        return _finite(weights).astype("<f4", copy=False)
    if encoding is Encoding.F16:
        return _to_f16(weights)
    rows = weights.astype(np.float32, copy=False)
    if encoding is Encoding.BF16:
        return _to_bf16(rows)
    if encoding is Encoding.Q8:
        return _encode_q8(rows)
    if encoding is Encoding.Q4:
        return _encode_q4(rows)
    raise ValueError(f"{encoding} does not encode weights")


def decode(stored: Array, encoding: Encoding, n_values: int | None = None) -> F32Array:
    """Decode rows along the last axis to float32.

    Parameters
    ----------
    stored : [..., n] of the storage dtype, or [..., part_nbytes] uint8 when quantised.
    n_values : weights a row; needed for quantised rows only.

    Returns
    -------
    float32 [..., n]; a view of `stored` for f32, a new array otherwise.
    """
    if encoding is Encoding.F32:
        return stored.astype(np.float32, copy=False)
    if encoding is Encoding.F16:
        return stored.astype(np.float32)
    if encoding is Encoding.BF16:
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if not encoding.is_quantised:
        raise ValueError(f"{encoding} does not encode weights")
    if n_values is None:
        raise ValueError(f"decoding {encoding} needs the number of weights a row")
    layout = part_layout(encoding, n_values)
    if stored.shape[-1] != layout.nbytes:
        raise ValueError(f"{encoding} rows of {n_values} weights take {layout.nbytes} bytes, not {stored.shape[-1]}")
    return _decode_q8(stored, layout) if encoding is Encoding.Q8 else _decode_q4(stored, layout)


def scales(stored: Array, layout: PartLayout) -> F32Array:
    """Scales of quantised rows as float32 [..., n_scales] (one for q8, n/32 for q4); a copy."""
    raw = np.ascontiguousarray(stored[..., : layout.scales_nbytes])
    dtype = "<f4" if layout.encoding is Encoding.Q8 else "<f2"
    return raw.view(dtype).astype(np.float32)


def _to_f16(weights: Array) -> Array:
    if weights.dtype == np.float16:
        return _finite(weights).astype("<f2", copy=False)
    with np.errstate(over="ignore"):
        half = weights.astype("<f2")
    if not np.isfinite(half).all():
        raise ValueError(
            f"values up to {np.abs(_finite(weights)).max():.6g} are beyond float16 (65504); use bf16 or f32"
        )
    return half


def _to_bf16(rows: F32Array) -> Array:
    bits = np.ascontiguousarray(_finite(rows)).view(np.uint32)
    rounding = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # to nearest, ties to even
    rounded = ((bits + rounding) >> np.uint32(16)).astype("<u2")
    if ((rounded & 0x7F80) == 0x7F80).any():
        raise ValueError(f"values up to {np.abs(rows).max():.6g} are beyond bfloat16; use f32")
    return rounded


def _encode_q8(rows: F32Array) -> Array:
    layout = part_layout(Encoding.Q8, rows.shape[-1])
    scale = _finite_absmax(rows) / np.float32(127)
    q = np.rint(rows / np.where(scale == 0, np.float32(1), scale)[..., None])
    out = np.zeros((*rows.shape[:-1], layout.nbytes), np.uint8)
    out[..., :4] = scale.astype("<f4")[..., None].view(np.uint8)
    values = out[..., layout.values_offset : layout.values_offset + rows.shape[-1]]
    values[...] = np.clip(q, -127, 127).astype(np.int8).view(np.uint8)
    return out


def _decode_q8(stored: Array, layout: PartLayout) -> F32Array:
    q = stored[..., layout.values_offset : layout.values_offset + layout.n_values].view(np.int8)
    with np.errstate(over="ignore", invalid="ignore"):  # scales of an unverified file may be anything
        decoded: F32Array = q.astype(np.float32) * scales(stored, layout)
    return decoded


def _encode_q4(rows: F32Array) -> Array:
    n = rows.shape[-1]
    layout = part_layout(Encoding.Q4, n)
    _finite_absmax(rows)
    groups = rows.reshape(*rows.shape[:-1], n // Q4_GROUP, Q4_GROUP)
    peak = np.take_along_axis(groups, np.abs(groups).argmax(axis=-1, keepdims=True), axis=-1)[..., 0]
    with np.errstate(over="ignore"):
        scale = (peak / np.float32(-8)).astype("<f2")  # the peak itself becomes nibble 0, exactly -8 scales
    if not np.isfinite(scale).all():
        raise ValueError("values are beyond what a float16 scale can carry (524032); use bf16 or f32")
    divisor = scale.astype(np.float32)
    q = np.rint(groups / np.where(divisor == 0, np.float32(1), divisor)[..., None]) + np.float32(8)
    nibbles = np.clip(q, 0, 15).astype(np.uint8)
    packed = nibbles[..., 0::2, :] | (nibbles[..., 1::2, :] << np.uint8(4))
    out = np.zeros((*rows.shape[:-1], layout.nbytes), np.uint8)
    out[..., : layout.scales_nbytes] = scale.view(np.uint8)
    out[..., layout.values_offset : layout.values_offset + n // 2] = packed.reshape(*rows.shape[:-1], n // 2)
    return out


def _decode_q4(stored: Array, layout: PartLayout) -> F32Array:
    n = layout.n_values
    packed = stored[..., layout.values_offset : layout.values_offset + n // 2]
    packed = packed.reshape(*stored.shape[:-1], n // Q4_BLOCK, Q4_GROUP)
    nibbles = np.stack((packed & np.uint8(15), packed >> np.uint8(4)), axis=-2)  # [..., n/64, 2, 32]
    centred = nibbles.reshape(*stored.shape[:-1], n // Q4_GROUP, Q4_GROUP).astype(np.float32) - np.float32(8)
    with np.errstate(invalid="ignore"):  # likewise: nibble 8 times an infinite scale
        decoded: F32Array = (centred * scales(stored, layout)[..., None]).reshape(*stored.shape[:-1], n)
    return decoded


def _finite(weights: Array) -> Array:
    if not np.isfinite(weights).all():
        raise ValueError("values are not finite")
    return weights


def _finite_absmax(rows: F32Array) -> F32Array:
    peak: F32Array = np.abs(rows).max(axis=-1, initial=np.float32(0))
    if not np.isfinite(peak).all():
        raise ValueError("values are not finite")
    return peak
