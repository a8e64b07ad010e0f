"""What io_uring and Linux native AIO have in common, requests in, results out."""

from __future__ import annotations

import errno
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from reference_engine.flash_io.request_plan import I64, RequestPlan

TRANSIENT: Final = frozenset({errno.EINTR, errno.EAGAIN, errno.EBUSY})
ENTRY_BYTES: Final = 64  # of struct io_uring_sqe and of struct iocb
Entries = npt.NDArray[Any]  # [n], structured, ENTRY_BYTES each


class KernelQueue(Protocol):
    """A queue to the kernel. One thread at a time may push, and one wait or take; these may be two threads.

    An exception that a signal's handler raises may leave any of the calls at any point. `wait` leaves everything as
    it was then; after the others the queue is in order again when `clear` was called.
    """

    depth: int

    def prepare(self, plan: RequestPlan, first_tag: int) -> Entries:
        """The requests of `plan` as the kernel takes them, tagged `first_tag` and up; above 0. From any thread."""
        ...

    def push(self, entries: Entries, start: int, stop: int) -> int:
        """Begin requests ``start:stop``; returns how many were accepted.

        The caller has no more than `depth` in flight. Fewer than asked for are accepted where the kernel is short of
        something for a moment.

        Raises
        ------
        OSError
            If the first request is refused for good.
        """
        ...

    def wait(self, at_least: int) -> int:
        """Wait for `at_least` results; returns how many there are to take. A signal may end it earlier.

        Raises
        ------
        OSError
            If waiting itself fails; what is in flight then is not known.
        """
        ...

    def take(self, n: int) -> tuple[I64, I64]:
        """Tags and results (bytes, or -errno) of `n` requests that have ended, as `wait` said."""
        ...

    def clear(self) -> None:
        """Wait until nothing is in flight and forget all results, whatever was interrupted before.

        Raises
        ------
        OSError
            If that fails; what is in flight then is not known.
        """
        ...

    def close(self) -> None:
        """Give the queue up; nothing is in flight."""
        ...


def fill_entries(
    entries: Entries, plan: RequestPlan, first_tag: int, *, fd: int, read_opcode: int, readv_opcode: int
) -> None:
    """Fill in what the two structures have in common: a plain read where a request has one segment, else a readv."""
    entries["fd"] = fd
    entries["tag"] = np.arange(first_tag, first_tag + len(plan), dtype=np.uint64)
    entries["offset"] = plan.offsets
    entries["address"] = plan.segments["address"][plan.first_segment]
    entries["nbytes"] = plan.nbytes
    entries["opcode"] = read_opcode
    lists = np.flatnonzero(plan.n_segments > 1)
    if lists.size:
        entries["opcode"][lists] = readv_opcode
        entries["address"][lists] = plan.segments.ctypes.data + plan.segments.itemsize * plan.first_segment[lists]
        entries["nbytes"][lists] = plan.n_segments[lists]
