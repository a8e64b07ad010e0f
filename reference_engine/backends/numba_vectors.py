"""Vector instructions for numba kernels: loads, multiply-adds, sums and prefetches, as LLVM code.

numba's loops do not always vectorise, and never prefetch; kernels therefore write their innermost loops as vector
code, which LLVM turns into whatever the host has (AVX-512, AVX2, NEON). No compiler is needed on the user's machine.

Sums are never reassociated: every addition has its place in the code, so that a result depends on the operands
alone. Addresses are 64-bit integers, offsets bytes.

Knows: LLVM's instructions. Does not know: encodings, matrices, threads.
"""

# ruff: noqa: PLR0917 (kernels and vector code take plain scalars, in order)

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, cast

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils as _cgutils
from numba.extending import intrinsic

from reference_engine.backends.numba_runtime import config, kernels_kept

Builder = Any
Value = Any
Emit = Callable[..., Value | None]

LANES: Final = 16

cgutils: Any = _cgutils  # numba annotates little of it

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()


def _target_features() -> frozenset[str]:
    """What the processor that numba compiles for can do: the host's features, or those of `NUMBA_CPU_FEATURES`."""
    if config.CPU_FEATURES is not None:
        return frozenset(name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+"))
    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


_FEATURES: Final = _target_features()
HAS_WIDE_REGISTERS: Final = "avx512f" in _FEATURES
HAS_BYTE_DOTS: Final = {"avx512f", "avx512bw", "avx512vnni"} <= _FEATURES
HAS_HALF: Final = "f16c" in _FEATURES or llvm.get_process_triple().startswith(("aarch64", "arm64"))


def compiled(function: Callable[..., Any]) -> Any:
    """`njit` with the disk cache and without the GIL; no fast-math, which would let the compiler reorder sums."""
    with kernels_kept():
        return njit(cache=True, nogil=True, error_model="numpy")(function)


def compiled_parallel(function: Callable[..., Any]) -> Any:
    """`compiled`, with `prange` loops spread over threads."""
    with kernels_kept():
        return njit(cache=True, nogil=True, error_model="numpy", parallel=True)(function)


def vector_code(result: Any = types.void) -> Callable[[Emit], Any]:
    """Turn ``emit(builder, tag, *integers)`` into ``f(tag, *integers)``, callable in kernels.

    `tag` is a scalar whose numba type, handed to `emit`, selects the code; its value is unused. The other arguments are
    int64. `emit` returns an LLVM value unless the result is void.
    """

    def decorate(emit: Emit) -> Any:
        names = list(inspect.signature(emit).parameters)[2:]

        def typed(_typing_context: Any, tag: Any, *_: Any) -> tuple[Any, Emit]:
            def generate(context: Any, builder: Builder, _signature: Any, values: Sequence[Value]) -> Value:
                emitted = emit(builder, tag, *values[1:])
                return context.get_dummy_value() if result is types.void else emitted

            return result(tag, *[types.int64] * len(names)), generate

        parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("context", "tag", *names)]
        typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        typed.__name__ = emit.__name__
        return intrinsic(typed)

    return decorate


def vector(element: Any, lanes: int) -> Any:
    """LLVM type of a vector."""
    return ir.VectorType(element, lanes)


def integer(value: int) -> Value:
    """Constant of 64 bits."""
    return ir.Constant(I64, value)


def splat(element: Any, value: float, lanes: int) -> Value:
    """Constant vector of equal elements."""
    return ir.Constant(vector(element, lanes), [value] * lanes)


def pointer(b: Builder, address: Value, element: Any) -> Value:
    """Address as a pointer."""
    return b.inttoptr(address, element.as_pointer())


def load(b: Builder, address: Value, element: Any, lanes: int) -> Value:
    """Load a vector from any address."""
    return b.load(pointer(b, address, vector(element, lanes)), align=1)


def load_scalar(b: Builder, address: Value, element: Any) -> Value:
    """Load one element from any address."""
    return b.load(pointer(b, address, element), align=1)


def store(b: Builder, value: Value, address: Value) -> None:
    """Store a scalar or vector at any address."""
    b.store(value, pointer(b, address, value.type), align=1)


def broadcast(b: Builder, scalar: Value, lanes: int) -> Value:
    """Vector with every element equal to a scalar."""
    undefined = ir.Constant(vector(scalar.type, lanes), ir.Undefined)
    first = b.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(first, undefined, splat(I32, 0, lanes))


def shuffle(b: Builder, first: Value, second: Value, order: Sequence[int]) -> Value:
    """Elements `order` of two vectors laid end to end."""
    return b.shuffle_vector(first, second, ir.Constant(vector(I32, len(order)), list(order)))


def multiply_add(b: Builder, x: Value, y: Value, z: Value) -> Value:
    """x * y + z, fused where the host can; always in this place of the sum."""
    kind = f"v{x.type.count}f32" if isinstance(x.type, ir.VectorType) else "f32"
    function_type = ir.FunctionType(x.type, [x.type] * 3)
    return b.call(cgutils.get_or_insert_function(b.module, function_type, f"llvm.fmuladd.{kind}"), [x, y, z])


def unary(b: Builder, name: str, x: Value) -> Value:
    """Call an LLVM intrinsic of one float vector, such as ``floor``."""
    function_type = ir.FunctionType(x.type, [x.type])
    return b.call(cgutils.get_or_insert_function(b.module, function_type, f"llvm.{name}.v{x.type.count}f32"), [x])


def horizontal_sum(b: Builder, value: Value) -> Value:
    """Sum of the elements, always by halves, so that equal vectors have equal sums wherever they appear."""
    while (lanes := value.type.count) > 1:
        low = shuffle(b, value, value, range(lanes // 2))
        high = shuffle(b, value, value, range(lanes // 2, lanes))
        value = b.fadd(low, high)
    return b.extract_element(value, ir.Constant(I32, 0))


def largest(b: Builder, value: Value) -> Value:
    """Largest element of a float vector, NaNs aside unless all are."""
    while (lanes := value.type.count) > 1:
        low, high = (shuffle(b, value, value, range(start, start + lanes // 2)) for start in (0, lanes // 2))
        value = b.select(b.fcmp_ordered(">", low, high), low, high)
    return b.extract_element(value, ir.Constant(I32, 0))


def rounded(b: Builder, x: Value) -> Value:
    """Floats within the range of int32 to the nearest, ties to even; what NaN becomes is not said."""
    lanes = x.type.count
    function_type = ir.FunctionType(vector(I32, lanes), [x.type])
    name = f"llvm.lrint.v{lanes}i32.v{lanes}f32"
    return b.call(cgutils.get_or_insert_function(b.module, function_type, name), [x])


def variable(b: Builder, initial: Value) -> Value:
    """Stack slot that LLVM turns into a register."""
    return cgutils.alloca_once_value(b, initial)


def loop(b: Builder, start: Value, stop: Value, step: int) -> AbstractContextManager[tuple[Value, Value]]:
    """``for i in range(start, stop, step)``; the first of the pair is i."""
    return cast(
        AbstractContextManager[tuple[Value, Value]],
        cgutils.for_range_slice(b, start, stop, integer(step), intp=I64),
    )


def round_down(b: Builder, value: Value, multiple: int) -> Value:
    """Largest multiple (a power of two) that is not above a value."""
    return b.and_(value, integer(-multiple))


def from_half(b: Builder, bits: Value) -> Value:
    """Bits of float16 to float32; without hardware by moving the exponent, which also covers subnormals and infinity.

    LLVM's own conversion would call a function that no library of the process has on hosts without F16C.
    """
    lanes = bits.type.count
    if HAS_HALF:
        return b.fpext(b.bitcast(bits, vector(HALF, lanes)), vector(FLOAT, lanes))
    wide = b.zext(bits, vector(I32, lanes))
    sign = b.shl(b.and_(wide, splat(I32, 0x8000, lanes)), splat(I32, 16, lanes))
    magnitude = b.shl(b.and_(wide, splat(I32, 0x7FFF, lanes)), splat(I32, 13, lanes))
    rebias = splat(FLOAT, 2.0**112, lanes)
    finite = b.bitcast(b.fmul(b.bitcast(magnitude, vector(FLOAT, lanes)), rebias), vector(I32, lanes))
    special = b.or_(magnitude, splat(I32, 0x7F800000, lanes))
    is_special = b.icmp_unsigned(">=", magnitude, splat(I32, 0x0F800000, lanes))
    return b.bitcast(b.or_(b.select(is_special, special, finite), sign), vector(FLOAT, lanes))


def to_half(b: Builder, x: Value) -> Value:
    """float32 to the bits of float16, ties to even, as numpy does; without hardware by integers.

    The exponents of normal numbers move by 112; subnormal ones are rounded by adding 0.5, whose last bit is theirs.
    """
    lanes = x.type.count
    if HAS_HALF:
        return b.bitcast(b.fptrunc(x, vector(HALF, lanes)), vector(I16, lanes))
    bits = b.bitcast(x, vector(I32, lanes))
    magnitude = b.and_(bits, splat(I32, 0x7FFFFFFF, lanes))
    is_odd = b.and_(b.lshr(magnitude, splat(I32, 13, lanes)), splat(I32, 1, lanes))
    normal = b.lshr(b.add(b.sub(magnitude, splat(I32, (112 << 23) - 0xFFF, lanes)), is_odd), splat(I32, 13, lanes))
    added = b.fadd(b.bitcast(magnitude, x.type), splat(FLOAT, 0.5, lanes))
    subnormal = b.sub(b.bitcast(added, bits.type), splat(I32, 126 << 23, lanes))
    result = b.select(b.icmp_unsigned("<", magnitude, splat(I32, 113 << 23, lanes)), subnormal, normal)
    is_large = b.icmp_unsigned(">=", magnitude, splat(I32, 143 << 23, lanes))
    result = b.select(is_large, splat(I32, 0x7C00, lanes), result)
    is_nan = b.icmp_unsigned(">", magnitude, splat(I32, 255 << 23, lanes))
    result = b.select(is_nan, splat(I32, 0x7E00, lanes), result)
    sign = b.and_(b.lshr(bits, splat(I32, 16, lanes)), splat(I32, 0x8000, lanes))
    return b.trunc(b.or_(result, sign), vector(I16, lanes))


def byte_dots(b: Builder, total: Value, unsigned_bytes: Value, signed_bytes: Value) -> Value:
    """Add to each of 16 int32 the products of four unsigned with four signed bytes; for `HAS_BYTE_DOTS` only.

    All three are vectors of 16 int32. LLVM 22 takes bytes, and upgrades this older form when it reads it.
    """
    function_type = ir.FunctionType(total.type, [total.type] * 3)
    function = cgutils.get_or_insert_function(b.module, function_type, "llvm.x86.avx512.vpdpbusd.512")
    return b.call(function, [total, unsigned_bytes, signed_bytes])


def prefetch(b: Builder, address: Value) -> None:
    """Ask for the cache line at an address; any address is harmless."""
    function_type = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    function = cgutils.get_or_insert_function(b.module, function_type, "llvm.prefetch.p0")
    read, keep, data = (ir.Constant(I32, value) for value in (0, 3, 1))
    b.call(function, [pointer(b, address, I8), read, keep, data])


def prefetch_ahead(
    b: Builder, row: Value, next_row: Value, offset: Value, begin: Value, end: Value, *, distance: int, n_lines: int = 1
) -> None:
    """Prefetch `distance` bytes ahead of `offset` in a row read from `begin` to `end`, then on in the next row.

    Rows shorter than that are prefetched from the same place in the next row.
    """
    length = b.sub(end, begin)
    reach = b.select(b.icmp_signed("<", length, integer(distance)), length, integer(distance))
    ahead = b.add(offset, reach)
    wrapped = b.sub(next_row, length)
    base = b.select(b.icmp_signed(">=", ahead, end), wrapped, row)
    for line in range(n_lines):
        prefetch(b, b.add(base, b.add(ahead, integer(64 * line))))
