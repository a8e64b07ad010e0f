"""io_uring by raw system calls: submission entries are one numpy array, and a batch is filled with a few stores.

Linux 5.6 or later. Needs no library and no compiler. With IORING_SETUP_DEFER_TASKRUN (6.1) completions are posted only
while this thread waits for them. Without it they may be posted on another core at any time, which only a processor
with ordered loads (x86) lets us read from Python; elsewhere such a kernel is refused.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import Final

import numpy as np

from reference_engine.flash_io import linux_syscalls
from reference_engine.flash_io.kernel_queue import ENTRY_BYTES, TRANSIENT, Entries, fill_entries
from reference_engine.flash_io.request_plan import I64, RequestPlan

_SQE: Final = np.dtype(
    {
        "names": ["opcode", "fd", "offset", "address", "nbytes", "tag"],
        "formats": ["u1", "<i4", "<u8", "<u8", "<u4", "<u8"],
        "offsets": [0, 4, 8, 16, 24, 32],
        "itemsize": ENTRY_BYTES,
    }
)
_SQE_WORDS: Final = ENTRY_BYTES // 8
_CQE: Final = np.dtype([("tag", "<u8"), ("result", "<i4"), ("flags", "<u4")])
_READV, _READ = 1, 22
_ENTER_GETEVENTS: Final = 1
_MAP_SQES: Final = 0x10000000

_COOP_TASKRUN, _SINGLE_ISSUER, _DEFER_TASKRUN = 1 << 8, 1 << 12, 1 << 13
_SETUPS: Final = (_SINGLE_ISSUER | _DEFER_TASKRUN, *((_COOP_TASKRUN, 0) if linux_syscalls.MACHINE == "x86_64" else ()))
_FEATURES: Final = 1 << 0 | 1 << 1 | 1 << 3  # SINGLE_MMAP, NODROP, RW_CUR_POS (came with IORING_OP_READ)

# Words of struct io_uring_params, and of the offset tables in it.
_N_PARAMS, _SQ_ENTRIES, _CQ_ENTRIES, _FLAGS, _FEATURE_BITS, _SQ_OFFSETS, _CQ_OFFSETS = 30, 0, 1, 2, 5, 10, 20
_HEAD, _TAIL, _SQ_ARRAY, _CQES = 0, 1, 6, 5


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

        def words(start: int, n: int = 1) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
            return rings[start : start + 4 * n].view(np.uint32)

        sqes = mmap.mmap(self._ring_fd, ENTRY_BYTES * n_sq, offset=_MAP_SQES)
        self._sqes = np.frombuffer(sqes, np.uint64).reshape(n_sq, _SQE_WORDS)
        self._sq_head, self._sq_tail = words(sq[_HEAD]), words(sq[_TAIL])
        self._cq_head, self._cq_tail = words(cq[_HEAD]), words(cq[_TAIL])
        self._cqes = rings[cq[_CQES] : cq[_CQES] + _CQE.itemsize * n_cq].view(_CQE)
        words(sq[_SQ_ARRAY], n_sq)[:] = np.arange(n_sq)  # entry i of the ring is submission i, for good
        self.depth = n_sq

    def prepare(self, plan: RequestPlan, first_tag: int) -> Entries:
        """Submission entries; see `KernelQueue.prepare`."""
        entries = np.zeros(len(plan), _SQE)
        fill_entries(entries, plan, first_tag, fd=self._fd, read_opcode=_READ, readv_opcode=_READV)
        return entries

    def push(self, entries: Entries, start: int, stop: int) -> int:
        """Begin requests; see `KernelQueue.push`."""
        words = entries.view(np.uint64).reshape(-1, _SQE_WORDS)[start:stop]
        n = len(words)
        tail = int(self._sq_tail[0])
        place = tail & (self.depth - 1)
        n_to_end = min(n, self.depth - place)
        self._sqes[place : place + n_to_end] = words[:n_to_end]
        self._sqes[: n - n_to_end] = words[n_to_end:]
        self._sq_tail[0] = (tail + n) & 0xFFFFFFFF
        result = linux_syscalls.io_uring_enter(self._ring_fd, n, 0, 0)
        taken = (int(self._sq_head[0]) - tail) & 0xFFFFFFFF
        if taken < n:
            self._sq_tail[0] = (tail + taken) & 0xFFFFFFFF  # take back what the kernel left
        if taken == 0 and result < 0 and -result not in TRANSIENT:
            raise OSError(-result, os.strerror(-result))
        return taken

    def reap(self, at_least: int) -> tuple[I64, I64]:
        """Wait for completions; see `KernelQueue.reap`."""
        head = int(self._cq_head[0])
        while (n := (int(self._cq_tail[0]) - head) & 0xFFFFFFFF) < at_least:
            result = linux_syscalls.io_uring_enter(self._ring_fd, 0, at_least, _ENTER_GETEVENTS)
            if result < 0 and -result not in TRANSIENT:
                raise OSError(-result, os.strerror(-result))
        place = head & (len(self._cqes) - 1)
        done = np.concatenate((self._cqes[place : place + n], self._cqes[: max(0, place + n - len(self._cqes))]))
        self._cq_head[0] = (head + n) & 0xFFFFFFFF  # the kernel may use the places again: `done` is a copy
        return done["tag"].astype(np.int64), done["result"].astype(np.int64)

    def close(self) -> None:
        """Close the ring; nothing is in flight."""
        os.close(self._ring_fd)
