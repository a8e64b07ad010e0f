"""Kernels for one token: products of stored rows with a vector, and the two phases of the FFN.

Every array is handed over as an address, so that each kernel is compiled once for each encoding whatever the layout
and writability of the arrays; `numba_backend` checks the shapes. Rows are read four at a time; a last group of fewer
repeats its last row, so each row's sum is formed in the same way wherever it stands and whoever forms it.

The FFN is a sum over blocks of `FFN_BLOCK_NEURONS` neurons. The sum of a block begins with zero and goes over its
neurons with h != 0 in their order; the sums of blocks are added to the output in theirs. So neither cutting the work at
blocks nor how threads share it changes anything, and they share it in two ways. Each thread has as many blocks as all
can have, and reads their bundles from front to back, a few up rows and then the same neurons' down rows. Of the rest,
they share the neurons first, to find h, and then the columns of the down rows: that reads shorter streams.

An array's address is taken only by functions to which it is passed, for numba may free an array after its last use.

Knows: rows at addresses. Does not know: numpy's types, files, layers.
"""

# ruff: noqa: PLR0917 (kernels and vector code take plain scalars, in order)

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import prange, types
from numba.extending import intrinsic

from reference_engine.backends.activations import ACTIVATION_CODES
from reference_engine.backends.numba_chunks import CHUNK_ROWS
from reference_engine.backends.numba_vectors import FLOAT, I32, Builder, Value, compiled, compiled_parallel
from reference_engine.backends.numba_weights import LINE_COLUMNS, add_chunk, add_sums, clear_sums, dot4, prepared_x
from reference_engine.backends.protocol import FFN_BLOCK_NEURONS

_BLOCK = FFN_BLOCK_NEURONS
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


class _Bundles(NamedTuple):
    """What `ffn_one` is given, apart from activations and threads."""

    rows: int
    stride: int
    slots: int
    n: int
    k: int
    part: int
    gated: int
    up_bias: int
    gate_bias: int
    code: int
    threshold: float
    up_code: int
    up_threshold: float


@compiled
def _bundle(f: Any, j: int) -> Any:
    """Address of bundle j, or of the last one where there is no such."""
    return row_address(f.rows, f.stride, f.slots, min(j, f.n - 1))


@compiled
def _blocks_each(n: int, n_threads: int) -> int:
    """How many blocks each thread reads alone; what is left is shared, down rows by columns."""
    each = (n + _BLOCK * n_threads - 1) // (_BLOCK * n_threads)
    return each if each * n_threads * _BLOCK - n <= _BLOCK // 2 else n // (_BLOCK * n_threads)


@compiled
def _hidden(tag: Any, f: Any, first: int, last: int, px: int, h: Any, origin: int, scratch: Any) -> None:
    """h[j - origin] for neurons `first` to `last`; h has room for whole groups of 4, surplus ones are 0.

    Their first down rows are prefetched at the end.
    """
    gate, down = np.empty(4, np.float32), (1 + f.gated) * f.part
    tmp, part = address_of(scratch), f.part
    r0, r1, r2, r3 = _bundle(f, first), _bundle(f, first + 1), _bundle(f, first + 2), _bundle(f, first + 3)
    for j in range(first, last, 4):
        after, offset = (j + 4, 0) if j + 4 < last else (first, down)
        n0, n1 = _bundle(f, after) + offset, _bundle(f, after + 1) + offset
        n2, n3 = _bundle(f, after + 2) + offset, _bundle(f, after + 3) + offset
        up = address_of(h) + 4 * (j - origin)
        if f.gated != 0:
            u0, u1, u2, u3 = r0 + part, r1 + part, r2 + part, r3 + part
            dot4(tag, address_of(gate), px, f.k, tmp, r0, r1, r2, r3, u0, u1, u2, u3)
            dot4(tag, up, px, f.k, tmp, u0, u1, u2, u3, n0, n1, n2, n3)
        else:
            dot4(tag, up, px, f.k, tmp, r0, r1, r2, r3, n0, n1, n2, n3)
        for i in range(4):
            at = j + i - origin
            if j + i >= f.n:
                h[at] = _ZERO
                continue
            v = h[at]
            if f.up_bias != 0:
                v += floats(f.up_bias, f.n)[j + i]
            if f.gated != 0:
                g = gate[i]
                if f.gate_bias != 0:
                    g += floats(f.gate_bias, f.n)[j + i]
                h[at] = activation(f.code, f.threshold, g) * activation(f.up_code, f.up_threshold, v)
            else:
                h[at] = activation(f.code, f.threshold, v)
        r0, r1, r2, r3 = n0, n1, n2, n3


@compiled
def _gather(f: Any, first: int, last: int, h: Any, origin: int, m: int, addresses: Any, factors: Any) -> int:
    """Append down rows and factors of neurons `first` to `last` with h != 0 to the m there are; how many now."""
    for j in range(first, min(last, f.n)):
        if h[j - origin] != _ZERO:
            addresses[m] = row_address(f.rows, f.stride, f.slots, j) + (1 + f.gated) * f.part
            factors[m] = h[j - origin]
            m += 1
    return m


@compiled
def _filled(m: int, addresses: Any, factors: Any) -> int:
    """Fill m rows up to a multiple of 4; how many now."""
    while m % 4 != 0:
        addresses[m] = addresses[m - 1]
        factors[m] = _ZERO
        m += 1
    return m


@compiled
def _add_blocks(tag: Any, f: Any, begin: int, end: int, px: int, sums: int, step: int, out: int, scratch: Any) -> None:
    """Add blocks `begin` to `end` of bundles to `out`, or where `step` is not 0 leave their sums `step` bytes apart."""
    h, factors = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    addresses, ahead = np.empty(_BLOCK, np.int64), np.empty(CHUNK_ROWS, np.int64)
    for block in range(begin, end):
        origin = block * _BLOCK
        stop = min(origin + _BLOCK, f.n)
        clear_sums(tag, sums, 0, f.k)
        m, done = 0, 0
        for first in range(origin, stop, CHUNK_ROWS):
            last = min(first + CHUNK_ROWS, stop)
            _hidden(tag, f, first, last, px, h, origin, scratch)
            m = _gather(f, first, last, h, origin, m, addresses, factors)
            if last == stop:
                m = _filled(m, addresses, factors)
            for i in range(CHUNK_ROWS):
                ahead[i] = _bundle(f, last + i)
            while m - done >= CHUNK_ROWS or (last == stop and m > done):
                count = min(CHUNK_ROWS, m - done)
                rows, h_at = address_of(addresses) + 8 * done, address_of(factors) + 4 * done
                add_chunk(tag, sums, rows, address_of(ahead), h_at, count, 0, f.k, f.k, address_of(scratch))
                done += count
        if step == 0:
            add_sums(tag, sums, 0, f.k, out)
        sums += step
    h[0] = factors[0] = _ZERO
    addresses[0] = ahead[0] = 0


@compiled
def _read(
    tag: Any, f: Any, begin: int, end: int, sums: int, step: int, first: int, last: int, origin: int, h: Any, x: int,
    out: int,
) -> None:  # fmt: skip
    """A thread's part of reading bundles: `_add_blocks`, then `_hidden` of neurons `first` to `last` of the rest."""
    scratch, prepared = np.empty(10 * (f.k // 32) + 256, np.float32), np.empty(f.k + f.k // 32 + 128, np.float32)
    px = prepared_x(tag, x, f.k, address_of(prepared))
    _add_blocks(tag, f, begin, end, px, sums, step, out, scratch)
    if first < last:
        _hidden(tag, f, first, last, px, h, origin, scratch)
    scratch[0] = prepared[0] = _ZERO


@compiled
def _add_rest(tag: Any, f: Any, addresses: Any, factors: Any, ends: Any, j0: int, j1: int, sums: int, out: int) -> None:
    """Add rows and factors, block after block, the first up to ``ends[0]``, to columns j0 to j1 of `out`."""
    scratch = np.empty(10 * (f.k // 32) + 256, np.float32)
    rows, h_at, done = address_of(addresses), address_of(factors), 0
    for end in ends:
        clear_sums(tag, sums, j0, j1)
        while done < end:
            count = min(CHUNK_ROWS, end - done)
            ahead = rows + 8 * min(done + count, ends[-1] - count)
            add_chunk(tag, sums, rows + 8 * done, ahead, h_at + 4 * done, count, j0, j1, f.k, address_of(scratch))
            done += count
        add_sums(tag, sums, j0, j1, out)
    scratch[0] = _ZERO


@compiled_parallel
def ffn_one(
    tag: Any, rows: int, stride: int, slots: int, n: int, k: int, part: int, gated: int, up_bias: int, gate_bias: int,
    code: int, threshold: float, up_code: int, up_threshold: float, x: int, out: int, n_threads: int,
) -> None:  # fmt: skip
    """out += sum over n bundles of h * down, for one token; see `Backend.ffn`. Absent slots and biases are 0."""
    f = _Bundles(
        rows, stride, slots, n, k, part, gated, up_bias, gate_bias, code, threshold, up_code, up_threshold
    )  # fmt: skip
    lines = (k + LINE_COLUMNS - 1) // LINE_COLUMNS
    own = _blocks_each(n, n_threads)
    n_own = min(own * n_threads, (n + _BLOCK - 1) // _BLOCK)
    origin = min(n_own * _BLOCK, n)
    groups = (n - origin + 3) // 4
    width = 4 * LINE_COLUMNS * lines
    sums = np.empty((n_own - own + 1) * lines * LINE_COLUMNS, np.float32)
    h = np.empty(4 * groups + 4, np.float32)
    for c in prange(n_threads):
        begin, end = min(c * own, n_own), min((c + 1) * own, n_own)
        first, last = origin + c * groups // n_threads * 4, origin + (c + 1) * groups // n_threads * 4
        place, step = address_of(sums), 0
        if c > 0:
            place, step = place + (begin - own + 1) * width, width
        _read(tag, f, begin, end, place, step, first, last, origin, h, x, out)
    n_rest = (n - origin + _BLOCK - 1) // _BLOCK
    addresses, factors = np.empty(n_rest * _BLOCK + 4, np.int64), np.empty(n_rest * _BLOCK + 4, np.float32)
    ends, m = np.empty(n_rest, np.int64), 0
    for i in range(n_rest):
        m = _gather(f, origin + i * _BLOCK, origin + (i + 1) * _BLOCK, h, origin, m, addresses, factors)
        ends[i] = m = _filled(m, addresses, factors)
    for c in prange(n_threads):
        j0, j1 = c * lines // n_threads * LINE_COLUMNS, min((c + 1) * lines // n_threads * LINE_COLUMNS, k)
        for i in range(1, n_own - own + 1):
            add_sums(tag, address_of(sums) + i * width, j0, j1, out)
        _add_rest(tag, f, addresses, factors, ends, j0, j1, address_of(sums), out)
