"""The steps of a batch, and the rings of io_uring, as compiled functions on plain arrays; numba is loaded for them.

A line of Python takes several times as long on a core that has just slept, or streamed gigabytes through its caches,
as in a loop; a batch of sixteen rows is a hundred such lines, and the device needs hardly longer. Compiled, the same
steps take a few microseconds. What each does is said, and done plainly, in `batch_steps`, `kernel_queue` and
`uring_queue`; system calls stay where they are. Does not know: locks, batches.
"""

# ruff: noqa: PLR0917 (compiled functions take plain scalars, in order)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numba
import numpy as np
from numba import extending, njit, types

from reference_engine.backends.numba_runtime import kernels_kept
from reference_engine.flash_io import aio_queue, uring_queue
from reference_engine.flash_io.batch_steps import REQUEST_MASK, TAG_BITS, Bytes, PlanLimits
from reference_engine.flash_io.kernel_queue import ENTRY_BYTES, Entries
from reference_engine.flash_io.request_plan import I64, IOVEC, RequestPlan

_WORDS: Final = ENTRY_BYTES // 8
_U32: Final = 0xFFFFFFFF
_intrinsic: Callable[[Callable[..., Any]], Any] = extending.intrinsic
_pointer_to: Any = types.CPointer
_array_at: Any = numba.carray  # type: ignore[attr-defined]
_FIELDS: Final = ("opcode", "offset", "address", "nbytes", "tag")


def _compiled(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """`njit` for one signature, with the disk cache: compiled, or loaded, when this module is."""

    def decorate(function: Callable[..., Any]) -> Any:
        with kernels_kept():
            return njit(signature, cache=True, error_model="numpy")(function)

    return decorate


@_intrinsic
def _pointer(_typing_context: Any, address: Any) -> Any:
    """An address as a pointer to 64-bit words."""

    def generate(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return _pointer_to(types.int64)(types.int64), generate


@_intrinsic
def _load(_typing_context: Any, address: Any) -> Any:
    """A 32-bit word that the kernel writes; what was written before it is seen after this."""

    def generate(context: Any, builder: Any, _signature: Any, values: Sequence[Any]) -> Any:
        pointer = builder.inttoptr(values[0], context.get_value_type(_pointer_to(types.uint32)))
        return builder.zext(builder.load_atomic(pointer, "acquire", 4), context.get_value_type(types.int64))

    return types.int64(types.int64), generate


@_intrinsic
def _store(_typing_context: Any, address: Any, value: Any) -> Any:
    """A 32-bit word that the kernel reads; it sees what was written or read before this."""

    def generate(context: Any, builder: Any, _signature: Any, values: Sequence[Any]) -> Any:
        word = context.get_value_type(types.uint32)
        pointer = builder.inttoptr(values[0], context.get_value_type(_pointer_to(types.uint32)))
        builder.store_atomic(builder.trunc(values[1], word), pointer, "release", 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@_compiled("b1(i8[::1], i8[::1], i8[::1], u1[::1], i8)")
def _are_allowed(offsets: Any, sizes: Any, positions: Any, buffer: Any, alignment: int) -> bool:
    """Whether ranges and their slots are as `BatchSteps.plan` says."""
    bits, last_end = 0, 0
    for i in range(len(offsets)):
        if sizes[i] <= 0 or offsets[i] < last_end or positions[i] < 0 or positions[i] > len(buffer) - sizes[i]:
            return False
        bits |= offsets[i] | sizes[i] | positions[i] + buffer.ctypes.data
        last_end = offsets[i] + sizes[i]
    return bits & (alignment - 1) == 0


@_compiled("UniTuple(i8, 2)(i8[::1], i8[::1], i8[::1], u1[::1], i8, i8, i8, i8, i8[:,::1], i8[::1], b1)")
def _cut(
    offsets: Any, sizes: Any, positions: Any, buffer: Any, gap_bytes: int, max_request_bytes: int,
    max_segments: int, scratch_address: int, requests: Any, segments: Any, is_written: bool,
) -> Any:  # fmt: skip
    """Number of requests and of segments; where asked to, write them as `_plan` says."""
    n_requests, n_segments = 0, 0
    begin, first_segment, n_pieces, window_end, last_end, next_address = 0, 0, 0, 0, 0, 0
    for i in range(len(offsets)):
        at, end = offsets[i], offsets[i] + sizes[i]
        if i == 0 or at - last_end > gap_bytes:
            window_end = at
        while at < end:
            if at >= window_end or n_pieces == max_segments // 2:  # a piece and the gap before it are two segments
                window_end += max_request_bytes if at >= window_end else 0  # a gap is shorter than a window
                begin, first_segment, n_pieces = at, n_segments, 0
                n_requests += 1
            elif at > last_end:
                if is_written:
                    segments[2 * n_segments], segments[2 * n_segments + 1] = scratch_address, at - last_end
                n_segments += 1
            stop, address = min(end, window_end), buffer.ctypes.data + positions[i] + at - offsets[i]
            if n_pieces and at == last_end and address == next_address:
                if is_written:
                    segments[2 * n_segments - 1] += stop - at
            else:
                if is_written:
                    segments[2 * n_segments], segments[2 * n_segments + 1] = address, stop - at
                n_segments += 1
            if is_written:
                k = n_requests - 1
                requests[0, k], requests[1, k] = begin, stop - begin
                requests[2, k], requests[3, k] = first_segment, n_segments - first_segment
            n_pieces += 1
            next_address = address + stop - at
            at = last_end = stop
    return n_requests, n_segments


@_compiled("UniTuple(i8, 2)(i8[::1], i8[::1], i8[::1], u1[::1], i8, i8, i8, i8, i8, i8[:,::1], i8[::1])")
def _plan(
    offsets: Any, sizes: Any, positions: Any, buffer: Any, alignment: int, gap_bytes: int, max_request_bytes: int,
    max_segments: int, scratch_address: int, requests: Any, segments: Any,
) -> Any:  # fmt: skip
    """Number of requests and of segments, -1 where a range is not allowed; they are written if there is room for all.

    Rows of `requests` are offset, nbytes, first segment and number of segments; a segment is address and nbytes.
    """
    if not _are_allowed(offsets, sizes, positions, buffer, alignment):
        return -1, -1
    knobs = gap_bytes, max_request_bytes, max_segments, scratch_address
    counts = _cut(offsets, sizes, positions, buffer, *knobs, requests, segments, False)
    if counts[0] <= requests.shape[1] and 2 * counts[1] <= len(segments):
        _cut(offsets, sizes, positions, buffer, *knobs, requests, segments, True)
    return counts


@_compiled("void(u8[::1], i8[::1], i8[::1], i8[::1], i8[::1], i8[::1], i8[::1], i8, i8, i8, i8)")
def _fill(
    words: Any, offsets: Any, nbytes: Any, segments: Any, first_segment: Any, n_segments: Any,
    fields: Any, first_tag: int, fd: int, read_opcode: int, readv_opcode: int,
) -> None:  # fmt: skip
    """See `fill_entries`; `fields` are the words that `_FIELDS` are in, the file beside the opcode."""
    for i in range(len(offsets)):
        entry, first = words[_WORDS * i : _WORDS * (i + 1)], first_segment[i]
        entry[:] = 0
        entry[fields[1]] = offsets[i]
        entry[fields[4]] = first_tag + i
        if n_segments[i] == 1:
            entry[fields[0]] = read_opcode | fd << 32
            entry[fields[2]] = segments[2 * first]
            entry[fields[3]] = nbytes[i]
        else:
            entry[fields[0]] = readv_opcode | fd << 32
            entry[fields[2]] = segments.ctypes.data + 16 * first
            entry[fields[3]] = n_segments[i]


@_compiled("i8(i8[::1], u8[::1], i8, i8)")
def _place(ring: Any, words: Any, start: int, stop: int) -> int:
    """Entries to the submission ring; returns the tail before them. `ring` is a `RingAddresses`."""
    sqes, tail_address, n_sq = ring[0], ring[1], ring[4]
    tail = _load(tail_address)
    places = _array_at(_pointer(sqes), (n_sq * _WORDS,), np.int64)
    for i in range(start, stop):
        place = (tail + i - start & n_sq - 1) * _WORDS
        for k in range(_WORDS):
            places[place + k] = words[_WORDS * i + k]
    _store(tail_address, tail + stop - start)
    return tail  # type: ignore[no-any-return]


@_compiled("void(i8[::1], i8[::1], i8[::1])")
def _take(ring: Any, tags: Any, results: Any) -> None:
    """As many tags and results as there is room for, off the completion ring."""
    cqes, head_address, n_cq = ring[2], ring[3], ring[5]
    head = _load(head_address)
    places = _array_at(_pointer(cqes), (2 * n_cq,), np.int64)
    for i in range(len(tags)):
        place = 2 * (head + i & n_cq - 1)
        tags[i] = places[place]
        results[i] = np.int32(places[place + 1] & _U32)
    _store(head_address, head + len(tags))


@_compiled("Tuple((i8, i8, b1))(i8[::1], i8[::1], i8, i8[::1])")
def _settle(tags: Any, results: Any, number: int, nbytes: Any) -> Any:
    """See `BatchSteps.settle`."""
    n, total, are_whole = 0, 0, True
    for i in range(len(tags)):
        if tags[i] >> TAG_BITS == number:
            wanted = nbytes[tags[i] & REQUEST_MASK]
            n, total, are_whole = n + 1, total + wanted, are_whole and results[i] == wanted
    return n, total, are_whole


class _Layout:
    """Entries of one kind of queue: their dtype, which of their words hold what, and the operations' codes."""

    def __init__(self, dtype: np.dtype[Any], read_opcode: int, readv_opcode: int) -> None:
        self.dtype = dtype
        self.fields = np.array([dtype.fields[name][1] // 8 for name in _FIELDS], np.int64)  # type: ignore[index]
        self.opcodes = read_opcode, readv_opcode

    def filled(self, plan: RequestPlan, first_tag: int, fd: int) -> Entries:
        """Entries for `plan`."""
        words = np.empty(_WORDS * len(plan.offsets), np.uint64)
        segments = plan.segments.view(np.int64)
        _fill(
            words, plan.offsets, plan.nbytes, segments, plan.first_segment, plan.n_segments,
            self.fields, first_tag, fd, *self.opcodes,
        )  # fmt: skip
        return words.view(self.dtype)


_SQES: Final = _Layout(uring_queue.SQE, uring_queue.READ, uring_queue.READV)
_IOCBS: Final = _Layout(aio_queue.IOCB, aio_queue.PREAD, aio_queue.PREADV)


class CompiledSteps:
    """`BatchSteps` by compiled functions."""

    def __init__(self, limits: PlanLimits) -> None:
        self._limits = (
            limits.alignment, limits.gap_bytes, limits.max_request_bytes, limits.max_segments, limits.scratch_address
        )  # fmt: skip
        self.settle = _settle

    def plan(self, offsets: I64, sizes: I64, positions: I64, buffer: Bytes) -> RequestPlan | None:
        """Plan the requests; see `BatchSteps.plan`."""
        n = n_requests = n_segments = len(offsets)
        while True:  # twice where ranges are cut, or gaps are read through
            n_room = max(n, n_requests, n_segments)
            requests, segments = np.empty((4, n_room), np.int64), np.empty(2 * n_room, np.int64)
            n_requests, n_segments = _plan(offsets, sizes, positions, buffer, *self._limits, requests, segments)
            if n_requests < 0:
                return None
            if max(n_requests, n_segments) <= n_room:
                break
        starts, nbytes, first_segment, n_of_request = requests[:, :n_requests]
        return RequestPlan(starts, nbytes, segments[: 2 * n_segments].view(IOVEC), first_segment, n_of_request)


class CompiledUringQueue(uring_queue.UringQueue):
    """A `UringQueue` whose rings and entries are filled and emptied by compiled functions."""

    def __init__(self, fd: int, depth: int) -> None:
        super().__init__(fd, depth)
        self._ring = np.array(self._addresses, np.int64)

    def prepare(self, plan: RequestPlan, first_tag: int) -> Entries:
        """Submission entries; see `KernelQueue.prepare`."""
        return _SQES.filled(plan, first_tag, self._fd)

    def take(self, n: int) -> tuple[I64, I64]:
        """Take what was completed; see `KernelQueue.take`."""
        tags, results = np.empty(n, np.int64), np.empty(n, np.int64)
        _take(self._ring, tags, results)
        return tags, results

    def close(self) -> None:
        """Close and unmap the ring; nothing is in flight."""
        del self._ring
        super().close()

    def _place(self, entries: Entries, start: int, stop: int) -> int:
        words = entries.base  # as `prepare` made them: another view would be a dozen calls
        tail: int = _place(self._ring, words, start, stop)
        return tail


class CompiledAioQueue(aio_queue.AioQueue):
    """An `AioQueue` whose control blocks are filled in by compiled functions."""

    def prepare(self, plan: RequestPlan, first_tag: int) -> Entries:
        """Control blocks; see `KernelQueue.prepare`."""
        return _IOCBS.filled(plan, first_tag, self._fd)
