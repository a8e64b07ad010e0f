"""Blocks of source weights made ready for the file: checked, re-encoded, transposed, interleaved into bundles.

Knows: arrays and encodings. Does not know: checkpoints, files, families.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from flashfmt.convert.checkpoint import Array, SourceTensor
from flashfmt.encodings import Encoding, decode, encode, part_layout
from flashfmt.errors import CheckpointError

_EXPONENT_MASKS: Final[dict[Encoding, np.uint16 | np.uint32]] = {
    Encoding.F32: np.uint32(0x7F800000),
    Encoding.F16: np.uint16(0x7C00),
    Encoding.BF16: np.uint16(0x7F80),
}
_CHECK_ELEMENTS: Final = 1 << 17
_TILE_COLUMNS: Final = 128
_TILE_ROWS: Final = 64


def check_finite(tensor: SourceTensor, name: str, first_row: int = 0) -> None:
    """Refuse NaN and infinity, by testing exponent bits in blocks that stay in the processor's cache.

    Parameters
    ----------
    tensor : rows [n, ...] of the source tensor `name`, beginning with its row `first_row`; C-contiguous.

    Raises
    ------
    CheckpointError
        Naming the tensor and the index of the first such value.
    """
    mask = _EXPONENT_MASKS[tensor.encoding]
    bits = tensor.data.reshape(-1).view(mask.dtype)
    scratch = np.empty(min(_CHECK_ELEMENTS, bits.size), mask.dtype)
    for start in range(0, bits.size, _CHECK_ELEMENTS):
        block = bits[start : start + _CHECK_ELEMENTS]
        exponents = np.bitwise_and(block, mask, out=scratch[: block.size])
        if exponents.max() == mask:
            position = start + int((exponents == mask).argmax())
            row, *rest = np.unravel_index(position, tensor.data.shape)
            index = [int(row) + first_row, *(int(i) for i in rest)]
            raise CheckpointError("not a finite weight", where=name, expected="finite numbers", actual=f"index {index}")


def encode_rows(tensor: SourceTensor, encoding: Encoding, name: str) -> Array:
    """Rows of a source tensor in the storage form of `encoding`; the same array where nothing changes.

    Raises
    ------
    CheckpointError
        If values do not fit the encoding, naming the tensor.
    """
    if tensor.encoding is encoding:
        return tensor.data
    keep = tensor.encoding is Encoding.F16 and encoding is not Encoding.F32
    weights = tensor.data if keep else decode(tensor.data, tensor.encoding)
    try:
        return encode(weights, encoding)
    except ValueError as error:
        raise CheckpointError(
            str(error), where=name, expected=f"values that fit {encoding}", actual="larger"
        ) from error


def transpose_columns(matrix: Array, start: int, stop: int, out: Array) -> None:
    """Write columns [start, stop) of `matrix` [n_rows, n_columns] as the rows of `out` [stop - start, n_rows].

    Copies tile by tile: a plain transposed copy touches a cache line per element and is seven times slower.
    """
    n_rows = matrix.shape[0]
    for column in range(start, stop, _TILE_COLUMNS):
        last = min(column + _TILE_COLUMNS, stop)
        for row in range(0, n_rows, _TILE_ROWS):
            tile = matrix[row : row + _TILE_ROWS, column:last]
            out[column - start : last - start, row : row + _TILE_ROWS] = tile.T


def interleave(
    rows: Sequence[tuple[str, SourceTensor]], down_name: str, down: SourceTensor, start: int, encoding: Encoding
) -> Array:
    """Bundles of consecutive neurons in storage form, [n, parts, d_model] or [n, parts, part_nbytes] uint8.

    Parameters
    ----------
    rows : name and rows [n, d_model] of each part but the last, in bundle order.
    down : the whole down matrix [d_model, d_ff]; its columns from `start` become the last part.
    """
    n, d_model = rows[0][1].data.shape
    length = part_layout(encoding, d_model).storage_length
    out = np.empty((n, len(rows) + 1, length), encoding.storage_dtype)
    for i, (name, tensor) in enumerate(rows):
        out[:, i] = encode_rows(tensor, encoding, name)
    if down.encoding is encoding:
        transpose_columns(down.data, start, start + n, out[:, -1])
    else:
        columns = np.empty((n, d_model), down.data.dtype)
        transpose_columns(down.data, start, start + n, columns)
        out[:, -1] = encode_rows(SourceTensor(down.encoding, columns), encoding, down_name)
    return out
