"""Dot products of q8 and q4 rows where bytes can be multiplied (AVX-512 VNNI), as vector code.

A row is read at memory bandwidth only if few instructions are spent on a weight, so weights are never converted. What
they meet becomes integers of a common scale, cut into signed bytes, the limbs: one instruction multiplies 64 weights
with one limb, and sums are exact until they are scaled. Activations have 24 bits and one scale for q8, 16 bits and a
scale for each group of 32 for q4, where that adds an error of 2e-5. What is not finite makes its scale NaN.

The byte instruction takes unsigned weights: those of q8 are read 128 higher, those of q4 8 higher, which is taken off
the sums again. Weights in the high nibbles of q4 are not shifted down but taken 16 times as large.

Knows: q8 and q4 rows (SPEC.md section "Encodings"). Does not know: other encodings, matrices, threads.
"""

# ruff: noqa: PLR0917 (vector code takes plain values, in order)

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from llvmlite import ir

from reference_engine.backends.numba_vectors import (
    FLOAT,
    I8,
    I16,
    I32,
    LANES,
    Builder,
    Value,
    broadcast,
    byte_dots,
    from_half,
    horizontal_sum,
    integer,
    largest,
    load,
    load_scalar,
    loop,
    multiply_add,
    prefetch_ahead,
    round_down,
    rounded,
    shuffle,
    splat,
    store,
    unary,
    variable,
    vector,
)

PREFETCH_BYTES: Final = 1024

LINE_BYTES: Final = 64
_Q8_LIMBS: Final = 3
_Q4_LIMBS: Final = 2
LARGEST: Final = {2: 32639.0, 3: 8.3e6}  # n signed bytes hold up to 127 * (256**n - 1) / 255
SMALLEST_PEAK: Final = 1e-30
BYTES_OF_128: Final = -0x7F7F7F80
LOW_NIBBLES: Final = 0x0F0F0F0F
HIGH_NIBBLES: Final = -0x0F0F0F10
_PAIR: Final = 128
_PAIR_BYTES: Final = 2 * _Q4_LIMBS * LINE_BYTES


def constant(value: float) -> Value:
    return ir.Constant(FLOAT, value)


def scale_of(b: Builder, peak: Value, values: Iterable[Value], n_limbs: int) -> tuple[Value, Value]:
    """Inverse of the scale, and the scale: NaN unless all values (vectors) are finite."""
    smallest = constant(SMALLEST_PEAK)
    peak = b.select(b.fcmp_ordered(">", peak, smallest), peak, smallest)
    total = None
    for value in values:
        total = value if total is None else b.fadd(total, value)
    nothing = b.fmul(horizontal_sum(b, total), constant(0.0))
    limit = constant(LARGEST[n_limbs])
    return b.fdiv(limit, peak), b.fadd(b.fdiv(peak, limit), nothing)


def limbs_of(b: Builder, whole: Value, n_limbs: int) -> list[Value]:
    """Signed bytes of int32, highest first."""
    lanes = whole.type.count
    limbs = []
    for limb in range(n_limbs):
        limbs.append(b.trunc(whole, vector(I8, lanes)))
        if limb < n_limbs - 1:
            rounded_up = b.add(whole, splat(I32, 128, lanes))
            whole = b.ashr(rounded_up, splat(I32, 8, lanes))
    return limbs[::-1]


def combined(b: Builder, limb_sums: Sequence[Value]) -> Value:
    """float32 from the int32 sums of each limb, highest first."""
    lanes = limb_sums[0].type.count
    total = None
    for sums in limb_sums:
        value = b.sitofp(sums, vector(FLOAT, lanes))
        total = value if total is None else multiply_add(b, total, splat(FLOAT, 256.0, lanes), value)
    return total


def prepare_q8(b: Builder, x: Value, k: Value, out: Value) -> None:
    """Write k activations to `out`, of 3 * k + 256 bytes.

    That is, for each 64 [limb][64] bytes; then 128 times the sums of the limbs, [limb][16] int32; then the scale.
    """
    peaks, totals = variable(b, splat(FLOAT, 0.0, LANES)), variable(b, splat(FLOAT, 0.0, LANES))
    with loop(b, integer(0), k, LANES) as (j, _):
        value = load(b, b.add(x, b.mul(j, integer(4))), FLOAT, LANES)
        size, peak = unary(b, "fabs", value), b.load(peaks)
        b.store(b.select(b.fcmp_ordered(">", size, peak), size, peak), peaks)
        b.store(b.fadd(b.load(totals), size), totals)
    inverse, scale = scale_of(b, largest(b, b.load(peaks)), [b.load(totals)], _Q8_LIMBS)
    offsets = [variable(b, splat(I32, 0, LANES)) for _ in range(_Q8_LIMBS)]
    with loop(b, integer(0), k, LINE_BYTES) as (j, _):
        target = b.add(out, b.mul(j, integer(_Q8_LIMBS)))
        for i in range(LINE_BYTES // LANES):
            value = load(b, b.add(x, b.mul(b.add(j, integer(LANES * i)), integer(4))), FLOAT, LANES)
            whole = rounded(b, b.fmul(value, broadcast(b, inverse, LANES)))
            for limb, digits in enumerate(limbs_of(b, whole, _Q8_LIMBS)):
                store(b, digits, b.add(target, integer(LINE_BYTES * limb + LANES * i)))
        for limb, offset in enumerate(offsets):
            digits = load(b, b.add(target, integer(LINE_BYTES * limb)), I32, LANES)
            b.store(byte_dots(b, b.load(offset), splat(I32, BYTES_OF_128, LANES), digits), offset)
    tables = b.add(out, b.mul(k, integer(_Q8_LIMBS)))
    for limb, offset in enumerate(offsets):
        store(b, b.load(offset), b.add(tables, integer(LINE_BYTES * limb)))
    store(b, scale, b.add(tables, integer(LINE_BYTES * _Q8_LIMBS)))


def dot4_q8(b: Builder, x: Value, k: Value, rows: Sequence[Value], next_rows: Sequence[Value]) -> list[Value]:
    """Dot products of four rows with prepared activations."""
    begin, end = integer(0), b.add(k, integer(LINE_BYTES))
    flip = splat(I32, BYTES_OF_128, LANES)
    sums = [[variable(b, splat(I32, 0, LANES)) for _ in range(_Q8_LIMBS)] for _ in rows]
    for row, next_row in zip(rows, next_rows, strict=True):
        prefetch_ahead(b, row, next_row, begin, begin, end, distance=PREFETCH_BYTES)
    with loop(b, integer(0), k, LINE_BYTES) as (j, _):
        at, x_at = b.add(j, integer(LINE_BYTES)), b.add(x, b.mul(j, integer(_Q8_LIMBS)))
        limbs = [load(b, b.add(x_at, integer(LINE_BYTES * limb)), I32, LANES) for limb in range(_Q8_LIMBS)]
        for row, next_row, totals in zip(rows, next_rows, sums, strict=True):
            prefetch_ahead(b, row, next_row, at, begin, end, distance=PREFETCH_BYTES)
            weights = b.xor(load(b, b.add(row, at), I32, LANES), flip)
            for limb, total in zip(limbs, totals, strict=True):
                b.store(byte_dots(b, b.load(total), weights, limb), total)
    tables = b.add(x, b.mul(k, integer(_Q8_LIMBS)))
    offsets = [load(b, b.add(tables, integer(LINE_BYTES * limb)), I32, LANES) for limb in range(_Q8_LIMBS)]
    scale = load_scalar(b, b.add(tables, integer(LINE_BYTES * _Q8_LIMBS)), FLOAT)
    dots = []
    for row, totals in zip(rows, sums, strict=True):
        exact = [b.sub(b.load(total), offset) for total, offset in zip(totals, offsets, strict=True)]
        dots.append(b.fmul(horizontal_sum(b, combined(b, exact)), b.fmul(scale, load_scalar(b, row, FLOAT))))
    return dots


def _q4_tables(b: Builder, x: Value, k: Value) -> tuple[Value, Value]:
    """Addresses of the groups' scales and of what is taken off their sums, behind the limbs."""
    pairs = b.sdiv(b.add(k, integer(_PAIR - 1)), integer(_PAIR))
    scales = b.add(x, b.mul(pairs, integer(_PAIR_BYTES)))
    return scales, b.add(scales, b.sdiv(k, integer(8)))


def prepare_q4(b: Builder, x: Value, k: Value, out: Value) -> None:
    """Write k activations to `out`, of 2.25 * k + 256 bytes.

    That is, for each 128 [low or high nibble][limb][64] bytes, where the 64 are the 32 of one block and the 32 of the
    next, as the nibbles of 64 bytes of a row lie; then the scale of each group, float32; then, of each group, 8 times
    the sum over the scale. Groups in high nibbles, which are not shifted down, have a 16th of the scale.
    """
    scales, sums = _q4_tables(b, out, k)
    with loop(b, integer(0), b.sdiv(k, integer(64)), 1) as (block, _):
        for high in (0, 1):
            group = b.add(b.mul(block, integer(2)), integer(high))
            at = b.add(x, b.mul(group, integer(128)))
            halves = [load(b, b.add(at, integer(64 * i)), FLOAT, LANES) for i in (0, 1)]
            first, second = (unary(b, "fabs", half) for half in halves)
            peak = largest(b, b.select(b.fcmp_ordered(">", first, second), first, second))
            inverse, scale = scale_of(b, peak, (first, second), _Q4_LIMBS)
            target = b.add(out, b.mul(b.lshr(block, integer(1)), integer(_PAIR_BYTES)))
            target = b.add(target, b.mul(b.and_(block, integer(1)), integer(32)))
            target = b.add(target, integer(high * _Q4_LIMBS * LINE_BYTES))
            total = splat(I32, 0, LANES)
            for i, half in enumerate(halves):
                whole = rounded(b, b.fmul(half, broadcast(b, inverse, LANES)))
                total = b.add(total, whole)
                for limb, digits in enumerate(limbs_of(b, whole, _Q4_LIMBS)):
                    store(b, digits, b.add(target, integer(LINE_BYTES * limb + LANES * i)))
            store(b, b.fmul(scale, constant(1 / 16 if high else 1)), b.add(scales, b.mul(group, integer(4))))
            eights = horizontal_sum(b, b.sitofp(total, vector(FLOAT, LANES)))
            store(b, b.fmul(eights, constant(8.0 * 16**high)), b.add(sums, b.mul(group, integer(4))))


def dot4_q4(
    b: Builder, x: Value, k: Value, scratch: Value, rows: Sequence[Value], next_rows: Sequence[Value]
) -> list[Value]:
    """Dot products of four rows with prepared activations; `scratch` is float32 [k / 8]."""
    n_groups = b.sdiv(k, integer(32))
    offset = q4_values_offset(b, k)
    begin, end = integer(0), b.add(offset, b.sdiv(k, integer(2)))
    x_scales, x_sums = _q4_tables(b, x, k)
    corrections = [{lanes: variable(b, splat(FLOAT, 0.0, lanes)) for lanes in (LANES, 2)} for _ in rows]
    sums = [[variable(b, splat(FLOAT, 0.0, LANES)) for _ in (0, 1)] for _ in rows]

    def scale_address(r: int, group: Value) -> Value:
        return b.add(scratch, b.mul(b.add(b.mul(n_groups, integer(r)), group), integer(4)))

    def ahead(at: Value, r: int) -> None:
        prefetch_ahead(b, rows[r], next_rows[r], at, begin, end, distance=PREFETCH_BYTES)

    def scales(group: Value, lanes: int) -> None:
        at = b.mul(group, integer(4))
        x_scale, x_sum = (load(b, b.add(table, at), FLOAT, lanes) for table in (x_scales, x_sums))
        for r, row in enumerate(rows):
            ahead(b.mul(group, integer(2)), r)
            scaled = b.fmul(from_half(b, load(b, b.add(row, b.mul(group, integer(2))), I16, lanes)), x_scale)
            store(b, scaled, scale_address(r, group))
            b.store(multiply_add(b, scaled, x_sum, b.load(corrections[r][lanes])), corrections[r][lanes])

    each_scales(b, integer(0), n_groups, scales)

    def accumulate(group: Value, n_blocks: int) -> None:
        """One or two blocks, from an even group on; a second block that is not there is zero."""
        at = b.add(offset, b.mul(group, integer(16)))
        x_at = b.add(x, b.mul(b.lshr(group, integer(2)), integer(_PAIR_BYTES)))
        limbs = [load(b, b.add(x_at, integer(LINE_BYTES * i)), I32, LANES) for i in range(2 * _Q4_LIMBS)]
        for r, row in enumerate(rows):
            ahead(at, r)
            values = load(b, b.add(row, at), I32, 8 * n_blocks)
            row_scales = load(b, scale_address(r, group), FLOAT, 2 * n_blocks)
            if n_blocks == 1:
                values = shuffle(b, values, splat(I32, 0, 8), range(LANES))
                row_scales = shuffle(b, row_scales, splat(FLOAT, 0.0, 2), range(4))
            for high, mask in enumerate((LOW_NIBBLES, HIGH_NIBBLES)):
                nibbles = b.and_(values, splat(I32, mask, LANES))
                total = splat(I32, 0, LANES)
                for limb in limbs[_Q4_LIMBS * high : _Q4_LIMBS * (high + 1)]:
                    total = byte_dots(b, b.shl(total, splat(I32, 8, LANES)), nibbles, limb)
                spread = shuffle(b, row_scales, row_scales, [high] * 8 + [2 + high] * 8)
                product = b.sitofp(total, vector(FLOAT, LANES))
                b.store(multiply_add(b, product, spread, b.load(sums[r][high])), sums[r][high])

    whole = round_down(b, n_groups, 4)
    with loop(b, integer(0), whole, 4) as (group, _):
        accumulate(group, 2)
    with loop(b, whole, n_groups, 2) as (group, _):
        accumulate(group, 1)
    dots = []
    for r in range(len(rows)):
        correction = b.fadd(*(horizontal_sum(b, b.load(corrections[r][lanes])) for lanes in (LANES, 2)))
        dots.append(b.fsub(horizontal_sum(b, b.fadd(b.load(sums[r][0]), b.load(sums[r][1]))), correction))
    return dots


def q4_values_offset(b: Builder, k: Value) -> Value:
    """Bytes before the nibbles of a row: two for each group of 32, to a multiple of 64."""
    return round_down(b, b.add(b.sdiv(k, integer(16)), integer(63)), 64)


def each_scales(b: Builder, g0: Value, g1: Value, body: Any) -> None:
    """Call ``body(group, lanes)`` for all groups g0 to g1, an even number, 16 or 2 at a time."""
    whole = b.add(g0, round_down(b, b.sub(g1, g0), LANES))
    for start, stop, lanes in ((g0, whole, LANES), (whole, g1, 2)):
        with loop(b, start, stop, lanes) as (group, _):
            body(group, lanes)
