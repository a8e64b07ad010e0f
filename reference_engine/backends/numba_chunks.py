"""Sums of q8 and q4 rows times factors where bytes can be multiplied (AVX-512 VNNI), as vector code.

Up to `CHUNK_ROWS` rows are added at once. Their factors, times the scales of the rows, become integers of a common
scale, cut into signed bytes as in `numba_limbs`: for q8, 24 bits and one scale for the chunk; for q4, 16 bits and one
scale for each group of columns. The bytes of four rows are laid side by side, so that one instruction adds up four rows
for 16 columns. Integer sums stay in registers until a line of all rows has been read; then they are added to float32
sums that are in the order in which they come, until `add_q8` or `add_q4` puts them in the order of the columns.

Weights in the high nibbles of q4 are not shifted down but taken 16 times as large.

Knows: q8 and q4 rows (SPEC.md section "Encodings"). Does not know: other encodings, matrices, threads.
"""

# ruff: noqa: PLR0917 (vector code takes plain values, in order)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from llvmlite import ir

from reference_engine.backends.numba_limbs import (
    BYTES_OF_128,
    HIGH_NIBBLES,
    LARGEST,
    LINE_BYTES,
    LOW_NIBBLES,
    SMALLEST_PEAK,
    combined,
    constant,
    each_scales,
    limbs_of,
    q4_values_offset,
    scale_of,
)
from reference_engine.backends.numba_vectors import (
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    LANES,
    Builder,
    Value,
    broadcast,
    byte_dots,
    from_half,
    integer,
    load,
    load_scalar,
    loop,
    multiply_add,
    prefetch,
    round_down,
    rounded,
    shuffle,
    splat,
    store,
    unary,
    variable,
    vector,
)

CHUNK_ROWS: Final = 16
PREFETCH_BYTES: Final = 512

_Q8_LIMBS: Final = 3
_Q4_LIMBS: Final = 2
_Q8_OFFSET: Final = 128
_TO_WHOLE: Final = 1.5 * 2**23 + 128  # added to a float32, leaves its nearest integer plus 128 in the low 16 bits
_BITS_OF_TO_WHOLE: Final = 0x4B400080


def _side_by_side(b: Builder, rows: Sequence[Value]) -> list[Value]:
    """Four vectors of 64 bytes as four of [16][4 rows]: vector i, part p, element d is byte 16 * p + 4 * i + d."""

    def interleaved(first: Value, second: Value, n_bytes: int) -> list[Value]:
        """Low and high halves of each 16 bytes of two vectors, `n_bytes` of one and of the other in turn."""
        element = I8 if n_bytes == 1 else I16
        n, part = LINE_BYTES // n_bytes, LANES // n_bytes
        first, second = (b.bitcast(v, vector(element, n)) for v in (first, second))
        halves = []
        for half in (0, part // 2):
            places = [p + half + i for p in range(0, n, part) for i in range(part // 2)]
            halves.append(shuffle(b, first, second, [i for place in places for i in (place, n + place)]))
        return halves

    low_ab, high_ab = interleaved(rows[0], rows[1], 1)
    low_cd, high_cd = interleaved(rows[2], rows[3], 1)
    four = [*interleaved(low_ab, low_cd, 2), *interleaved(high_ab, high_cd, 2)]
    return [b.bitcast(v, vector(I32, LANES)) for v in four]


def _in_order(b: Builder, vectors: Sequence[Value]) -> list[Value]:
    """Undo the order of `_side_by_side`: part p of vector i becomes part i of vector p."""

    def joined(first: Value, second: Value, parts: tuple[int, int]) -> Value:
        return shuffle(b, first, second, [16 * v + 4 * p + i for v in (0, 1) for p in parts for i in range(4)])

    v0, v1, v2, v3 = vectors
    low, high = [joined(v0, v1, (0, 1)), joined(v2, v3, (0, 1))], [joined(v0, v1, (2, 3)), joined(v2, v3, (2, 3))]
    result = []
    for pair in (low, high):
        result += [joined(pair[0], pair[1], (0, 2)), joined(pair[0], pair[1], (1, 3))]
    return result


class _Chunk:
    """The rows of one call of `axpy_*`: up to `CHUNK_ROWS`, a multiple of four, by a list of their addresses."""

    def __init__(
        self, b: Builder, rows: Value, next_rows: Value, n: Value, begin: Value, end: Value, tables: Value | None = None
    ) -> None:
        self._b, self._rows, self._next_rows, self._n = b, rows, next_rows, n
        self._begin, self._end = begin, end

    def each_quad(self, at: Value, n_bytes: int, body: Any) -> None:
        """Call ``body(r, side by side bytes)`` for each four rows, with `n_bytes` of theirs from offset `at`."""
        b = self._b
        length = b.sub(self._end, self._begin)
        reach = b.select(b.icmp_signed("<", length, integer(PREFETCH_BYTES)), length, integer(PREFETCH_BYTES))
        ahead = b.add(at, reach)
        is_past = b.icmp_signed(">=", ahead, self._end)
        far_rows = b.select(is_past, self._next_rows, self._rows)
        far = b.select(is_past, b.add(b.sub(ahead, self._end), self._begin), ahead)
        with loop(b, integer(0), self._n, 4) as (r, _):
            vectors = []
            for i in range(4):
                place = b.mul(b.add(r, integer(i)), integer(8))
                prefetch(b, b.add(load_scalar(b, b.add(far_rows, place), I64), far))
                row = load_scalar(b, b.add(self._rows, place), I64)
                value = load(b, b.add(row, at), I8, n_bytes)
                if n_bytes < LINE_BYTES:
                    value = shuffle(b, value, splat(I8, 0, n_bytes), range(LINE_BYTES))
                vectors.append(value)
            body(r, _side_by_side(b, vectors))


def axpy_q8(
    b: Builder, y: Value, columns: tuple[Value, Value], scratch: Value,
    rows: Value, next_rows: Value, factors: Value, n: Value,
) -> None:  # fmt: skip
    """Add n rows times their factors to columns of y, which are in the order of `_side_by_side`; see `add_q8`.

    `scratch` is 4 * 16 * 4 bytes.
    """
    j0, j1 = columns
    products = scratch
    peak, total = variable(b, constant(0.0)), variable(b, constant(0.0))
    with loop(b, integer(0), n, 1) as (r, _):
        at = b.mul(r, integer(4))
        row = load_scalar(b, b.add(rows, b.mul(r, integer(8))), I64)
        prefetch(b, load_scalar(b, b.add(next_rows, b.mul(r, integer(8))), I64))
        product = b.fmul(load_scalar(b, b.add(factors, at), FLOAT), load_scalar(b, row, FLOAT))
        store(b, product, b.add(products, at))
        size = b.select(b.fcmp_ordered("<", product, constant(0.0)), b.fneg(product), product)
        b.store(b.select(b.fcmp_ordered(">", size, b.load(peak)), size, b.load(peak)), peak)
        b.store(b.fadd(b.load(total), size), total)
    inverse, scale = scale_of(b, b.load(peak), [broadcast(b, b.load(total), 1)], _Q8_LIMBS)
    tables = [b.add(scratch, integer(LINE_BYTES * (1 + limb))) for limb in range(_Q8_LIMBS)]
    offsets = [variable(b, splat(I32, 0, 4)) for _ in tables]
    with loop(b, integer(0), n, 4) as (r, _):
        at = b.mul(r, integer(4))
        quad = rounded(b, b.fmul(load(b, b.add(products, at), FLOAT, 4), broadcast(b, inverse, 4)))
        for limb, digits in enumerate(limbs_of(b, quad, _Q8_LIMBS)):
            store(b, digits, b.add(tables[limb], r))
            b.store(b.add(b.load(offsets[limb]), b.sext(digits, vector(I32, 4))), offsets[limb])
    starts = []
    for offset in offsets:
        taken = b.load(offset)
        lane_sum = None
        for i in range(4):
            lane = b.extract_element(taken, ir.Constant(I32, i))
            lane_sum = lane if lane_sum is None else b.add(lane_sum, lane)
        starts.append(broadcast(b, b.mul(lane_sum, ir.Constant(I32, -_Q8_OFFSET)), LANES))
    chunk = _Chunk(b, rows, next_rows, n, b.add(j0, integer(LINE_BYTES)), b.add(j1, integer(LINE_BYTES)))
    flip = splat(I32, BYTES_OF_128, LANES)
    with loop(b, j0, j1, LINE_BYTES) as (j, _):
        sums = [[variable(b, start) for start in starts] for _ in range(4)]

        def accumulate(r: Value, weights: Sequence[Value], sums: Any = sums) -> None:
            limbs = [broadcast(b, load_scalar(b, b.add(table, r), I32), LANES) for table in tables]
            for value, totals in zip(weights, sums, strict=True):
                flipped = b.xor(value, flip)
                for limb, total in zip(limbs, totals, strict=True):
                    b.store(byte_dots(b, b.load(total), flipped, limb), total)

        chunk.each_quad(b.add(j, integer(LINE_BYTES)), LINE_BYTES, accumulate)
        for i, totals in enumerate(sums):
            value = combined(b, [b.load(total) for total in totals])
            at = b.add(y, b.mul(b.add(j, integer(LANES * i)), integer(4)))
            store(b, multiply_add(b, value, broadcast(b, scale, LANES), load(b, at, FLOAT, LANES)), at)


def axpy_q4(
    b: Builder, y: Value, columns: tuple[Value, Value, Value], scratch: Value,
    rows: Value, next_rows: Value, factors: Value, n: Value,
) -> None:  # fmt: skip
    """Add n rows times their factors to columns of y, which are in the order of `_side_by_side`; see `add_q4`.

    A line of y is 128 columns, those of low nibbles first; k may end in the middle of one, y may not. `scratch` is
    float32 [(2 + 2 * 4) * k / 32 + 256]. It holds, for each group, the scale; then 8 times the factors' sum; then the
    limbs of each four rows; then factors times scales, for 16 groups at a time.
    """
    j0, j1, k = columns
    n_groups = b.sdiv(k, integer(32))
    g0, g1 = b.sdiv(j0, integer(32)), b.sdiv(j1, integer(32))
    offset = q4_values_offset(b, k)
    begin, end = (b.add(offset, b.sdiv(j, integer(2))) for j in (j0, j1))

    products = b.add(scratch, b.mul(n_groups, integer(4 * (2 + CHUNK_ROWS // 2))))

    def table(index: Value, group: Value) -> Value:
        return b.add(scratch, b.mul(b.add(b.mul(n_groups, index), group), integer(4)))

    def factors_of(group: Value, lanes: int) -> None:
        at = b.mul(group, integer(2))
        peaks, totals = variable(b, splat(FLOAT, SMALLEST_PEAK, lanes)), variable(b, splat(FLOAT, 0.0, lanes))
        with loop(b, integer(0), n, 1) as (r, _):
            place = b.mul(r, integer(8))
            row = load_scalar(b, b.add(rows, place), I64)
            factor = load_scalar(b, b.add(factors, b.mul(r, integer(4))), FLOAT)
            product = b.fmul(from_half(b, load(b, b.add(row, at), I16, lanes)), broadcast(b, factor, lanes))
            store(b, product, b.add(products, b.mul(r, integer(LINE_BYTES))))
            size, peak = unary(b, "fabs", product), b.load(peaks)
            b.store(b.select(b.fcmp_ordered(">", size, peak), size, peak), peaks)
            b.store(b.fadd(b.load(totals), size), totals)
            prefetch(b, b.add(load_scalar(b, b.add(next_rows, place), I64), at))
        peak = b.load(peaks)
        limit = splat(FLOAT, LARGEST[_Q4_LIMBS], lanes)
        inverse = b.fdiv(limit, peak)
        nothing = b.fmul(b.load(totals), splat(FLOAT, 0.0, lanes))
        store(b, b.fadd(b.fdiv(peak, limit), nothing), table(integer(0), group))
        sums = variable(b, splat(I32, 0, lanes))
        evens = splat(I32, 0x00FF00FF, lanes)
        with loop(b, integer(0), n, 4) as (r, _):
            whole = []
            for i in range(4):
                product = load(b, b.add(products, b.mul(b.add(r, integer(i)), integer(LINE_BYTES))), FLOAT, lanes)
                shifted = multiply_add(b, product, inverse, splat(FLOAT, _TO_WHOLE, lanes))
                whole.append(b.bitcast(shifted, vector(I32, lanes)))
            total = b.add(b.add(whole[0], whole[1]), b.add(whole[2], whole[3]))
            b.store(b.add(b.load(sums), total), sums)
            # 16-bit pairs of rows 0 and 2, and of rows 1 and 3: their bytes interleave to the order of the rows. With
            # 128 added, the high byte is the high limb, and the low byte 128 more than the low limb.
            even, odd = (
                b.or_(b.and_(whole[i], splat(I32, 0xFFFF, lanes)), b.shl(whole[i + 2], splat(I32, 16, lanes)))
                for i in (0, 1)
            )
            low = b.or_(b.and_(even, evens), b.and_(b.shl(odd, splat(I32, 8, lanes)), b.not_(evens)))
            high = b.or_(b.and_(b.lshr(even, splat(I32, 8, lanes)), evens), b.and_(odd, b.not_(evens)))
            index = b.add(b.lshr(r, integer(1)), integer(2))
            store(b, high, table(index, group))
            store(b, b.xor(low, splat(I32, BYTES_OF_128, lanes)), table(b.add(index, integer(1)), group))
        surplus = b.mul(b.trunc(n, I32), ir.Constant(I32, _BITS_OF_TO_WHOLE))
        total = b.sub(b.load(sums), broadcast(b, surplus, lanes))
        store(b, b.mul(total, splat(I32, -8, lanes)), table(integer(1), group))

    each_scales(b, g0, g1, factors_of)
    chunk = _Chunk(b, rows, next_rows, n, begin, end)

    def add_line(group: Value, n_blocks: int) -> None:
        def spread(address: Value, element: Any, nibble: int) -> Value:
            four = load(b, address, element, 2 * n_blocks)
            order = [nibble] * 8 + ([2 + nibble] * 8 if n_blocks == 2 else [nibble] * 8)
            return shuffle(b, four, four, order)

        def start(nibble: int) -> Value:
            value = spread(table(integer(1), group), I32, nibble)
            return b.shl(value, splat(I32, 4, LANES)) if nibble else value

        starts = [start(nibble) for nibble in (0, 1)]
        sums = [[[variable(b, splat(I32, 0, LANES)), variable(b, start)] for _ in range(4)] for start in starts]

        def accumulate(r: Value, weights: Sequence[Value]) -> None:
            index = b.add(b.lshr(r, integer(1)), integer(2))
            for nibble, mask in enumerate((LOW_NIBBLES, HIGH_NIBBLES)):
                limbs = [spread(table(b.add(index, integer(limb)), group), I32, nibble) for limb in range(_Q4_LIMBS)]
                for value, totals in zip(weights, sums[nibble], strict=True):
                    nibbles = b.and_(value, splat(I32, mask, LANES))
                    for limb, total in zip(limbs, totals, strict=True):
                        b.store(byte_dots(b, b.load(total), nibbles, limb), total)

        chunk.each_quad(b.add(offset, b.mul(group, integer(16))), 32 * n_blocks, accumulate)
        for nibble in (0, 1):
            scale = spread(table(integer(0), group), FLOAT, nibble)
            if nibble:
                scale = b.fmul(scale, splat(FLOAT, 1 / 16, LANES))
            for i, (high, low) in enumerate(sums[nibble]):
                exact = b.add(b.shl(b.load(high), splat(I32, 8, LANES)), b.load(low))
                at = b.add(y, b.add(b.mul(group, integer(128)), integer(LINE_BYTES * (4 * nibble + i))))
                value = b.sitofp(exact, vector(FLOAT, LANES))
                store(b, multiply_add(b, value, scale, load(b, at, FLOAT, LANES)), at)

    whole = b.add(g0, round_down(b, b.sub(g1, g0), 4))
    with loop(b, g0, whole, 4) as (group, _):
        add_line(group, 2)
    with loop(b, whole, g1, 2) as (group, _):
        add_line(group, 1)


def add_q8(b: Builder, sums: Value, columns: tuple[Value, Value], out: Value) -> None:
    """Add columns of what `axpy_q8` summed to those of `out`."""
    with loop(b, *columns, LINE_BYTES) as (j, _):
        at = b.mul(j, integer(4))
        vectors = [load(b, b.add(sums, b.add(at, integer(64 * i))), FLOAT, LANES) for i in range(4)]
        for i, value in enumerate(_in_order(b, vectors)):
            place = b.add(out, b.add(at, integer(64 * i)))
            store(b, b.fadd(load(b, place, FLOAT, LANES), value), place)


def add_q4(b: Builder, sums: Value, columns: tuple[Value, Value], out: Value) -> None:
    """Add columns of what `axpy_q4` summed to those of `out`."""
    j0, j1 = columns

    def add_line(j: Value, n_blocks: int) -> None:
        at = b.mul(j, integer(4))
        for nibble in (0, 1):
            places = [b.add(at, integer(64 * (4 * nibble + i))) for i in range(4)]
            ordered = _in_order(b, [load(b, b.add(sums, place), FLOAT, LANES) for place in places])
            for i, value in enumerate(ordered[: 2 * n_blocks]):
                place = b.add(out, b.add(at, integer(128 * nibble + 256 * (i // 2) + 64 * (i % 2))))
                store(b, b.fadd(load(b, place, FLOAT, LANES), value), place)

    whole = b.add(j0, round_down(b, b.sub(j1, j0), 2 * LINE_BYTES))
    with loop(b, j0, whole, 2 * LINE_BYTES) as (j, _):
        add_line(j, 2)
    with loop(b, whole, j1, LINE_BYTES) as (j, _):
        add_line(j, 1)
