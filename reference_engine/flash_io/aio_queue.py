"""Linux native AIO by raw system calls, where io_uring is blocked (Docker's default profile). Direct reads only.

The kernel's AIO of buffered reads blocks in the call that should begin them, so a file that is not open for direct
reads is refused.
"""

from __future__ import annotations

import os
from typing import Final

import numpy as np

from reference_engine.flash_io import linux_syscalls
from reference_engine.flash_io.kernel_queue import ENTRY_BYTES, TRANSIENT, Entries, fill_entries
from reference_engine.flash_io.request_plan import I64, RequestPlan

IOCB: Final = np.dtype(
    {
        "names": ["tag", "opcode", "fd", "address", "nbytes", "offset"],
        "formats": ["<u8", "<u2", "<u4", "<u8", "<u8", "<i8"],
        "offsets": [0, 16, 20, 24, 32, 40],
        "itemsize": ENTRY_BYTES,
    }
)
_EVENT: Final = np.dtype([("tag", "<u8"), ("iocb", "<u8"), ("result", "<i8"), ("result2", "<i8")])
PREAD, PREADV = 0, 7


class AioQueue:
    """A `KernelQueue` of `depth` requests to the file `fd`.

    Raises
    ------
    OSError
        If the kernel has no AIO, it is forbidden here, or the system's limit on requests is reached.
    """

    def __init__(self, fd: int, depth: int) -> None:
        self._fd = fd
        self.depth = depth
        self._context = _set_up(depth)
        self._events = np.zeros(depth, _EVENT)  # those not taken yet come first, and have tags above 0

    def prepare(self, plan: RequestPlan, first_tag: int) -> Entries:
        """Control blocks; see `KernelQueue.prepare`."""
        entries = np.zeros(len(plan), IOCB)
        fill_entries(entries, plan, first_tag, fd=self._fd, read_opcode=PREAD, readv_opcode=PREADV)
        return entries

    def push(self, entries: Entries, start: int, stop: int) -> int:
        """Begin requests; see `KernelQueue.push`. The kernel copies the control blocks during the call."""
        pointers = entries.ctypes.data + ENTRY_BYTES * np.arange(start, stop, dtype=np.uint64)
        result = linux_syscalls.io_submit(self._context, stop - start, pointers.ctypes.data)
        if result < 0 and -result not in TRANSIENT:
            raise OSError(-result, os.strerror(-result))
        return max(result, 0)

    def wait(self, at_least: int) -> int:
        """Wait for completions; see `KernelQueue.wait`."""
        n_before = int(np.count_nonzero(self._events["tag"]))  # left by a `wait` that was broken off behind the call
        address = self._events.ctypes.data + n_before * _EVENT.itemsize
        missing = max(at_least - n_before, 0)
        while True:
            n = linux_syscalls.io_getevents(self._context, missing, self.depth - n_before, address)
            if n >= missing or n > 0:
                return n_before + n
            if n < 0 and -n not in TRANSIENT:
                raise OSError(-n, os.strerror(-n))

    def take(self, n: int) -> tuple[I64, I64]:
        """Take what was completed; see `KernelQueue.take`."""
        done = self._events[:n]
        tags, results = done["tag"].astype(np.int64), done["result"].copy()
        done["tag"] = 0
        return tags, results

    def clear(self) -> None:
        """Let everything end; see `KernelQueue.clear`. Ending a context waits for what is in flight."""
        self.close()
        self._events["tag"] = 0
        self._context = _set_up(self.depth)

    def close(self) -> None:
        """Give the context up; the call itself waits for what may be in flight."""
        linux_syscalls.io_destroy(self._context)


def _set_up(depth: int) -> int:
    context = np.zeros(1, np.uint64)
    result = linux_syscalls.io_setup(depth, context.ctypes.data)
    if result < 0:
        raise OSError(-result, f"io_setup: {os.strerror(-result)}")
    return int(context.view(np.int64)[0])
