"""Dot products, scaled sums and decoding of encoded rows, as vector code for numba kernels.

Four rows are read at once, each with its own prefetches: that is what brings a core to its memory bandwidth. Weights
meet activations of float32 precision, those of q4 of 16 bits and more: little beside the encoding's own rounding. The
code for quantised encodings is in `numba_limbs`, `numba_chunks` and `numba_q4`.

Knows: one encoded row (SPEC.md section "Encodings"). Does not know: matrices, threads.
"""

# ruff: noqa: PLR0917 (kernels and vector code take plain scalars, in order)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numba import types

from flashfmt.encodings import Encoding
from reference_engine.backends import numba_chunks as chunks
from reference_engine.backends import numba_limbs as limbs
from reference_engine.backends.numba_q4 import add_permuted, axpy4_q4, decode_q4, dot4_q4, prepare_q4
from reference_engine.backends.numba_vectors import (
    FLOAT,
    HAS_BYTE_DOTS,
    I8,
    I16,
    I32,
    I64,
    LANES,
    Builder,
    Value,
    broadcast,
    from_half,
    horizontal_sum,
    integer,
    load,
    load_scalar,
    loop,
    multiply_add,
    prefetch_ahead,
    round_down,
    splat,
    store,
    variable,
    vector,
    vector_code,
)

N_ROWS: Final = 4
LINE_COLUMNS: Final = 128
PREFETCH_BYTES: Final = 2048

TAGS: Final[dict[Encoding, np.generic]] = {
    Encoding.F32: np.float32(0),
    Encoding.F16: np.int16(0),
    Encoding.BF16: np.uint16(0),
    Encoding.Q8: np.int8(0),
    Encoding.Q4: np.uint8(0),
}
"""The scalar that selects an encoding's code: numba compiles a kernel once for each type of its arguments."""

F32, F16, BF16, Q8, Q4 = types.float32, types.int16, types.uint16, types.int8, types.uint8
_VALUE_NBYTES: Final = {F32: 4, F16: 2, BF16: 2, Q8: 1}
_Q8_VALUES_OFFSET: Final = 64


@vector_code()
def dot4(
    b: Builder, tag: Any, out: Value, x: Value, k: Value, scratch: Value,
    w0: Value, w1: Value, w2: Value, w3: Value, n0: Value, n1: Value, n2: Value, n3: Value,
) -> None:  # fmt: skip
    """Write the dot products of four rows with x to out[0:4].

    `k` is the length of a row, `x` what `prepared_x` returned, `n0` to `n3` the rows to be read next. `scratch` is
    float32 [k / 8], used by q4.
    """
    rows, next_rows = (w0, w1, w2, w3), (n0, n1, n2, n3)
    if tag == Q4:
        dot4_of_q4 = limbs.dot4_q4 if HAS_BYTE_DOTS else dot4_q4
        dots = dot4_of_q4(b, x, k, scratch, rows, next_rows)
    elif tag == Q8 and HAS_BYTE_DOTS:
        dots = limbs.dot4_q8(b, x, k, rows, next_rows)
    else:
        dots = _dot4_plain(b, tag, x, k, rows, next_rows)
    for r, dot in enumerate(dots):
        store(b, dot, b.add(out, integer(4 * r)))


@vector_code()
def axpy4(
    b: Builder, tag: Any, y: Value, h: Value, j0: Value, j1: Value,
    w0: Value, w1: Value, w2: Value, w3: Value, n0: Value, n1: Value, n2: Value, n3: Value,
) -> None:  # fmt: skip
    """Add four rows of an encoding that is not quantised times h[0:4] to columns j0 to j1 of y, row after row."""
    factors = [load_scalar(b, b.add(h, integer(4 * r)), FLOAT) for r in range(N_ROWS)]
    _axpy4_plain(b, tag, y, factors, (j0, j1), (w0, w1, w2, w3), (n0, n1, n2, n3))


@vector_code()
def add_chunk(
    b: Builder, tag: Any, y: Value, rows: Value, next_rows: Value, factors: Value, n: Value,
    j0: Value, j1: Value, k: Value, scratch: Value,
) -> None:  # fmt: skip
    """Add n <= `CHUNK_ROWS` rows, a multiple of 4, times their factors, to columns j0 to j1 of y.

    `y` holds sums in an order of the encoding's own, see `clear_sums` and `add_sums`. `rows` is the address of
    addresses, int64 [n], `next_rows` that of as many to be read next. j0 is a multiple of `LINE_COLUMNS`, and j1 is one
    or k. `scratch` is float32 [10 * k / 32 + 256], used by quantised encodings.
    """
    if HAS_BYTE_DOTS and tag == Q8:
        chunks.axpy_q8(b, y, (j0, j1), scratch, rows, next_rows, factors, n)
        return
    if HAS_BYTE_DOTS and tag == Q4:
        chunks.axpy_q4(b, y, (j0, j1, k), scratch, rows, next_rows, factors, n)
        return
    with loop(b, integer(0), n, N_ROWS) as (r, _):
        following = b.add(r, integer(N_ROWS))
        is_last = b.icmp_signed(">=", following, n)
        here, ahead = b.add(rows, b.mul(r, integer(8))), b.add(rows, b.mul(following, integer(8)))
        lists = (here, b.select(is_last, next_rows, ahead))
        quad, next_quad = ([load_scalar(b, b.add(at, integer(8 * i)), I64) for i in range(N_ROWS)] for at in lists)
        h = [load_scalar(b, b.add(factors, b.mul(b.add(r, integer(i)), integer(4))), FLOAT) for i in range(N_ROWS)]
        if tag == Q4:
            axpy4_q4(b, y, h, (j0, j1, k), scratch, quad, next_quad)
        else:
            _axpy4_plain(b, tag, y, h, (j0, j1), quad, next_quad)


@vector_code()
def decode_row(b: Builder, tag: Any, row: Value, k: Value, j0: Value, j1: Value, out: Value) -> None:
    """Write weights j0 to j1 of a row of `k` weights to `out`; quantised rows need multiples of 64."""
    if tag == Q4:
        decode_q4(b, row, k, j0, j1, out)
        return
    scale = load_scalar(b, row, FLOAT) if tag == Q8 else None

    def decode(j: Value, lanes: int) -> None:
        w = _weights(b, tag, row, j, lanes)
        if scale is not None:
            w = b.fmul(w, broadcast(b, scale, lanes))
        store(b, w, b.add(out, b.mul(b.sub(j, j0), integer(4))))

    whole = b.add(j0, round_down(b, b.sub(j1, j0), LANES))
    with loop(b, j0, whole, LANES) as (j, _):
        decode(j, LANES)
    with loop(b, whole, j1, 1) as (j, _):
        decode(j, 1)


@vector_code(types.int64)
def prepared_x(b: Builder, tag: Any, x: Value, k: Value, out: Value) -> Value:
    """Address of activations as `dot4` wants them: x itself, or `out` float32 [k + k / 32 + 128], filled."""
    if HAS_BYTE_DOTS and tag == Q8:
        limbs.prepare_q8(b, x, k, out)
    elif tag == Q4:
        (limbs.prepare_q4 if HAS_BYTE_DOTS else prepare_q4)(b, x, k, out)
    else:
        return x
    return out


@vector_code()
def clear_sums(b: Builder, _tag: Any, sums: Value, j0: Value, j1: Value) -> None:
    """Set columns j0 to j1 of sums to 0, and those up to a multiple of `LINE_COLUMNS`, for which they have room."""
    with loop(b, j0, round_down(b, b.add(j1, integer(LINE_COLUMNS - 1)), LINE_COLUMNS), LANES) as (j, _):
        store(b, splat(FLOAT, 0.0, LANES), b.add(sums, b.mul(j, integer(4))))


@vector_code()
def add_sums(b: Builder, tag: Any, sums: Value, j0: Value, j1: Value, out: Value) -> None:
    """Add columns j0 to j1 of what `add_chunk` summed to those of `out`, float32 in the order of the columns."""
    if tag == Q8 and HAS_BYTE_DOTS:
        chunks.add_q8(b, sums, (j0, j1), out)
        return
    if tag == Q4:
        if HAS_BYTE_DOTS:
            chunks.add_q4(b, sums, (j0, j1), out)
        else:
            add_permuted(b, sums, j0, j1, out)
        return
    whole = b.add(j0, round_down(b, b.sub(j1, j0), LANES))
    for start, stop, lanes in ((j0, whole, LANES), (whole, j1, 1)):
        with loop(b, start, stop, lanes) as (j, _):
            at = b.mul(j, integer(4))
            place = b.add(out, at)
            total = b.fadd(load(b, place, FLOAT, lanes), load(b, b.add(sums, at), FLOAT, lanes))
            store(b, total, place)


def _weights(b: Builder, tag: Any, row: Value, j: Value, lanes: int) -> Value:
    """Weights j to j + lanes of a row as floats; those of q8 without their scale."""
    address = b.add(row, b.mul(j, integer(_VALUE_NBYTES[tag])))
    if tag == F32:
        return load(b, address, FLOAT, lanes)
    if tag == F16:
        return from_half(b, load(b, address, I16, lanes))
    if tag == BF16:
        bits = b.zext(load(b, address, I16, lanes), vector(I32, lanes))
        return b.bitcast(b.shl(bits, splat(I32, 16, lanes)), vector(FLOAT, lanes))
    values = load(b, b.add(address, integer(_Q8_VALUES_OFFSET)), I8, lanes)
    return b.sitofp(b.sext(values, vector(I32, lanes)), vector(FLOAT, lanes))


def _dot4_plain(
    b: Builder, tag: Any, x: Value, k: Value, rows: Sequence[Value], next_rows: Sequence[Value]
) -> list[Value]:
    nbytes = _VALUE_NBYTES[tag]
    step = max(2 * LANES, 64 // nbytes)
    begin = integer(0)
    end = b.add(b.mul(k, integer(nbytes)), integer(_Q8_VALUES_OFFSET if tag == Q8 else 0))
    sums = [[variable(b, splat(FLOAT, 0.0, LANES)) for _ in (0, 1)] for _ in rows]
    tails = [variable(b, splat(FLOAT, 0.0, 1)) for _ in rows]

    def accumulate(j: Value, lanes: int, totals: Sequence[Value]) -> None:
        xv = load(b, b.add(x, b.mul(j, integer(4))), FLOAT, lanes)
        for row, total in zip(rows, totals, strict=True):
            b.store(multiply_add(b, _weights(b, tag, row, j, lanes), xv, b.load(total)), total)

    def ahead(offset: Value, n_lines: int) -> None:
        for row, next_row in zip(rows, next_rows, strict=True):
            prefetch_ahead(b, row, next_row, offset, begin, end, distance=PREFETCH_BYTES, n_lines=n_lines)

    if tag == Q8:
        ahead(begin, 1)
    unrolled, whole = round_down(b, k, step), round_down(b, k, LANES)
    with loop(b, integer(0), unrolled, step) as (j, _):
        ahead(b.add(b.mul(j, integer(nbytes)), integer(_Q8_VALUES_OFFSET if tag == Q8 else 0)), step * nbytes // 64)
        for u in range(step // LANES):
            accumulate(b.add(j, integer(LANES * u)), LANES, [pair[u % 2] for pair in sums])
    with loop(b, unrolled, whole, LANES) as (j, _):
        accumulate(j, LANES, [pair[0] for pair in sums])
    with loop(b, whole, k, 1) as (j, _):
        accumulate(j, 1, tails)
    dots = []
    for row, pair, tail in zip(rows, sums, tails, strict=True):
        dot = b.fadd(horizontal_sum(b, b.fadd(b.load(pair[0]), b.load(pair[1]))), horizontal_sum(b, b.load(tail)))
        dots.append(b.fmul(dot, load_scalar(b, row, FLOAT)) if tag == Q8 else dot)
    return dots


def _axpy4_plain(
    b: Builder, tag: Any, y: Value, factors: Sequence[Value], columns: tuple[Value, Value],
    rows: Sequence[Value], next_rows: Sequence[Value],
) -> None:  # fmt: skip
    j0, j1 = columns
    nbytes = _VALUE_NBYTES[tag]
    step = max(2 * LANES, 64 // nbytes)
    offset = _Q8_VALUES_OFFSET if tag == Q8 else 0
    begin, end = (b.add(b.mul(j, integer(nbytes)), integer(offset)) for j in columns)
    if tag == Q8:
        factors = [b.fmul(h, load_scalar(b, row, FLOAT)) for h, row in zip(factors, rows, strict=True)]

    def accumulate(j: Value, lanes: int) -> None:
        at = b.add(y, b.mul(j, integer(4)))
        total = load(b, at, FLOAT, lanes)
        for h, row in zip(factors, rows, strict=True):
            total = multiply_add(b, _weights(b, tag, row, j, lanes), broadcast(b, h, lanes), total)
        store(b, total, at)

    unrolled = b.add(j0, round_down(b, b.sub(j1, j0), step))
    whole = b.add(j0, round_down(b, b.sub(j1, j0), LANES))
    with loop(b, j0, unrolled, step) as (j, _):
        at = b.add(b.mul(j, integer(nbytes)), integer(offset))
        for row, next_row in zip(rows, next_rows, strict=True):
            prefetch_ahead(b, row, next_row, at, begin, end, distance=PREFETCH_BYTES, n_lines=step * nbytes // 64)
        for u in range(step // LANES):
            accumulate(b.add(j, integer(LANES * u)), LANES)
    with loop(b, unrolled, whole, LANES) as (j, _):
        accumulate(j, LANES)
    with loop(b, whole, j1, 1) as (j, _):
        accumulate(j, 1)
