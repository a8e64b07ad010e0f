"""Dot products, scaled sums and decoding of q4 rows, as vector code; see `numba_weights` for what calls it.

For processors that cannot multiply bytes; `numba_limbs` is for those that can. Integers are not converted: a shift and
a mask put a nibble q into the mantissa of 1.0, giving f = 1 + q / 16. The sum over a group is then
``16 * scale * (sum(f x) - 1.5 * sum(x))``; the second sum belongs to x alone. One 16-bit lane holds two bytes, so that
even and odd weights of a group land in separate vectors: activations and outputs are held even ones first (`permute`).

Knows: one q4 row (SPEC.md section "Encodings"). Does not know: other encodings, matrices, threads.
"""

# ruff: noqa: PLR0917 (vector code takes plain values, in order)

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from llvmlite import ir

from reference_engine.backends.numba_limbs import each_scales, q4_values_offset
from reference_engine.backends.numba_vectors import (
    FLOAT,
    I8,
    I16,
    I32,
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
    prefetch,
    prefetch_ahead,
    shuffle,
    splat,
    store,
    variable,
    vector,
)

PREFETCH_BYTES: Final = 2048

_FACTOR: Final = 16.0
_CENTRE: Final = 1.5


def permute(b: Builder, x: Value, j0: Value, j1: Value, out: Value) -> None:
    """Copy columns j0 to j1 of x to `out`, the even ones of each group of 32 first."""
    with loop(b, j0, j1, 32) as (j, _):
        at = b.mul(j, integer(4))
        for odd, columns in enumerate(_deinterleaved(b, b.add(x, at))):
            store(b, columns, b.add(out, b.add(at, integer(64 * odd))))


def add_permuted(b: Builder, y: Value, j0: Value, j1: Value, out: Value) -> None:
    """Add columns of y, which are in the order of `permute`, to those of `out`."""
    with loop(b, j0, j1, 32) as (j, _):
        at = b.mul(j, integer(4))
        even, odd = (load(b, b.add(y, b.add(at, integer(64 * i))), FLOAT, LANES) for i in (0, 1))
        for half in (0, 1):
            order = [8 * half + i // 2 + LANES * (i % 2) for i in range(LANES)]
            place = b.add(out, b.add(at, integer(64 * half)))
            store(b, b.fadd(load(b, place, FLOAT, LANES), shuffle(b, even, odd, order)), place)


def _deinterleaved(b: Builder, address: Value) -> tuple[Value, Value]:
    first, second = (load(b, b.add(address, integer(64 * i)), FLOAT, LANES) for i in (0, 1))
    return shuffle(b, first, second, range(0, 32, 2)), shuffle(b, first, second, range(1, 32, 2))


def prepare_q4(b: Builder, x: Value, k: Value, out: Value) -> None:
    """Permuted activations, then 1.5 times the sum of each group."""
    permute(b, x, integer(0), k, out)
    sums = b.add(out, b.mul(k, integer(4)))
    with loop(b, integer(0), b.sdiv(k, integer(32)), 1) as (group, _):
        at = b.add(x, b.mul(group, integer(128)))
        first, second = (load(b, b.add(at, integer(64 * i)), FLOAT, LANES) for i in (0, 1))
        total = horizontal_sum(b, b.fadd(first, second))
        store(b, b.fmul(total, ir.Constant(FLOAT, _CENTRE)), b.add(sums, b.mul(group, integer(4))))


def _scales(b: Builder, row: Value, group: Value, lanes: int) -> Value:
    """16 times the scales of `lanes` groups."""
    scales = from_half(b, load(b, b.add(row, b.mul(group, integer(2))), I16, lanes))
    return b.fmul(scales, splat(FLOAT, _FACTOR, lanes))


def _fractions(b: Builder, address: Value) -> list[list[Value]]:
    """The 64 weights at an address as f = 1 + q / 16: [group][0 even, 1 odd], 16 each."""
    pairs = b.zext(load(b, address, I16, LANES), vector(I32, LANES))
    mask, one = splat(I32, 0x780000, LANES), splat(I32, 0x3F800000, LANES)

    def fraction(bits: int) -> Value:
        return b.bitcast(b.or_(b.and_(b.shl(pairs, splat(I32, bits, LANES)), mask), one), vector(FLOAT, LANES))

    return [[fraction(19), fraction(11)], [fraction(15), fraction(7)]]


def dot4_q4(
    b: Builder, x: Value, k: Value, scratch: Value, rows: Sequence[Value], next_rows: Sequence[Value]
) -> list[Value]:
    n_groups = b.sdiv(k, integer(32))
    offset = q4_values_offset(b, k)
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
            scaled = _scales(b, row, group, lanes)
            store(b, scaled, scale_address(r, group))
            total = corrections[r][lanes]
            b.store(multiply_add(b, scaled, sums_of_x, b.load(total)), total)

    each_scales(b, integer(0), n_groups, scales)
    with loop(b, integer(0), n_groups, 2) as (group, _):
        at = b.add(offset, b.mul(group, integer(16)))
        x_at = b.add(x, b.mul(group, integer(128)))
        xs = [[load(b, b.add(x_at, integer(128 * g + 64 * odd)), FLOAT, LANES) for odd in (0, 1)] for g in (0, 1)]
        for r, row in enumerate(rows):
            ahead(at, r)
            fractions = _fractions(b, b.add(row, at))
            for g in (0, 1):
                product = multiply_add(b, fractions[g][1], xs[g][1], b.fmul(fractions[g][0], xs[g][0]))
                scale = load_scalar(b, scale_address(r, b.add(group, integer(g))), FLOAT)
                b.store(multiply_add(b, product, broadcast(b, scale, LANES), b.load(sums[r][g])), sums[r][g])
    dots = []
    for r in range(len(rows)):
        correction = b.fadd(*(horizontal_sum(b, b.load(corrections[r][lanes])) for lanes in (LANES, 2)))
        dots.append(b.fsub(horizontal_sum(b, b.fadd(b.load(sums[r][0]), b.load(sums[r][1]))), correction))
    return dots


def axpy4_q4(
    b: Builder, y: Value, factors: Sequence[Value], columns: tuple[Value, Value, Value], scratch: Value,
    rows: Sequence[Value], next_rows: Sequence[Value],
) -> None:  # fmt: skip
    j0, j1, k = columns
    n_groups = b.sdiv(k, integer(32))
    g0, g1 = b.sdiv(j0, integer(32)), b.sdiv(j1, integer(32))
    offset = q4_values_offset(b, k)
    begin, end = (b.add(offset, b.sdiv(j, integer(2))) for j in (j0, j1))

    def scale_address(r: int, group: Value) -> Value:
        return b.add(scratch, b.mul(b.add(b.mul(n_groups, integer(r)), group), integer(4)))

    def scales(group: Value, lanes: int) -> None:
        total = splat(FLOAT, 0.0, lanes)
        negated = splat(FLOAT, -_CENTRE, lanes)
        for r, row in enumerate(rows):
            scaled = b.fmul(_scales(b, row, group, lanes), broadcast(b, factors[r], lanes))
            store(b, scaled, scale_address(r, group))
            total = multiply_add(b, scaled, negated, total)
            prefetch(b, b.add(next_rows[r], b.mul(group, integer(2))))
        store(b, total, scale_address(4, group))

    def scale(r: int, group: Value) -> Value:
        return broadcast(b, load_scalar(b, scale_address(r, group), FLOAT), LANES)

    each_scales(b, g0, g1, scales)
    with loop(b, g0, g1, 2) as (group, _):
        at = b.add(offset, b.mul(group, integer(16)))
        y_at = [[b.add(y, b.mul(b.add(b.mul(group, integer(32)), integer(32 * g + 16 * odd)), integer(4)))
                 for odd in (0, 1)] for g in (0, 1)]  # fmt: skip
        groups = [b.add(group, integer(g)) for g in (0, 1)]
        totals = [[b.fadd(load(b, y_at[g][odd], FLOAT, LANES), scale(4, groups[g])) for odd in (0, 1)] for g in (0, 1)]
        for r, row in enumerate(rows):
            prefetch_ahead(b, row, next_rows[r], at, begin, end, distance=PREFETCH_BYTES)
            fractions = _fractions(b, b.add(row, at))
            for g in (0, 1):
                scaled = scale(r, groups[g])
                for odd in (0, 1):
                    totals[g][odd] = multiply_add(b, fractions[g][odd], scaled, totals[g][odd])
        for g in (0, 1):
            for odd in (0, 1):
                store(b, totals[g][odd], y_at[g][odd])


def decode_q4(b: Builder, row: Value, k: Value, j0: Value, j1: Value, out: Value) -> None:
    values = b.add(row, q4_values_offset(b, k))
    eight = splat(FLOAT, 8.0, LANES)
    with loop(b, j0, j1, 64) as (j, _):
        for half in (0, 1):
            nibbles = b.zext(load(b, b.add(values, b.add(b.sdiv(j, integer(2)), integer(16 * half))), I8, LANES),
                             vector(I32, LANES))  # fmt: skip
            for group, bits in enumerate(
                (b.and_(nibbles, splat(I32, 15, LANES)), b.lshr(nibbles, splat(I32, 4, LANES)))
            ):
                scale_at = b.add(row, b.mul(b.add(b.sdiv(j, integer(32)), integer(group)), integer(2)))
                scale = from_half(b, load(b, scale_at, I16, 1))
                scale = broadcast(b, b.extract_element(scale, ir.Constant(I32, 0)), LANES)
                w = b.fmul(b.fsub(b.sitofp(bits, vector(FLOAT, LANES)), eight), scale)
                column = b.add(b.sub(j, j0), integer(32 * group + 16 * half))
                store(b, w, b.add(out, b.mul(column, integer(4))))
