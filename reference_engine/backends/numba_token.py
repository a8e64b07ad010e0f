"""One token through layers, in one call: norms, attention, FFN, sums.

Python is slow between kernels: they sweep what it needs out of the processor's caches, so that a call which takes 5 us
in a loop takes 50 to 150 us behind a kernel that has read megabytes. One call for many steps pays that once. The
arithmetic is that of the kernels it consists of, in the same order: the result has the same bits.

Knows: weights and keys at addresses, `PLAN`. Does not know: numpy's types, files.
"""

# ruff: noqa: PLR0917 (kernels and vector code take plain scalars, in order)

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import prange

from reference_engine.backends.numba_attention import attend_items, norm, rotate
from reference_engine.backends.numba_kernels import address_of, dots, ffn_one, floats
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
_ATTENTION_SIZES = ("d_model", "n_heads", "n_kv_heads", "width", "window")
_ROTATION_FIELDS = ("angles", "n_pairs", "interleaved")
_FFN_FIELDS = ("rows", "row_stride", "n_neurons", "part", "gated", "gate_bias", "up_bias", "down_bias")
PLAN: Final = np.dtype(
    [(f"{name}{field}", np.int64) for name in ("q", "k", "v", "output") for field in _MATRIX_FIELDS]
    + [(f"{name}_norm_{field}", np.int64) for name in ("q", "k") for field in ("rows", "weight", "bias")]
    + [(f"{name}_norm_{field}", np.int64) for name in ("attention", "ffn") for field in ("weight", "bias")]
    + [(name, np.int64) for name in (*_ATTENTION_SIZES, *_ROTATION_FIELDS, *_FFN_FIELDS)]
    + [(name, np.int64) for name in ("order", "shared_norm", "head_centred", "centred", "activation", "up_activation")]
    + [(name, np.float64) for name in ("scale", "head_eps", "eps", "threshold", "up_threshold")]
)
"""What a layer is computed with: addresses, 0 where there is nothing, bytes from row to row, sizes, choices.

``q_norm_rows`` and ``k_norm_rows`` are the vectors that a query or key is normalised as: 1, the number of heads, or 0
for no norm. ``angles`` are the bytes before the cosines of its rotation, which the sines follow. ``rows`` is 0 where
the FFN is not among the steps of a layer.
"""

PRE_NORM, POST_NORM, PARALLEL = range(3)
N_STEPS: Final = 5
HIDDEN, ATTENTION_INPUT, ATTENTION_OUTPUT, FFN_INPUT, FFN_OUTPUT = range(5)
N_VECTORS: Final = 5
"""The activations of a pass, float32 [N_VECTORS, d_model]."""

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
def _project(tag: Any, plans: Any, layer: int, x: int, first: int, last: int, scratch: int) -> None:
    """Groups `first` to `last` of four rows of the query's, key's and value's matrices, laid end to end."""
    p = plans[layer]
    n, n_kv, d = p.n_heads * p.width, p.n_kv_heads * p.width, p.d_model
    q = scratch
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
    plans: Any, layer: int, scratch: int, angles: int, keys: int, values: int, half: int, head: int, at: int
) -> None:
    """Normalise and turn query and key, then append key and value to the cache, `at` bytes into each head."""
    p = plans[layer]
    n, n_kv = p.n_heads * p.width, p.n_kv_heads * p.width
    q = scratch
    k = q + 4 * n
    v = k + 4 * n_kv
    if p.q_norm_rows != 0:
        rows = p.q_norm_rows
        norm(q, rows, n // rows, p.q_norm_weight, p.q_norm_bias, p.head_eps, p.head_centred, q)
    if p.k_norm_rows != 0:
        rows = p.k_norm_rows
        norm(k, rows, n_kv // rows, p.k_norm_weight, p.k_norm_bias, p.head_eps, p.head_centred, k)
    if p.n_pairs > 0:
        cos = angles + p.angles
        sin = cos + 4 * p.n_pairs
        rotate(q, 1, p.n_heads, p.width, cos, sin, p.n_pairs, p.interleaved)
        rotate(k, 1, p.n_kv_heads, p.width, cos, sin, p.n_pairs, p.interleaved)
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
    plans: Any, layer: int, scratch: int, keys: int, values: int, half: int, head: int, n_past: int,
    begin: int, end: int,
) -> None:  # fmt: skip
    p = plans[layer]
    q = scratch
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
def _output(tag: Any, plans: Any, layer: int, scratch: int, first: int, last: int, out: int) -> None:
    p = plans[layer]
    n, d = p.n_heads * p.width, p.d_model
    mixed = scratch + 4 * (n + 2 * p.n_kv_heads * p.width)
    prepared = np.empty(n + n // 32 + 128, np.float32)
    px = prepared_x(tag, mixed, n, address_of(prepared))
    dots(tag, p.output, p.output_stride, d, 4 * first, min(4 * last, d), px, n, out, p.output_bias)
    prepared[0] = _ZERO


@compiled_parallel
def _projections(tag: Any, plans: Any, layer: int, x: int, scratch: int, n_threads: int) -> None:
    """Query, key and value of one token, laid end to end in scratch."""
    p = plans[layer]
    groups = (p.n_heads * p.width + 3) // 4 + 2 * ((p.n_kv_heads * p.width + 3) // 4)
    for c in prange(n_threads):
        first, last = c * groups // n_threads, (c + 1) * groups // n_threads
        _project(tag, plans, layer, x, first, last, scratch)


@compiled_parallel
def _attention(
    tag: Any, plans: Any, layer: int, scratch: int, angles: int, keys: int, values: int, half: int, head: int,
    n_past: int, out: int, n_threads: int,
) -> None:  # fmt: skip
    """Attention of one token behind `_projections`; its key and value become those of position `n_past`.

    Scratch then holds what the heads have read behind the value. Keys and values are float16 where `half`, else
    float32, `head` bytes from one head to the next.
    """
    p = plans[layer]
    d, n_heads = p.d_model, p.n_heads
    at = n_past * p.width * (2 if half != 0 else 4)
    _place(plans, layer, scratch, angles, keys, values, half, head, at)
    for c in prange(n_threads):
        begin, end = c * n_heads // n_threads, (c + 1) * n_heads // n_threads
        _attend_heads(plans, layer, scratch, keys, values, half, head, n_past, begin, end)
    groups = (d + 3) // 4
    for c in prange(n_threads):
        first, last = c * groups // n_threads, (c + 1) * groups // n_threads
        _output(tag, plans, layer, scratch, first, last, out)


@compiled
def _add(x: int, y: int, n: int) -> None:
    """x += y, n floats."""
    target, source = floats(x, n), floats(y, n)
    for i in range(n):
        target[i] += source[i]


@compiled
def _begin_attention(plans: Any, layer: int, vectors: int) -> None:
    p = plans[layer]
    d = p.d_model
    x, a = vectors + 4 * d * HIDDEN, vectors + 4 * d * ATTENTION_INPUT
    if p.order == POST_NORM:
        _copy(_F32, x, d, a)
    else:
        norm(x, 1, d, p.attention_norm_weight, p.attention_norm_bias, p.eps, p.centred, a)


@compiled
def _begin_ffn(plans: Any, layer: int, vectors: int) -> None:
    """Take up the attention's output; find the FFN's input, and what its output is added to."""
    p = plans[layer]
    d = p.d_model
    x, a, o = vectors, vectors + 4 * d * ATTENTION_INPUT, vectors + 4 * d * ATTENTION_OUTPUT
    f, y = vectors + 4 * d * FFN_INPUT, vectors + 4 * d * FFN_OUTPUT
    if p.order == PRE_NORM:
        _add(x, o, d)
        norm(x, 1, d, p.ffn_norm_weight, p.ffn_norm_bias, p.eps, p.centred, f)
    elif p.order == POST_NORM:
        _add(x, o, d)
        norm(x, 1, d, p.attention_norm_weight, p.attention_norm_bias, p.eps, p.centred, x)
        _copy(_F32, x, d, f)
    else:
        if p.shared_norm != 0:
            _copy(_F32, a, d, f)
        else:
            norm(x, 1, d, p.ffn_norm_weight, p.ffn_norm_bias, p.eps, p.centred, f)
        _add(x, o, d)
    if p.down_bias != 0:
        _copy(_F32, p.down_bias, d, y)
    else:
        floats(y, d)[:] = _ZERO


@compiled
def _end_layer(plans: Any, layer: int, vectors: int) -> None:
    p = plans[layer]
    d = p.d_model
    _add(vectors, vectors + 4 * d * FFN_OUTPUT, d)
    if p.order == POST_NORM:
        norm(vectors, 1, d, p.ffn_norm_weight, p.ffn_norm_bias, p.eps, p.centred, vectors)


@compiled
def take_steps(
    tag: Any, plans: Any, first: int, last: int, vectors: int, scratch: int, angles: int, keys: int, values: int,
    half: int, head: int, n_past: int, n_threads: int,
) -> None:  # fmt: skip
    """Steps `first` to `last` of all layers' steps, `N_STEPS` for each, on the activations at `vectors`.

    Keys and values are those of all layers; see `_attention`. At `scratch` is float32 [2 * (queries + keys)],
    whose contents count between two calls.
    """
    for step in range(first, last):
        layer, kind = step // N_STEPS, step % N_STEPS
        p = plans[layer]
        d = p.d_model
        if kind == 0:
            _begin_attention(plans, layer, vectors)
        elif kind == 1:
            _projections(tag, plans, layer, vectors + 4 * d * ATTENTION_INPUT, scratch, n_threads)
        elif kind == 2:
            past = layer * p.n_kv_heads * head
            _attention(
                tag, plans, layer, scratch, angles, keys + past, values + past, half, head, n_past,
                vectors + 4 * d * ATTENTION_OUTPUT, n_threads,
            )  # fmt: skip
            _begin_ffn(plans, layer, vectors)
        elif kind == 3:
            if p.rows != 0:
                ffn_one(
                    tag, p.rows, p.row_stride, 0, p.n_neurons, d, p.part, p.gated, p.up_bias, p.gate_bias,
                    p.activation, p.threshold, p.up_activation, p.up_threshold,
                    vectors + 4 * d * FFN_INPUT, vectors + 4 * d * FFN_OUTPUT, n_threads,
                )  # fmt: skip
        else:
            _end_layer(plans, layer, vectors)
