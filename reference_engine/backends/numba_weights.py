"""Dot products, scaled sums and decoding of encoded rows, as vector code for numba kernels.

Four rows are read at once, each with its own prefetches: that is what brings a core to its memory bandwidth. Weights
meet float32 activations, so quantised encodings lose nothing beyond their own rounding.

q4 never converts integers to floats: a nibble q is put into the mantissa of 1.0 by a shift and a mask, giving
f = 1 + q / 16. The sum over a group is then ``16 * scale * (sum(f x) - 1.5 * sum(x))``; the second sum belongs to x
alone. One 16-bit lane holds two bytes, so that even and odd weights of a group land in separate vectors: activations
and outputs are held even ones first (`prepared_x`, `begin_sum`).

Knows: one encoded row (SPEC.md section "Encodings"). Does not know: matrices, threads.
"""

# ruff: noqa: PLR0917 (kernels and vector code take plain scalars, in order)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types

from flashfmt.encodings import Encoding
from reference_engine.backends.numba_vectors import (
    FLOAT,
    HALF,
    HOST_FEATURES,
    I8,
    I16,
    I32,
    LANES,
    Builder,
    Value,
    broadcast,
    horizontal_sum,
    integer,
    load,
    load_scalar,
    loop,
    multiply_add,
    prefetch,
    prefetch_ahead,
    round_down,
    shuffle,
    splat,
    store,
    variable,
    vector,
    vector_code,
)

N_ROWS: Final = 4
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
_Q4_FACTOR: Final = 16.0
_Q4_CENTRE: Final = 1.5

_CONVERTS_HALF: Final = bool(HOST_FEATURES.get("f16c", False)) or llvm.get_process_triple().startswith(
    ("aarch64", "arm64")
)


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
    dots = _dot4_q4(b, x, k, scratch, rows, next_rows) if tag == Q4 else _dot4_plain(b, tag, x, k, rows, next_rows)
    for r, dot in enumerate(dots):
        store(b, dot, b.add(out, integer(4 * r)))


@vector_code()
def axpy4(
    b: Builder, tag: Any, y: Value, h: Value, j0: Value, j1: Value, k: Value, scratch: Value,
    w0: Value, w1: Value, w2: Value, w3: Value, n0: Value, n1: Value, n2: Value, n3: Value,
) -> None:  # fmt: skip
    """Add four rows times h[0:4] to columns j0 to j1 of y, row after row; j0 is a multiple of 64.

    `y` is what `begin_sum` returned; `scratch` is float32 [5 * k / 32], used by q4.
    """
    rows, next_rows = (w0, w1, w2, w3), (n0, n1, n2, n3)
    factors = [load_scalar(b, b.add(h, integer(4 * r)), FLOAT) for r in range(N_ROWS)]
    if tag == Q4:
        _axpy4_q4(b, y, factors, (j0, j1, k), scratch, rows, next_rows)
    else:
        _axpy4_plain(b, tag, y, factors, (j0, j1), rows, next_rows)


@vector_code()
def decode_row(b: Builder, tag: Any, row: Value, k: Value, j0: Value, j1: Value, out: Value) -> None:
    """Write weights j0 to j1 of a row of `k` weights to `out`; quantised rows need multiples of 64."""
    if tag == Q4:
        _decode_q4(b, row, k, j0, j1, out)
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
    """Address of activations as `dot4` wants them: x itself, or `out` float32 [k + k / 32], filled, for q4."""
    if tag != Q4:
        return x
    sums = b.add(out, b.mul(k, integer(4)))
    with loop(b, integer(0), k, 64) as (j, _):
        for half in (0, 1):
            at = b.mul(b.add(j, integer(32 * half)), integer(4))
            even, odd = _deinterleaved(b, b.add(x, at))
            store(b, even, b.add(out, at))
            store(b, odd, b.add(out, b.add(at, integer(64))))
            total = horizontal_sum(b, b.fadd(even, odd))
            corrected = b.fmul(total, ir.Constant(FLOAT, _Q4_CENTRE))
            group = b.add(b.sdiv(j, integer(32)), integer(half))
            store(b, corrected, b.add(sums, b.mul(group, integer(4))))
    return out


@vector_code(types.int64)
def begin_sum(b: Builder, tag: Any, out: Value, j0: Value, j1: Value, scratch: Value) -> Value:
    """Address of columns as `axpy4` adds to them: `out` itself; `scratch`, with columns j0 to j1 of it, for q4."""
    if tag != Q4:
        return out
    with loop(b, j0, j1, 32) as (j, _):
        at = b.mul(j, integer(4))
        for odd, columns in enumerate(_deinterleaved(b, b.add(out, at))):
            store(b, columns, b.add(scratch, b.add(at, integer(64 * odd))))
    return scratch


@vector_code()
def end_sum(b: Builder, tag: Any, y: Value, j0: Value, j1: Value, out: Value) -> None:
    """Bring columns j0 to j1 back to `out` from where `begin_sum` put them."""
    if tag != Q4:
        return
    with loop(b, j0, j1, 32) as (j, _):
        at = b.mul(j, integer(4))
        even, odd = (load(b, b.add(y, b.add(at, integer(64 * i))), FLOAT, LANES) for i in (0, 1))
        for half in (0, 1):
            order = [8 * half + i // 2 + LANES * (i % 2) for i in range(LANES)]
            store(b, shuffle(b, even, odd, order), b.add(out, b.add(at, integer(64 * half))))


def _deinterleaved(b: Builder, address: Value) -> tuple[Value, Value]:
    first, second = (load(b, b.add(address, integer(64 * i)), FLOAT, LANES) for i in (0, 1))
    return shuffle(b, first, second, range(0, 32, 2)), shuffle(b, first, second, range(1, 32, 2))


def _weights(b: Builder, tag: Any, row: Value, j: Value, lanes: int) -> Value:
    """Weights j to j + lanes of a row as floats; those of q8 without their scale."""
    address = b.add(row, b.mul(j, integer(_VALUE_NBYTES[tag])))
    if tag == F32:
        return load(b, address, FLOAT, lanes)
    if tag == F16:
        return _from_half(b, load(b, address, I16, lanes))
    if tag == BF16:
        bits = b.zext(load(b, address, I16, lanes), vector(I32, lanes))
        return b.bitcast(b.shl(bits, splat(I32, 16, lanes)), vector(FLOAT, lanes))
    values = load(b, b.add(address, integer(_Q8_VALUES_OFFSET)), I8, lanes)
    return b.sitofp(b.sext(values, vector(I32, lanes)), vector(FLOAT, lanes))


def _from_half(b: Builder, bits: Value) -> Value:
    """Bits of float16 to float32; without hardware by moving the exponent, which also covers subnormals and infinity.

    LLVM's own conversion would call a function that no library of the process has on hosts without F16C.
    """
    lanes = bits.type.count
    if _CONVERTS_HALF:
        return b.fpext(b.bitcast(bits, vector(HALF, lanes)), vector(FLOAT, lanes))
    wide = b.zext(bits, vector(I32, lanes))
    sign = b.shl(b.and_(wide, splat(I32, 0x8000, lanes)), splat(I32, 16, lanes))
    magnitude = b.shl(b.and_(wide, splat(I32, 0x7FFF, lanes)), splat(I32, 13, lanes))
    rebias = splat(FLOAT, 2.0**112, lanes)
    finite = b.bitcast(b.fmul(b.bitcast(magnitude, vector(FLOAT, lanes)), rebias), vector(I32, lanes))
    special = b.or_(magnitude, splat(I32, 0x7F800000, lanes))
    is_special = b.icmp_unsigned(">=", magnitude, splat(I32, 0x0F800000, lanes))
    return b.bitcast(b.or_(b.select(is_special, special, finite), sign), vector(FLOAT, lanes))


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


def _q4_values_offset(b: Builder, k: Value) -> Value:
    """Bytes before the nibbles of a row: two for each group of 32, to a multiple of 64."""
    return round_down(b, b.add(b.sdiv(k, integer(16)), integer(63)), 64)


def _q4_scales(b: Builder, row: Value, group: Value, lanes: int) -> Value:
    """16 times the scales of `lanes` groups."""
    scales = _from_half(b, load(b, b.add(row, b.mul(group, integer(2))), I16, lanes))
    return b.fmul(scales, splat(FLOAT, _Q4_FACTOR, lanes))


def _q4_fractions(b: Builder, address: Value) -> list[list[Value]]:
    """The 64 weights at an address as f = 1 + q / 16: [group][0 even, 1 odd], 16 each."""
    pairs = b.zext(load(b, address, I16, LANES), vector(I32, LANES))
    mask, one = splat(I32, 0x780000, LANES), splat(I32, 0x3F800000, LANES)

    def fraction(bits: int) -> Value:
        return b.bitcast(b.or_(b.and_(b.shl(pairs, splat(I32, bits, LANES)), mask), one), vector(FLOAT, LANES))

    return [[fraction(19), fraction(11)], [fraction(15), fraction(7)]]


def _each_scales(b: Builder, g0: Value, g1: Value, body: Any) -> None:
    """Call ``body(group, lanes)`` for all groups g0 to g1, an even number, 16 or 2 at a time."""
    whole = b.add(g0, round_down(b, b.sub(g1, g0), LANES))
    for start, stop, lanes in ((g0, whole, LANES), (whole, g1, 2)):
        with loop(b, start, stop, lanes) as (group, _):
            body(group, lanes)


def _dot4_q4(
    b: Builder, x: Value, k: Value, scratch: Value, rows: Sequence[Value], next_rows: Sequence[Value]
) -> list[Value]:
    n_groups = b.sdiv(k, integer(32))
    offset = _q4_values_offset(b, k)
    begin, end = integer(0), b.add(offset, b.sdiv(k, integer(2)))
    x_sums = b.add(x, b.mul(k, integer(4)))
    corrections = [{lanes: variable(b, splat(FLOAT, 0.0, lanes)) for lanes in (LANES, 2)} for _ in rows]
    sums = [[variable(b, splat(FLOAT, 0.0, LANES)) for _ in (0, 1)] for _ in rows]

    def scale_address(r: int, group: Value) -> Value:
        return b.add(scratch, b.mul(b.add(b.mul(n_groups, integer(r)), group), integer(4)))

    def ahead(at: Value, r: int) -> None:
        prefetch_ahead(b, rows[r], next_rows[r], at, begin, end, distance=PREFETCH_BYTES)

    def scales(group: Value, lanes: int) -> None:
        sums_of_x = load(b, b.add(x_sums, b.mul(group, integer(4))), FLOAT, lanes)
        for r, row in enumerate(rows):
            ahead(b.mul(group, integer(2)), r)
            scaled = _q4_scales(b, row, group, lanes)
            store(b, scaled, scale_address(r, group))
            total = corrections[r][lanes]
            b.store(multiply_add(b, scaled, sums_of_x, b.load(total)), total)

    _each_scales(b, integer(0), n_groups, scales)
    with loop(b, integer(0), n_groups, 2) as (group, _):
        at = b.add(offset, b.mul(group, integer(16)))
        x_at = b.add(x, b.mul(group, integer(128)))
        xs = [[load(b, b.add(x_at, integer(128 * g + 64 * odd)), FLOAT, LANES) for odd in (0, 1)] for g in (0, 1)]
        for r, row in enumerate(rows):
            ahead(at, r)
            fractions = _q4_fractions(b, b.add(row, at))
            for g in (0, 1):
                product = multiply_add(b, fractions[g][1], xs[g][1], b.fmul(fractions[g][0], xs[g][0]))
                scale = load_scalar(b, scale_address(r, b.add(group, integer(g))), FLOAT)
                b.store(multiply_add(b, product, broadcast(b, scale, LANES), b.load(sums[r][g])), sums[r][g])
    dots = []
    for r in range(len(rows)):
        correction = b.fadd(*(horizontal_sum(b, b.load(corrections[r][lanes])) for lanes in (LANES, 2)))
        dots.append(b.fsub(horizontal_sum(b, b.fadd(b.load(sums[r][0]), b.load(sums[r][1]))), correction))
    return dots


def _axpy4_q4(
    b: Builder, y: Value, factors: Sequence[Value], columns: tuple[Value, Value, Value], scratch: Value,
    rows: Sequence[Value], next_rows: Sequence[Value],
) -> None:  # fmt: skip
    j0, j1, k = columns
    n_groups = b.sdiv(k, integer(32))
    g0, g1 = b.sdiv(j0, integer(32)), b.sdiv(j1, integer(32))
    offset = _q4_values_offset(b, k)
    begin, end = (b.add(offset, b.sdiv(j, integer(2))) for j in (j0, j1))

    def scale_address(r: int, group: Value) -> Value:
        return b.add(scratch, b.mul(b.add(b.mul(n_groups, integer(r)), group), integer(4)))

    def scales(group: Value, lanes: int) -> None:
        total = splat(FLOAT, 0.0, lanes)
        negated = splat(FLOAT, -_Q4_CENTRE, lanes)
        for r, row in enumerate(rows):
            scaled = b.fmul(_q4_scales(b, row, group, lanes), broadcast(b, factors[r], lanes))
            store(b, scaled, scale_address(r, group))
            total = multiply_add(b, scaled, negated, total)
            prefetch(b, b.add(next_rows[r], b.mul(group, integer(2))))
        store(b, total, scale_address(N_ROWS, group))

    def scale(r: int, group: Value) -> Value:
        return broadcast(b, load_scalar(b, scale_address(r, group), FLOAT), LANES)

    _each_scales(b, g0, g1, scales)
    with loop(b, g0, g1, 2) as (group, _):
        at = b.add(offset, b.mul(group, integer(16)))
        y_at = [[b.add(y, b.mul(b.add(b.mul(group, integer(32)), integer(32 * g + 16 * odd)), integer(4)))
                 for odd in (0, 1)] for g in (0, 1)]  # fmt: skip
        groups = [b.add(group, integer(g)) for g in (0, 1)]
        totals = [
            [b.fadd(load(b, y_at[g][odd], FLOAT, LANES), scale(N_ROWS, groups[g])) for odd in (0, 1)] for g in (0, 1)
        ]
        for r, row in enumerate(rows):
            prefetch_ahead(b, row, next_rows[r], at, begin, end, distance=PREFETCH_BYTES)
            fractions = _q4_fractions(b, b.add(row, at))
            for g in (0, 1):
                scaled = scale(r, groups[g])
                for odd in (0, 1):
                    totals[g][odd] = multiply_add(b, fractions[g][odd], scaled, totals[g][odd])
        for g in (0, 1):
            for odd in (0, 1):
                store(b, totals[g][odd], y_at[g][odd])


def _decode_q4(b: Builder, row: Value, k: Value, j0: Value, j1: Value, out: Value) -> None:
    values = b.add(row, _q4_values_offset(b, k))
    eight = splat(FLOAT, 8.0, LANES)
    with loop(b, j0, j1, 64) as (j, _):
        for half in (0, 1):
            nibbles = b.zext(load(b, b.add(values, b.add(b.sdiv(j, integer(2)), integer(16 * half))), I8, LANES),
                             vector(I32, LANES))  # fmt: skip
            for group, bits in enumerate(
                (b.and_(nibbles, splat(I32, 15, LANES)), b.lshr(nibbles, splat(I32, 4, LANES)))
            ):
                scale_at = b.add(row, b.mul(b.add(b.sdiv(j, integer(32)), integer(group)), integer(2)))
                scale = _from_half(b, load(b, scale_at, I16, 1))
                scale = broadcast(b, b.extract_element(scale, ir.Constant(I32, 0)), LANES)
                w = b.fmul(b.fsub(b.sitofp(bits, vector(FLOAT, LANES)), eight), scale)
                column = b.add(b.sub(j, j0), integer(32 * group + 16 * half))
                store(b, w, b.add(out, b.mul(column, integer(4))))
