"""Kernels for one token: products of stored rows with a vector, and the two phases of the FFN.

Every array is handed over as an address, so that each kernel is compiled once for each encoding whatever the layout
and writability of the arrays; `numba_backend` checks the shapes. Rows are read four at a time; a last group of fewer
repeats its last row, so each row's sum is formed in the same way wherever it stands and whoever forms it.

The FFN first finds h for every neuron, threads sharing the neurons; then adds h * down to the output in the order of
the neurons, threads sharing the columns. Neurons with h = 0 are left out; what is left is grouped within blocks of
`FFN_BLOCK_NEURONS`, so that cutting the work at such blocks changes nothing.

An array's address is taken only by functions to which it is passed, for numba may free an array after its last use.

Knows: rows at addresses. Does not know: numpy's types, files, layers.
"""

# ruff: noqa: PLR0917 (kernels and vector code take plain scalars, in order)

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba import prange, types
from numba.extending import intrinsic

from reference_engine.backends.activations import ACTIVATION_CODES
from reference_engine.backends.numba_chunks import CHUNK_ROWS
from reference_engine.backends.numba_vectors import FLOAT, I32, Builder, Value, compiled, compiled_parallel
from reference_engine.backends.numba_weights import add_chunk, begin_sum, dot4, end_sum, prepared_x
from reference_engine.backends.protocol import FFN_BLOCK_NEURONS

_BLOCK = FFN_BLOCK_NEURONS
_LINE_COLUMNS = 128
_types: Any = types  # numba annotates little of it
_FLOATS, _INTEGERS = _types.CPointer(types.float32), _types.CPointer(types.int32)
_ONE, _HALF, _ZERO = np.float32(1), np.float32(0.5), np.float32(0)
_SQRT_HALF, _SQRT_2_OVER_PI = np.float32(math.sqrt(0.5)), np.float32(math.sqrt(2 / math.pi))
_TANH_CUBIC, _QUICK_GELU = np.float32(0.044715), np.float32(1.702)
_RELU, _RELU2, _FATRELU = ACTIVATION_CODES["relu"], ACTIVATION_CODES["relu2"], ACTIVATION_CODES["fatrelu"]
_SILU, _GELU = ACTIVATION_CODES["silu"], ACTIVATION_CODES["gelu"]
_GELU_TANH, _QUICK = ACTIVATION_CODES["gelu_tanh"], ACTIVATION_CODES["quick_gelu"]


def _float_pointer(_typing_context: Any, _address: Any) -> Any:
    def generate(_context: Any, builder: Builder, _signature: Any, values: Any) -> Value:
        return builder.inttoptr(values[0], FLOAT.as_pointer())

    return _FLOATS(types.int64), generate


def _integer_pointer(_typing_context: Any, _address: Any) -> Any:
    def generate(_context: Any, builder: Builder, _signature: Any, values: Any) -> Value:
        return builder.inttoptr(values[0], I32.as_pointer())

    return _INTEGERS(types.int64), generate


_carray: Any = vars(numba)["carray"]
_as_floats: Any = intrinsic(_float_pointer)
_as_integers: Any = intrinsic(_integer_pointer)


@compiled
def floats(address: int, n: int) -> Any:
    """The float32 array [n] at an address."""
    return _carray(_as_floats(address), n)


@compiled
def integers(address: int, n: int) -> Any:
    """The int32 array [n] at an address."""
    return _carray(_as_integers(address), n)


@compiled
def address_of(array: Any) -> int:
    """Address of an array that the caller holds until it is done with it."""
    return array.ctypes.data  # type: ignore[no-any-return]


@compiled
def row_address(base: int, stride: int, slots: int, j: int) -> Any:
    """Address of row j, or of row slots[j] where `slots` is not 0."""
    if slots == 0:
        return base + stride * j
    return base + stride * np.int64(integers(slots, j + 1)[j])


@compiled
def activation(code: int, threshold: float, v: Any) -> Any:
    """One activation of `activations.activate`, of one float32."""
    if code == _RELU:
        return max(v, _ZERO)
    if code == _RELU2:
        v = max(v, _ZERO)
        return v * v
    if code == _FATRELU:
        return v if v > np.float32(threshold) else _ZERO
    if code == _SILU:
        return v / (_ONE + math.exp(-v))
    if code == _GELU:
        return _HALF * v * (_ONE + math.erf(v * _SQRT_HALF))
    if code == _GELU_TANH:
        return _HALF * v * (_ONE + math.tanh(_SQRT_2_OVER_PI * (v + _TANH_CUBIC * v * v * v)))
    if code == _QUICK:
        return v / (_ONE + math.exp(-_QUICK_GELU * v))
    return v


@compiled
def dots(tag: Any, base: int, stride: int, n: int, first: int, last: int, px: int, k: int, out: int, bias: int) -> None:
    """out[j] = row j . x + bias[j] for rows `first` (a multiple of 4) to `last`; `px` is what `prepared_x` returned."""
    scratch, partial = np.empty(k // 8 + 16, np.float32), np.empty(4, np.float32)
    y = floats(out, n)
    step = 4 * stride
    for j in range(first, last, 4):
        at = out + 4 * j if j + 4 <= n else address_of(partial)
        r0, r1 = base + stride * j, base + stride * min(j + 1, n - 1)
        r2, r3 = base + stride * min(j + 2, n - 1), base + stride * min(j + 3, n - 1)
        dot4(tag, at, px, k, address_of(scratch), r0, r1, r2, r3, r0 + step, r1 + step, r2 + step, r3 + step)
        for i in range(j, min(j + 4, n)):
            if j + 4 > n:
                y[i] = partial[i - j]
            if bias != 0:
                y[i] += floats(bias, n)[i]
    scratch[0] = _ZERO


@compiled
def _prepared_dots(
    tag: Any, base: int, stride: int, n: int, first: int, last: int, x: int, k: int, out: int, bias: int
) -> None:
    prepared = np.empty(k + k // 32 + 128, np.float32)
    px = prepared_x(tag, x, k, address_of(prepared))
    dots(tag, base, stride, n, first, last, px, k, out, bias)
    prepared[0] = _ZERO


@compiled_parallel
def matmul_one(tag: Any, base: int, stride: int, n: int, x: int, k: int, out: int, bias: int, n_threads: int) -> None:
    """out[j] = row j . x + bias[j] for n rows of k weights; `bias` is 0 or an address."""
    groups = (n + 3) // 4
    for c in prange(n_threads):
        first, last = c * groups // n_threads * 4, min((c + 1) * groups // n_threads * 4, n)
        _prepared_dots(tag, base, stride, n, first, last, x, k, out, bias)


@compiled
def _hidden(
    tag: Any, rows: int, stride: int, slots: int, n: int, first: int, last: int, k: int, part: int, gated: int,
    up_bias: int, gate_bias: int, code: int, threshold: float, up_code: int, up_threshold: float, x: int, h: Any,
) -> None:  # fmt: skip
    """h[j] for neurons `first` (a multiple of 4) to `last`; h has room for whole groups of 4, surplus ones are 0."""
    scratch, gate = np.empty(k // 8 + 16, np.float32), np.empty(4, np.float32)
    prepared = np.empty(k + k // 32 + 128, np.float32)
    px, tmp = prepared_x(tag, x, k, address_of(prepared)), address_of(scratch)
    r0, r1, r2, r3 = rows, rows, rows, rows
    for j in range(first, last, 4):
        if j == first:
            r0, r1 = row_address(rows, stride, slots, j), row_address(rows, stride, slots, min(j + 1, n - 1))
            r2 = row_address(rows, stride, slots, min(j + 2, n - 1))
            r3 = row_address(rows, stride, slots, min(j + 3, n - 1))
        n0 = row_address(rows, stride, slots, min(j + 4, n - 1))
        n1 = row_address(rows, stride, slots, min(j + 5, n - 1))
        n2 = row_address(rows, stride, slots, min(j + 6, n - 1))
        n3 = row_address(rows, stride, slots, min(j + 7, n - 1))
        if gated != 0:
            u0, u1, u2, u3 = r0 + part, r1 + part, r2 + part, r3 + part
            dot4(tag, address_of(gate), px, k, tmp, r0, r1, r2, r3, u0, u1, u2, u3)
            dot4(tag, address_of(h) + 4 * j, px, k, tmp, u0, u1, u2, u3, n0, n1, n2, n3)
        else:
            dot4(tag, address_of(h) + 4 * j, px, k, tmp, r0, r1, r2, r3, n0, n1, n2, n3)
        for i in range(4):
            if j + i >= n:
                h[j + i] = _ZERO
                continue
            up = h[j + i]
            if up_bias != 0:
                up += floats(up_bias, n)[j + i]
            if gated != 0:
                g = gate[i]
                if gate_bias != 0:
                    g += floats(gate_bias, n)[j + i]
                h[j + i] = activation(code, threshold, g) * activation(up_code, up_threshold, up)
            else:
                h[j + i] = activation(code, threshold, up)
        r0, r1, r2, r3 = n0, n1, n2, n3
    scratch[0] = prepared[0] = _ZERO


@compiled
def _compact(
    rows: int, stride: int, slots: int, n: int, down: int, h: Any, addresses: Any, factors: Any, ends: Any
) -> int:
    """Chunks of the down parts with h != 0: where each ends in `addresses` and `factors`; how many chunks.

    Chunks do not cross a block, and are filled up to a multiple of 4 rows.
    """
    m, n_chunks, chunk = 0, 0, 0
    for block in range(0, n, _BLOCK):
        for j in range(block, min(block + _BLOCK, n)):
            if h[j] != _ZERO:
                addresses[m] = row_address(rows, stride, slots, j) + down
                factors[m] = h[j]
                m += 1
                if m - chunk == CHUNK_ROWS:
                    ends[n_chunks] = chunk = m
                    n_chunks += 1
        if m > chunk:
            while m % 4 != 0:
                addresses[m] = addresses[m - 1]
                factors[m] = _ZERO
                m += 1
            ends[n_chunks] = chunk = m
            n_chunks += 1
    return n_chunks


@compiled
def _add_rows(
    tag: Any, addresses: Any, factors: Any, ends: Any, n_chunks: int, j0: int, j1: int, k: int, out: int, permuted: Any
) -> None:
    """Add the rows of all chunks times their factors to columns j0 to j1 of `out`."""
    scratch = np.empty(10 * (k // 32) + 64, np.float32)
    y = begin_sum(tag, out, j0, j1, address_of(permuted))
    first = 0
    for c in range(n_chunks):
        end = ends[c]
        n = end - first
        ahead = min(end, ends[n_chunks - 1] - n)
        rows, h = address_of(addresses), address_of(factors)
        add_chunk(tag, y, rows + 8 * first, rows + 8 * ahead, h + 4 * first, n, j0, j1, k, address_of(scratch))
        first = end
    end_sum(tag, y, j0, j1, out)
    scratch[0] = _ZERO


@compiled_parallel
def ffn_one(
    tag: Any, rows: int, stride: int, slots: int, n: int, k: int, part: int, gated: int, up_bias: int, gate_bias: int,
    code: int, threshold: float, up_code: int, up_threshold: float, x: int, out: int, n_threads: int,
) -> None:  # fmt: skip
    """out += sum over n bundles of h * down, for one token; see `Backend.ffn`. Absent slots and biases are 0."""
    groups = (n + 3) // 4
    h = np.empty(4 * groups, np.float32)
    for c in prange(n_threads):
        first, last = c * groups // n_threads * 4, (c + 1) * groups // n_threads * 4
        _hidden(
            tag, rows, stride, slots, n, first, last, k, part, gated, up_bias, gate_bias,
            code, threshold, up_code, up_threshold, x, h,
        )  # fmt: skip
    room = n + 4 * (n // _BLOCK + 1)
    addresses, factors = np.empty(room, np.int64), np.empty(room, np.float32)
    ends = np.empty(n // CHUNK_ROWS + n // _BLOCK + 2, np.int64)
    n_chunks = _compact(rows, stride, slots, n, (1 + gated) * part, h, addresses, factors, ends)
    permuted = np.empty(k, np.float32)
    lines = (k + _LINE_COLUMNS - 1) // _LINE_COLUMNS
    if n_chunks > 0:
        for c in prange(n_threads):
            j0, j1 = c * lines // n_threads * _LINE_COLUMNS, min((c + 1) * lines // n_threads * _LINE_COLUMNS, k)
            _add_rows(tag, addresses, factors, ends, n_chunks, j0, j1, k, out, permuted)
