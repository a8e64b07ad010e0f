"""Kernels for attention, rotary positions and norms.

Attention takes one query head at a time: scores of all visible positions, a softmax over them in float32, then the
values in order of position. Threads share the pairs of token and head; each keeps one row of scores.

Knows: arrays at addresses. Does not know: how keys and values came about.
"""

# ruff: noqa: PLR0917 (kernels and vector code take plain scalars, in order)

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types

from reference_engine.backends.numba_kernels import address_of, floats
from reference_engine.backends.numba_vectors import (
    FLOAT,
    I32,
    LANES,
    Builder,
    Value,
    broadcast,
    compiled,
    compiled_parallel,
    horizontal_sum,
    integer,
    load,
    loop,
    multiply_add,
    round_down,
    splat,
    store,
    unary,
    variable,
    vector,
    vector_code,
)
from reference_engine.backends.numba_weights import axpy4, dot4

_ZERO = np.float32(0)
# exp by Cephes' expf: e**x = 2**n * e**r with |r| <= log(2) / 2.
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_EXP_TERMS = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1,
)  # fmt: skip
_EXP_LOWEST = -87.0


@vector_code(types.float32)
def _softmax_weights(b: Builder, _tag: Any, scores: Value, n: Value) -> Value:
    """Replace n scores by exp(score - highest); returns their sum."""
    whole = round_down(b, n, LANES)
    spans = ((integer(0), whole, LANES), (whole, n, 1))
    highest = {lanes: variable(b, splat(FLOAT, -math.inf, lanes)) for *_, lanes in spans}
    for start, stop, lanes in spans:
        with loop(b, start, stop, lanes) as (i, _):
            value = load(b, b.add(scores, b.mul(i, integer(4))), FLOAT, lanes)
            best = b.load(highest[lanes])
            b.store(b.select(b.fcmp_ordered(">", value, best), value, best), highest[lanes])
    peak = _maximum(
        b, [b.extract_element(b.load(v), ir.Constant(I32, i)) for lanes, v in highest.items() for i in range(lanes)]
    )
    sums = {lanes: variable(b, splat(FLOAT, 0.0, lanes)) for *_, lanes in spans}
    for start, stop, lanes in spans:
        with loop(b, start, stop, lanes) as (i, _):
            at = b.add(scores, b.mul(i, integer(4)))
            value = _exp(b, b.fsub(load(b, at, FLOAT, lanes), broadcast(b, peak, lanes)))
            store(b, value, at)
            b.store(b.fadd(b.load(sums[lanes]), value), sums[lanes])
    return b.fadd(*(horizontal_sum(b, b.load(total)) for total in sums.values()))


def _maximum(b: Builder, values: list[Value]) -> Value:
    best = values[0]
    for value in values[1:]:
        best = b.select(b.fcmp_ordered(">", value, best), value, best)
    return best


def _exp(b: Builder, x: Value) -> Value:
    lanes = x.type.count
    lowest = splat(FLOAT, _EXP_LOWEST, lanes)
    x = b.select(b.fcmp_ordered(">", x, lowest), x, lowest)
    n = unary(b, "rint", b.fmul(x, splat(FLOAT, _LOG2_E, lanes)))
    r = multiply_add(b, n, splat(FLOAT, -_LN2_HIGH, lanes), x)
    r = multiply_add(b, n, splat(FLOAT, -_LN2_LOW, lanes), r)
    p = splat(FLOAT, _EXP_TERMS[0], lanes)
    for term in _EXP_TERMS[1:]:
        p = multiply_add(b, p, r, splat(FLOAT, term, lanes))
    p = b.fadd(multiply_add(b, b.fmul(r, r), p, r), splat(FLOAT, 1.0, lanes))
    exponent = b.add(b.fptosi(n, vector(I32, lanes)), splat(I32, 127, lanes))
    return b.fmul(p, b.bitcast(b.shl(exponent, splat(I32, 23, lanes)), vector(FLOAT, lanes)))


@compiled
def _attend_head(
    tag: Any, q: int, keys: int, values: int, row: int, first: int, last: int, width: int, scale: float, out: int,
    query: Any, scores: Any,
) -> None:  # fmt: skip
    """One query over positions `first` to `last` of one head, whose rows are `row` bytes apart."""
    source, target = floats(q, width), floats(out, width)
    for i in range(width):
        query[i] = source[i] * np.float32(scale)
        target[i] = _ZERO
    n = last - first
    qa, sa, end = address_of(query), address_of(scores), last - 1
    step = 4 * row
    for i in range(0, n, 4):
        p = first + i
        k0, k1 = keys + row * p, keys + row * min(p + 1, end)
        k2, k3 = keys + row * min(p + 2, end), keys + row * min(p + 3, end)
        dot4(tag, sa + 4 * i, qa, width, 0, k0, k1, k2, k3, k0 + step, k1 + step, k2 + step, k3 + step)
    total = _softmax_weights(tag, sa, n)
    for i in range(n, (n + 3) // 4 * 4):
        scores[i] = _ZERO
    for i in range(0, n, 4):
        p = first + i
        v0, v1 = values + row * p, values + row * min(p + 1, end)
        v2, v3 = values + row * min(p + 2, end), values + row * min(p + 3, end)
        axpy4(
            tag, out, sa + 4 * i, 0, width, v0, v1, v2, v3, v0 + step, v1 + step, v2 + step, v3 + step
        )  # fmt: skip
    for i in range(width):
        target[i] /= total


@compiled
def attend_items(
    tag: Any, q: int, keys: int, values: int, row: int, head: int, n_heads: int, n_kv_heads: int, width: int,
    n_tokens: int, n_past: int, scale: float, window: int, out: int, begin: int, end: int,
) -> None:  # fmt: skip
    """Items `begin` to `end` of all pairs (head, token), tokens running fastest."""
    scores = np.empty(n_past + n_tokens + 4, np.float32)
    query = np.empty(width, np.float32)
    for item in range(begin, end):
        h, t = item // n_tokens, item % n_tokens
        kv = h * n_kv_heads // n_heads
        last = n_past + t + 1
        first = max(0, last - window) if window > 0 else 0
        at = (t * n_heads + h) * width * 4
        _attend_head(
            tag, q + at, keys + kv * head, values + kv * head, row, first, last, width, scale, out + at, query, scores
        )  # fmt: skip


@compiled_parallel
def attend(
    tag: Any, q: int, keys: int, values: int, row: int, head: int, n_heads: int, n_kv_heads: int, width: int,
    n_tokens: int, n_past: int, scale: float, window: int, out: int, n_threads: int,
) -> None:  # fmt: skip
    """See `Backend.attend`. `row` and `head` are bytes from position to position and head to head; window 0 is none."""
    n_items = n_heads * n_tokens
    for c in prange(n_threads):
        begin, end = c * n_items // n_threads, (c + 1) * n_items // n_threads
        attend_items(
            tag, q, keys, values, row, head, n_heads, n_kv_heads, width, n_tokens, n_past, scale, window, out,
            begin, end,
        )  # fmt: skip


@compiled
def rotate(x: int, n_tokens: int, n_heads: int, width: int, cos: int, sin: int, n_pairs: int, interleaved: int) -> None:
    """See `Backend.rotate`."""
    values = floats(x, n_tokens * n_heads * width)
    cosines, sines = floats(cos, n_tokens * n_pairs), floats(sin, n_tokens * n_pairs)
    for t in range(n_tokens):
        for h in range(n_heads):
            at = (t * n_heads + h) * width
            for i in range(n_pairs):
                first = at + (2 * i if interleaved != 0 else i)
                second = first + (1 if interleaved != 0 else n_pairs)
                a, b, c, s = values[first], values[second], cosines[t * n_pairs + i], sines[t * n_pairs + i]
                values[first] = a * c - b * s
                values[second] = b * c + a * s


@compiled
def _sum_of(source: Any, first: int, width: int, shift: float, power: int) -> float:
    """Sum of (x - shift) ** power, power 1 or 2, of float32 values, in float64; four sums at once, which run faster."""
    s0, s1, s2, s3 = 0.0, 0.0, 0.0, 0.0
    whole = first + width // 4 * 4
    for i in range(first, whole, 4):
        d0, d1 = np.float64(source[i]) - shift, np.float64(source[i + 1]) - shift
        d2, d3 = np.float64(source[i + 2]) - shift, np.float64(source[i + 3]) - shift
        if power == 2:
            d0, d1, d2, d3 = d0 * d0, d1 * d1, d2 * d2, d3 * d3
        s0, s1, s2, s3 = s0 + d0, s1 + d1, s2 + d2, s3 + d3
    for i in range(whole, first + width):
        d = np.float64(source[i]) - shift
        s0 += d * d if power == 2 else d
    return (s0 + s1) + (s2 + s3)


@compiled
def norm(x: int, n_rows: int, width: int, weight: int, bias: int, eps: float, centred: int, out: int) -> None:
    """Layer norm where `centred`, else RMS norm, of n rows, in place where `out` is `x`.

    Absent weight and bias are 0. Sums in float64.
    """
    source, target = floats(x, n_rows * width), floats(out, n_rows * width)
    for r in range(n_rows):
        at = r * width
        mean = _sum_of(source, at, width, 0.0, 1) / width if centred != 0 else 0.0
        inverse = np.float32(1.0 / math.sqrt(_sum_of(source, at, width, mean, 2) / width + eps))
        shift = np.float32(mean)
        for i in range(width):
            v = (source[at + i] - shift) * inverse
            if weight != 0:
                v *= floats(weight, width)[i]
            if bias != 0:
                v += floats(bias, width)[i]
            target[at + i] = v
