"""io_uring by raw system calls: submission entries are one numpy array, and a batch is filled with a few stores.

Linux 5.6 or later. Needs no library and no compiler. What ends is posted whenever a thread that began requests enters
the kernel (IORING_SETUP_COOP_TASKRUN, 5.19), or at once; in either case perhaps on another core than it is read on,
which only a processor with ordered loads (x86) lets us do from Python. Elsewhere AIO serves as well: it hands results
over in a system call.

Registered buffers would save up to a third of the kernel's time and bring no speed; they pin the whole arena, which
few users may do. A registered file and a ring bound to one thread (DEFER_TASKRUN) brought nothing.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import Final, NamedTuple

import numpy as np

from reference_engine.flash_io import linux_syscalls
from reference_engine.flash_io.kernel_queue import ENTRY_BYTES, TRANSIENT, Entries, fill_entries
from reference_engine.flash_io.request_plan import I64, RequestPlan

SQE: Final = np.dtype(
    {
        "names": ["opcode", "fd", "offset", "address", "nbytes", "tag"],
        "formats": ["u1", "<i4", "<u8", "<u8", "<u4", "<u8"],
        "offsets": [0, 4, 8, 16, 24, 32],
        "itemsize": ENTRY_BYTES,
    }
)
_SQE_WORDS: Final = ENTRY_BYTES // 8
_CQE: Final = np.dtype([("tag", "<u8"), ("result", "<i4"), ("flags", "<u4")])
READV, READ = 1, 22
_ENTER_GETEVENTS: Final = 1
_MAP_SQES: Final = 0x10000000

_COOP_TASKRUN: Final = 1 << 8
_SETUPS: Final = (_COOP_TASKRUN, 0) if linux_syscalls.MACHINE == "x86_64" else ()
_FEATURES: Final = 1 << 0 | 1 << 1 | 1 << 3  # SINGLE_MMAP, NODROP, RW_CUR_POS (came with IORING_OP_READ)

# Words of struct io_uring_params, and of the offset tables in it.
_N_PARAMS, _SQ_ENTRIES, _CQ_ENTRIES, _FLAGS, _FEATURE_BITS, _SQ_OFFSETS, _CQ_OFFSETS = 30, 0, 1, 2, 5, 10, 20
_HEAD, _TAIL, _SQ_ARRAY, _CQES = 0, 1, 6, 5


class RingAddresses(NamedTuple):
    """Where the rings lie in memory, and how many entries they have. Valid until the queue is closed."""

    sqes: int
    sq_tail: int
    cqes: int
    cq_head: int
    n_sqes: int
    n_cqes: int


class UringQueue:
    """A `KernelQueue` of `depth` requests or more to the file `fd`.

    Raises
    ------
    OSError
        If the kernel has no io_uring, too old a one, or it is forbidden here.
    """

    def __init__(self, fd: int, depth: int) -> None:
        self._fd = fd
        params = np.zeros(_N_PARAMS, np.uint32)
        self._ring_fd = -errno.EINVAL
        for flags in _SETUPS:
            params[:] = 0
            params[_FLAGS] = flags
            self._ring_fd = linux_syscalls.io_uring_setup(depth, params.ctypes.data)
            if self._ring_fd != -errno.EINVAL:
                break
        if self._ring_fd < 0:
            raise OSError(-self._ring_fd, f"io_uring_setup: {os.strerror(-self._ring_fd)}")
        try:
            if params[_FEATURE_BITS] & _FEATURES != _FEATURES:
                raise OSError(errno.ENOSYS, "this kernel's io_uring is too old")
            self._map(params)
        except BaseException:
            os.close(self._ring_fd)
            raise

    def _map(self, params: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> None:
        sq, cq = params[_SQ_OFFSETS:_CQ_OFFSETS].tolist(), params[_CQ_OFFSETS:].tolist()
        n_sq, n_cq = int(params[_SQ_ENTRIES]), int(params[_CQ_ENTRIES])
        nbytes = max(sq[_SQ_ARRAY] + 4 * n_sq, cq[_CQES] + _CQE.itemsize * n_cq)
        rings = np.frombuffer(mmap.mmap(self._ring_fd, nbytes, offset=0), np.uint8)

        def word(start: int) -> memoryview[int]:
            return rings[start : start + 4].data.cast("I")

        sqes = mmap.mmap(self._ring_fd, ENTRY_BYTES * n_sq, offset=_MAP_SQES)
        self._sqes = np.frombuffer(sqes, np.uint64).reshape(n_sq, _SQE_WORDS)
        self._sq_head, self._sq_tail = word(sq[_HEAD]), word(sq[_TAIL])
        self._cq_head, self._cq_tail = word(cq[_HEAD]), word(cq[_TAIL])
        self._cqes = rings[cq[_CQES] : cq[_CQES] + _CQE.itemsize * n_cq].view(_CQE)
        places = rings[sq[_SQ_ARRAY] : sq[_SQ_ARRAY] + 4 * n_sq].view(np.uint32)
        places[:] = np.arange(n_sq)  # entry i of the ring is submission i, for good
        self.depth = n_sq
        start = rings.ctypes.data
        self._addresses = RingAddresses(
            sqes=self._sqes.ctypes.data,
            sq_tail=start + sq[_TAIL],
            cqes=self._cqes.ctypes.data,
            cq_head=start + cq[_HEAD],
            n_sqes=n_sq,
            n_cqes=n_cq,
        )

    def prepare(self, plan: RequestPlan, first_tag: int) -> Entries:
        """Submission entries; see `KernelQueue.prepare`."""
        entries = np.zeros(len(plan), SQE)
        fill_entries(entries, plan, first_tag, fd=self._fd, read_opcode=READ, readv_opcode=READV)
        return entries

    def push(self, entries: Entries, start: int, stop: int) -> int:
        """Begin requests; see `KernelQueue.push`."""
        n = stop - start
        tail = self._place(entries, start, stop)
        result = linux_syscalls.io_uring_enter(self._ring_fd, n, 0, 0)
        taken = (self._sq_head[0] - tail) & 0xFFFFFFFF
        if taken < n:
            self._sq_tail[0] = (tail + taken) & 0xFFFFFFFF  # take back what the kernel left
        if taken == 0 and result < 0 and -result not in TRANSIENT:
            raise OSError(-result, os.strerror(-result))
        return taken

    def wait(self, at_least: int) -> int:
        """Wait for completions; see `KernelQueue.wait`."""
        while True:
            result = linux_syscalls.io_uring_enter(self._ring_fd, 0, at_least, _ENTER_GETEVENTS)
            if result < 0 and -result not in TRANSIENT:
                raise OSError(-result, os.strerror(-result))
            n = (self._cq_tail[0] - self._cq_head[0]) & 0xFFFFFFFF
            if n >= at_least:
                return n

    def take(self, n: int) -> tuple[I64, I64]:
        """Take what was completed; see `KernelQueue.take`."""
        head = self._cq_head[0]
        place = head & (len(self._cqes) - 1)
        done = self._cqes[place : place + n]
        if len(done) < n:
            done = np.concatenate((done, self._cqes[: n - len(done)]))
        tags, results = done["tag"].astype(np.int64), done["result"].astype(np.int64)
        self._cq_head[0] = (head + n) & 0xFFFFFFFF  # the kernel may use the places again: these are copies
        return tags, results

    def clear(self) -> None:
        """Let everything end; see `KernelQueue.clear`. The ring's own counts say what is in flight."""
        self._sq_tail[0] = self._sq_head[0]
        while n := (self._sq_head[0] - self._cq_head[0]) & 0xFFFFFFFF:
            self.wait(n)
            self._cq_head[0] = self._cq_tail[0]

    def close(self) -> None:
        """Close and unmap the ring; nothing is in flight."""
        del self._sqes, self._cqes, self._sq_head, self._sq_tail, self._cq_head, self._cq_tail
        os.close(self._ring_fd)

    def _place(self, entries: Entries, start: int, stop: int) -> int:
        """Put entries on the submission ring; returns its tail before."""
        words = entries.view(np.uint64).reshape(-1, _SQE_WORDS)[start:stop]
        n = len(words)
        tail = self._sq_tail[0]
        place = tail & (self.depth - 1)
        n_to_end = min(n, self.depth - place)
        self._sqes[place : place + n_to_end] = words[:n_to_end]
        if n_to_end < n:
            self._sqes[: n - n_to_end] = words[n_to_end:]
        self._sq_tail[0] = (tail + n) & 0xFFFFFFFF
        return tail
