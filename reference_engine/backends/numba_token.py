"""The attention of one token in one call: projections, norms of heads, rotation, keys and values, output.

A call from Python costs as much as reading a small matrix; this one takes the place of eight. The arithmetic is that of
the kernels it consists of, in the same order: the result has the same bits.

Knows: weights and keys at addresses, `PLAN`. Does not know: numpy's types, files, layers.
"""

# ruff: noqa: PLR0917 (kernels and vector code take plain scalars, in order)

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import prange

from reference_engine.backends.numba_attention import attend_items, norm, rotate
from reference_engine.backends.numba_kernels import address_of, dots
from reference_engine.backends.numba_vectors import (
    FLOAT,
    LANES,
    Builder,
    Value,
    compiled,
    compiled_parallel,
    integer,
    load,
    loop,
    round_down,
    store,
    to_half,
    vector_code,
)
from reference_engine.backends.numba_weights import prepared_x

_MATRIX_FIELDS = ("", "_stride", "_bias")
_NORM_FIELDS = ("_rows", "_weight", "_norm_bias")
PLAN: Final = np.dtype(
    [(f"{name}{field}", np.int64) for name in ("q", "k", "v", "output") for field in _MATRIX_FIELDS]
    + [(f"{name}{field}", np.int64) for name in ("q", "k") for field in _NORM_FIELDS]
    + [(name, np.int64) for name in ("d_model", "n_heads", "n_kv_heads", "width", "window", "interleaved", "centred")]
    + [(name, np.float64) for name in ("scale", "eps")]
)
"""What an attention is computed with, apart from its input: addresses, bytes from row to row, sizes.

``q_rows`` and ``k_rows`` are the vectors that a query or key is normalised as: 1, the number of heads, or 0 for none.
"""

_ZERO = np.float32(0)
_F32, _F16 = np.float32(0), np.int16(0)


@vector_code()
def store_halves(b: Builder, _tag: Any, x: Value, n: Value, out: Value) -> None:
    """Write n floats as float16."""
    whole = round_down(b, n, LANES)
    for start, stop, lanes in ((integer(0), whole, LANES), (whole, n, 1)):
        with loop(b, start, stop, lanes) as (i, _):
            value = load(b, b.add(x, b.mul(i, integer(4))), FLOAT, lanes)
            store(b, to_half(b, value), b.add(out, b.mul(i, integer(2))))


@vector_code()
def _copy(b: Builder, _tag: Any, x: Value, n: Value, out: Value) -> None:
    """Write n floats."""
    whole = round_down(b, n, LANES)
    for start, stop, lanes in ((integer(0), whole, LANES), (whole, n, 1)):
        with loop(b, start, stop, lanes) as (i, _):
            at = b.mul(i, integer(4))
            store(b, load(b, b.add(x, at), FLOAT, lanes), b.add(out, at))


@compiled
def _project(tag: Any, plans: Any, x: int, first: int, last: int, scratch: Any) -> None:
    """Groups `first` to `last` of four rows of the query's, key's and value's matrices, laid end to end."""
    p = plans[0]
    n, n_kv, d = p.n_heads * p.width, p.n_kv_heads * p.width, p.d_model
    q = address_of(scratch)
    k = q + 4 * n
    v = k + 4 * n_kv
    prepared = np.empty(d + d // 32 + 128, np.float32)
    px = prepared_x(tag, x, d, address_of(prepared))
    groups, kv_groups = (n + 3) // 4, (n_kv + 3) // 4
    begin, end = min(first, groups), min(last, groups)
    dots(tag, p.q, p.q_stride, n, 4 * begin, min(4 * end, n), px, d, q, p.q_bias)
    first, last = first - groups, last - groups
    begin, end = min(max(first, 0), kv_groups), min(max(last, 0), kv_groups)
    dots(tag, p.k, p.k_stride, n_kv, 4 * begin, min(4 * end, n_kv), px, d, k, p.k_bias)
    begin, end = max(first - kv_groups, 0), max(last - kv_groups, 0)
    dots(tag, p.v, p.v_stride, n_kv, 4 * begin, min(4 * end, n_kv), px, d, v, p.v_bias)
    prepared[0] = _ZERO


@compiled
def _place(
    plans: Any, scratch: Any, cos: int, sin: int, n_pairs: int, keys: int, values: int, half: int, head: int, at: int
) -> None:  # fmt: skip
    """Normalise and turn query and key, then append key and value to the cache, `at` bytes into each head."""
    p = plans[0]
    n, n_kv = p.n_heads * p.width, p.n_kv_heads * p.width
    q = address_of(scratch)
    k = q + 4 * n
    v = k + 4 * n_kv
    if p.q_rows != 0:
        norm(q, p.q_rows, n // p.q_rows, p.q_weight, p.q_norm_bias, p.eps, p.centred, q)
    if p.k_rows != 0:
        norm(k, p.k_rows, n_kv // p.k_rows, p.k_weight, p.k_norm_bias, p.eps, p.centred, k)
    if n_pairs > 0:
        rotate(q, 1, p.n_heads, p.width, cos, sin, n_pairs, p.interleaved)
        rotate(k, 1, p.n_kv_heads, p.width, cos, sin, n_pairs, p.interleaved)
    for h in range(p.n_kv_heads):
        source, target = h * p.width * 4, h * head + at
        if half != 0:
            store_halves(_F32, k + source, p.width, keys + target)
            store_halves(_F32, v + source, p.width, values + target)
        else:
            _copy(_F32, k + source, p.width, keys + target)
            _copy(_F32, v + source, p.width, values + target)


@compiled
def _attend_heads(
    plans: Any, scratch: Any, keys: int, values: int, half: int, head: int, n_past: int, begin: int, end: int
) -> None:
    p = plans[0]
    q = address_of(scratch)
    mixed = q + 4 * p.width * (p.n_heads + 2 * p.n_kv_heads)
    if half != 0:
        attend_items(
            _F16, q, keys, values, 2 * p.width, head, p.n_heads, p.n_kv_heads, p.width, 1, n_past, p.scale, p.window,
            mixed, begin, end,
        )  # fmt: skip
    else:
        attend_items(
            _F32, q, keys, values, 4 * p.width, head, p.n_heads, p.n_kv_heads, p.width, 1, n_past, p.scale, p.window,
            mixed, begin, end,
        )  # fmt: skip


@compiled
def _output(tag: Any, plans: Any, scratch: Any, first: int, last: int, out: int) -> None:
    p = plans[0]
    n, d = p.n_heads * p.width, p.d_model
    mixed = address_of(scratch) + 4 * (n + 2 * p.n_kv_heads * p.width)
    prepared = np.empty(n + n // 32 + 128, np.float32)
    px = prepared_x(tag, mixed, n, address_of(prepared))
    dots(tag, p.output, p.output_stride, d, 4 * first, min(4 * last, d), px, n, out, p.output_bias)
    prepared[0] = _ZERO


@compiled_parallel
def attention_one(
    tag: Any, plans: Any, x: int, cos: int, sin: int, n_pairs: int, keys: int, values: int, half: int, head: int,
    n_past: int, out: int, n_threads: int,
) -> None:  # fmt: skip
    """Attention of one token by ``plans[0]``; its key and value become those of position `n_past`.

    Scratch holds the query, the key, the value, and what the heads have read.

    `cos` and `sin` are float32 [n_pairs]; without rotation n_pairs is 0. Keys and values are float16 where `half`, else
    float32, `head` bytes from one head to the next.
    """
    p = plans[0]
    n, n_kv, d, n_heads, width = p.n_heads * p.width, p.n_kv_heads * p.width, p.d_model, p.n_heads, p.width
    scratch = np.empty(2 * (n + n_kv) + 16, np.float32)
    groups = (n + 3) // 4 + 2 * ((n_kv + 3) // 4)
    for c in prange(n_threads):
        first, last = c * groups // n_threads, (c + 1) * groups // n_threads
        _project(tag, plans, x, first, last, scratch)
    at = n_past * width * (2 if half != 0 else 4)
    _place(plans, scratch, cos, sin, n_pairs, keys, values, half, head, at)
    for c in prange(n_threads):
        begin, end = c * n_heads // n_threads, (c + 1) * n_heads // n_threads
        _attend_heads(plans, scratch, keys, values, half, head, n_past, begin, end)
    groups = (d + 3) // 4
    for c in prange(n_threads):
        first, last = c * groups // n_threads, (c + 1) * groups // n_threads
        _output(tag, plans, scratch, first, last, out)
    scratch[0] = _ZERO
