"""Which rows of a matrix have a product above a cut, for one token in one call: what predictors ask.

Knows: matrices at addresses. Does not know: what the rows stand for.
"""

# ruff: noqa: PLR0917 (kernels take plain scalars, in order)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from reference_engine.backends.numba_arrays import base_address, float_address, optional_address
from reference_engine.backends.numba_kernels import floats, integers, matmul_one
from reference_engine.backends.numba_vectors import compiled
from reference_engine.backends.numba_weights import TAGS
from reference_engine.backends.protocol import F32Array, Matrix


@compiled
def rows_above(
    tag: Any, down: int, down_stride: int, rank: int, up: int, up_stride: int, n: int, x: int, k: int, bias: int,
    cut: float, signed: int, z: int, scores: int, ids: int, n_threads: int,
) -> int:  # fmt: skip
    """Write to `ids` the rows j of n with up[j] . z + bias[j] > cut, z = down x of length `rank`; returns how many.

    Without `signed` the size of the sum counts. x has length k; where `rank` is 0, z is x itself.
    """
    if rank > 0:
        matmul_one(tag, down, down_stride, rank, x, k, z, 0, n_threads)
        matmul_one(tag, up, up_stride, n, z, rank, scores, bias, n_threads)
    else:
        matmul_one(tag, up, up_stride, n, x, k, scores, bias, n_threads)
    found, values, limit = integers(ids, n), floats(scores, n), np.float32(cut)
    count = 0
    for j in range(n):
        found[count] = j
        value = values[j] if signed != 0 else abs(values[j])
        count += value > limit
    return count


class NumbaSelection:
    """`Selection` by one kernel, whose arguments are made ready once.

    Raises
    ------
    ValueError
        If the matrices do not go together.
    """

    def __init__(
        self, matrices: Sequence[Matrix], bias: F32Array | None, cut: float, *, signed: bool, n_threads: int
    ) -> None:
        first, last = matrices[0], matrices[-1]
        if len(matrices) == 2 and last.n_cols != first.n_rows:
            raise ValueError(f"{last.n_cols} columns do not go with {first.n_rows} rows")
        self._kept = (matrices, bias)  # alive as long as their addresses
        self._n_threads = n_threads
        self._width = first.n_cols
        self._ids = np.zeros(last.n_rows, np.int32)
        self._room = np.zeros(first.n_rows + last.n_rows, np.float32)
        down = (base_address(first.data), first.data.strides[0], first.n_rows) if len(matrices) == 2 else (0, 0, 0)
        self._before = (TAGS[last.encoding], *down, base_address(last.data), last.data.strides[0], last.n_rows)
        z = base_address(self._room)
        places = (z, z + 4 * first.n_rows, base_address(self._ids))
        self._after = (optional_address(bias, (last.n_rows,)), float(cut), int(signed), *places, n_threads)

    def __call__(self, x: F32Array) -> npt.NDArray[np.int32]:
        """See `Selection`."""
        place = float_address(x, (1, self._width))
        numba.set_num_threads(self._n_threads)
        n = rows_above(*self._before, place, self._width, *self._after)
        return self._ids[:n].copy()
