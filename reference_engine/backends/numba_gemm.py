"""Kernels for several tokens: blocked matrix products straight from stored rows, and the FFN in two phases.

A few rows are decoded to a small float32 panel, which meets all tokens by outer products of registers. Each output is
one running sum over the shared dimension in ascending order, so it depends neither on the number of tokens nor on how
rows or threads are split.

Activations are held as [features, lanes]: tokens side by side, filled up with zeros to a multiple of 16.

Knows: rows at addresses. Does not know: numpy's types, files, layers.
"""

# ruff: noqa: PLR0917 (kernels and vector code take plain scalars, in order)

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from reference_engine.backends.numba_kernels import activation, address_of, floats, row_address
from reference_engine.backends.numba_vectors import (
    FLOAT,
    HAS_WIDE_REGISTERS,
    Builder,
    Value,
    broadcast,
    compiled,
    compiled_parallel,
    integer,
    load,
    load_scalar,
    loop,
    multiply_add,
    store,
    variable,
    vector_code,
)
from reference_engine.backends.numba_weights import decode_row

TILE_ROWS = 8
TILE_LANES = 16
PANEL_COLUMNS = 256
SLAB_ROWS = 64
PANEL_NEURONS = 128
_PANEL_STRIDE = PANEL_COLUMNS + 16
_REGISTER_LANES = 16 if HAS_WIDE_REGISTERS else 8
_ZERO = np.float32(0)


def _outer_products(b: Builder, operands: tuple[Value, ...], columns: int) -> None:
    """c[i, :columns] += sum over j < n of a[i, j] * m[j, :columns] for 8 rows i."""
    a, a_row, a_step, m, m_step, c, c_row, n = operands
    width = min(columns, 2 * _REGISTER_LANES) if HAS_WIDE_REGISTERS else _REGISTER_LANES
    starts = range(0, width, _REGISTER_LANES)
    for begin in range(0, columns, width):
        places = [
            [b.add(c, b.add(b.mul(c_row, integer(i)), integer(4 * (begin + start)))) for start in starts]
            for i in range(TILE_ROWS)
        ]
        sums = [[variable(b, load(b, place, FLOAT, _REGISTER_LANES)) for place in row] for row in places]
        with loop(b, integer(0), n, 1) as (j, _):
            m_at = b.add(m, b.mul(j, m_step))
            a_at = b.add(a, b.mul(j, a_step))
            vectors = [load(b, b.add(m_at, integer(4 * (begin + s))), FLOAT, _REGISTER_LANES) for s in starts]
            for i in range(TILE_ROWS):
                factor = load_scalar(b, b.add(a_at, b.mul(a_row, integer(i))), FLOAT)
                factor = broadcast(b, factor, _REGISTER_LANES)
                for total, value in zip(sums[i], vectors, strict=True):
                    b.store(multiply_add(b, factor, value, b.load(total)), total)
        for row_places, row_sums in zip(places, sums, strict=True):
            for place, total in zip(row_places, row_sums, strict=True):
                store(b, b.load(total), place)


@vector_code()
def _outer32(
    b: Builder, _tag: Any, a: Value, a_row: Value, a_step: Value, m: Value, m_step: Value, c: Value, c_row: Value,
    n: Value,
) -> None:  # fmt: skip
    """`_outer_products` of 32 columns; steps in bytes."""
    _outer_products(b, (a, a_row, a_step, m, m_step, c, c_row, n), 32)


@vector_code()
def _outer16(
    b: Builder, _tag: Any, a: Value, a_row: Value, a_step: Value, m: Value, m_step: Value, c: Value, c_row: Value,
    n: Value,
) -> None:  # fmt: skip
    """`_outer_products` of 16 columns; steps in bytes."""
    _outer_products(b, (a, a_row, a_step, m, m_step, c, c_row, n), 16)


@compiled
def _transpose(x: int, n_tokens: int, k: int, xt: Any, j0: int, j1: int) -> None:
    """xt[j, t] = x[t, j] for features j0 to j1; zeros in the surplus lanes."""
    source = floats(x, n_tokens * k)
    for b0 in range(j0, j1, 16):
        for t in range(xt.shape[1]):
            for j in range(b0, min(b0 + 16, j1)):
                xt[j, t] = source[t * k + j] if t < n_tokens else _ZERO


@compiled
def _products(
    tag: Any,
    base: int,
    stride: int,
    slots: int,
    first: int,
    last: int,
    k: int,
    xt: Any,
    y: Any,
    y_first: int,
    panel: Any,
) -> None:
    """y[y_first + i, t] = row (first + i) . x_t for rows up to `last`; y has room for whole groups of 8."""
    lanes = xt.shape[1]
    count = (last - first + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    y[y_first : y_first + count] = _ZERO
    xa, pa = address_of(xt), address_of(panel)
    for k0 in range(0, k, PANEL_COLUMNS):
        k1 = min(k0 + PANEL_COLUMNS, k)
        for i in range(0, count, TILE_ROWS):
            for r in range(TILE_ROWS):
                row = row_address(base, stride, slots, min(first + i + r, last - 1))
                decode_row(tag, row, k, k0, k1, pa + r * _PANEL_STRIDE * 4)
            ya = address_of(y) + (y_first + i) * lanes * 4
            xb = xa + k0 * lanes * 4
            for t in range(0, lanes - 31, 32):
                _outer32(tag, pa, _PANEL_STRIDE * 4, 4, xb + t * 4, lanes * 4, ya + t * 4, lanes * 4, k1 - k0)
            if lanes % 32 != 0:
                t = lanes - 16
                _outer16(tag, pa, _PANEL_STRIDE * 4, 4, xb + t * 4, lanes * 4, ya + t * 4, lanes * 4, k1 - k0)


@compiled
def _matmul_rows(
    tag: Any, base: int, stride: int, n: int, first: int, last: int, k: int, xt: Any, n_tokens: int, out: int, bias: int
) -> None:
    """out[t, j] = row j . x_t + bias[j] for rows `first` to `last`."""
    y = np.empty((SLAB_ROWS, xt.shape[1]), np.float32)
    panel = np.empty((TILE_ROWS, _PANEL_STRIDE), np.float32)
    target = floats(out, n_tokens * n)
    for j0 in range(first, last, SLAB_ROWS):
        j1 = min(j0 + SLAB_ROWS, last)
        _products(tag, base, stride, 0, j0, j1, k, xt, y, 0, panel)
        for t in range(n_tokens):
            for j in range(j0, j1):
                target[t * n + j] = y[j - j0, t]
            if bias != 0:
                for j in range(j0, j1):
                    target[t * n + j] += floats(bias, n)[j]


@compiled_parallel
def matmul_many(
    tag: Any, base: int, stride: int, n: int, x: int, n_tokens: int, k: int, out: int, bias: int, n_threads: int
) -> None:
    """out[t, j] = row j . x_t + bias[j] for n rows of k weights; `bias` is 0 or an address."""
    xt = np.empty((k, (n_tokens + TILE_LANES - 1) // TILE_LANES * TILE_LANES), np.float32)
    for c in prange(n_threads):
        _transpose(x, n_tokens, k, xt, c * k // n_threads, (c + 1) * k // n_threads)
    tiles = (n + TILE_ROWS - 1) // TILE_ROWS
    for c in prange(n_threads):
        first, last = c * tiles // n_threads * TILE_ROWS, min((c + 1) * tiles // n_threads * TILE_ROWS, n)
        _matmul_rows(tag, base, stride, n, first, last, k, xt, n_tokens, out, bias)


@compiled
def _hidden_rows(
    tag: Any, rows: int, stride: int, slots: int, first: int, last: int, n: int, k: int, part: int, gated: int,
    up_bias: int, gate_bias: int, code: int, threshold: float, up_code: int, up_threshold: float, xt: Any, h: Any,
) -> None:  # fmt: skip
    """h[j, t] of neurons `first` (a multiple of 8) to `last`; h has room for whole groups of 8."""
    lanes = xt.shape[1]
    panel = np.empty((TILE_ROWS, _PANEL_STRIDE), np.float32)
    gate = np.empty((SLAB_ROWS, lanes), np.float32)
    for j0 in range(first, last, SLAB_ROWS):
        j1 = min(j0 + SLAB_ROWS, last)
        _products(tag, rows + gated * part, stride, slots, j0, j1, k, xt, h, j0, panel)
        if gated != 0:
            _products(tag, rows, stride, slots, j0, j1, k, xt, gate, 0, panel)
        for j in range(j0, j1):
            ub = floats(up_bias, n)[j] if up_bias != 0 else _ZERO
            gb = floats(gate_bias, n)[j] if gate_bias != 0 else _ZERO
            for t in range(lanes):
                up = h[j, t] + ub
                if gated != 0:
                    g = activation(code, threshold, gate[j - j0, t] + gb)
                    h[j, t] = g * activation(up_code, up_threshold, up)
                else:
                    h[j, t] = activation(code, threshold, up)


@compiled
def _add_tile(tag: Any, h: int, lanes: int, m: int, n: int, out: Any, t: int, j: int, j1: int, tile: Any) -> None:
    """Add n neurons to 8 tokens from t and 32 columns from j of `out`, through `tile` where it sticks out."""
    n_tokens, k = out.shape
    if t + TILE_ROWS <= n_tokens and j + 32 <= j1:
        _outer32(tag, h, 4, lanes * 4, m, _PANEL_STRIDE * 4, address_of(out) + (t * k + j) * 4, k * 4, n)
        return
    t_end, j_end = min(TILE_ROWS, n_tokens - t), min(32, j1 - j)
    for a in range(t_end):
        for c in range(j_end):
            tile[a, c] = out[t + a, j + c]
    _outer32(tag, h, 4, lanes * 4, m, _PANEL_STRIDE * 4, address_of(tile), 128, n)
    for a in range(t_end):
        for c in range(j_end):
            out[t + a, j + c] = tile[a, c]


@compiled
def _add_columns(
    tag: Any, rows: int, stride: int, slots: int, n: int, k: int, down: int, h: Any, out: Any, first: int, last: int
) -> None:
    """out[t, j] += sum over neurons i of h[i, t] * down_i[j] for columns `first` (a multiple of 64) to `last`."""
    n_tokens, lanes = out.shape[0], h.shape[1]
    panel = np.zeros((PANEL_NEURONS, _PANEL_STRIDE), np.float32)
    tile = np.zeros((TILE_ROWS, 32), np.float32)
    for j0 in range(first, last, PANEL_COLUMNS):
        j1 = min(j0 + PANEL_COLUMNS, last)
        for i0 in range(0, n, PANEL_NEURONS):
            i1 = min(i0 + PANEL_NEURONS, n)
            for i in range(i0, i1):
                row = row_address(rows, stride, slots, i) + down
                decode_row(tag, row, k, j0, j1, address_of(panel) + (i - i0) * _PANEL_STRIDE * 4)
            for t in range(0, n_tokens, TILE_ROWS):
                for j in range(j0, j1, 32):
                    ha = address_of(h) + (i0 * lanes + t) * 4
                    _add_tile(tag, ha, lanes, address_of(panel) + (j - j0) * 4, i1 - i0, out, t, j, j1, tile)
    panel[0, 0] = tile[0, 0]


@compiled_parallel
def ffn_many(
    tag: Any, rows: int, stride: int, slots: int, n: int, k: int, part: int, gated: int, up_bias: int, gate_bias: int,
    code: int, threshold: float, up_code: int, up_threshold: float, x: int, n_tokens: int, out: Any, n_threads: int,
) -> None:  # fmt: skip
    """out [n_tokens, k] += sum over n bundles of h * down; see `Backend.ffn`. Absent slots and biases are 0."""
    lanes = (n_tokens + TILE_LANES - 1) // TILE_LANES * TILE_LANES
    xt = np.empty((k, lanes), np.float32)
    for c in prange(n_threads):
        _transpose(x, n_tokens, k, xt, c * k // n_threads, (c + 1) * k // n_threads)
    tiles = (n + TILE_ROWS - 1) // TILE_ROWS
    h = np.empty((tiles * TILE_ROWS, lanes), np.float32)
    for c in prange(n_threads):
        first, last = c * tiles // n_threads * TILE_ROWS, min((c + 1) * tiles // n_threads * TILE_ROWS, n)
        _hidden_rows(
            tag, rows, stride, slots, first, last, n, k, part, gated, up_bias, gate_bias,
            code, threshold, up_code, up_threshold, xt, h,
        )  # fmt: skip
    blocks = (k + 63) // 64
    for c in prange(n_threads):
        first, last = c * blocks // n_threads * 64, min((c + 1) * blocks // n_threads * 64, k)
        _add_columns(tag, rows, stride, slots, n, k, (1 + gated) * part, h, out, first, last)
