"""Range reading through a memory map: the portable reference that the other backends are compared with.

Bytes are copied in the caller's thread before ``submit`` returns, and they pass the page cache. A device error while
a mapped page is brought in ends the process with SIGBUS: this is for checking and for comparison, not for use.
"""

from __future__ import annotations

import ctypes
import mmap
import os

from flashfmt.errors import FlashReadError
from reference_engine.flash_io.io_counters import IoCounters
from reference_engine.flash_io.open_file import OpenFile
from reference_engine.flash_io.range_reader import BatchMaker, Buffer, IoTuning, Pending, closed_reader
from reference_engine.flash_io.request_plan import I64, RequestPlan


class MmapReader:
    """A `RangeReader` that reads at once. Owns `file`."""

    name = "mmap"

    def __init__(self, file: OpenFile, tuning: IoTuning) -> None:
        self.file = file
        self._batches = BatchMaker(file, tuning)
        try:
            self._map = mmap.mmap(file.fd, 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise FlashReadError(f"cannot map: {error}", path=file.path) from error
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)
        self._is_closed = False

    @property
    def counters(self) -> IoCounters:
        """What reading has cost so far; nobody ever waits."""
        return self._batches.tally.counters

    def submit(
        self, offsets: I64, nbytes: I64 | int, buffer: Buffer, positions: I64, *, ahead: bool = False
    ) -> Pending:
        """Read; see `RangeReader.submit`."""
        if self._is_closed:
            raise closed_reader(self.file)
        pending = self._batches.batch(offsets, nbytes, buffer, positions, ahead=ahead)
        error, n_copied, bytes_read = None, 0, 0
        for i in range(len(pending.plan)):
            try:
                bytes_read += self._copy(pending.plan, i)
                n_copied += 1
            except FlashReadError as failure:
                error = failure
                break
        pending.finish(error, n_requests=n_copied, bytes_read=bytes_read)
        return pending

    def close(self) -> None:
        """Unmap and close the file."""
        if not self._is_closed:
            self._is_closed = True
            self._map.close()
            self.file.close()

    def _copy(self, plan: RequestPlan, i: int) -> int:
        offset, nbytes = int(plan.offsets[i]), int(plan.nbytes[i])
        available = min(len(self._map), os.fstat(self.file.fd).st_size)  # touching what was cut off is fatal
        if offset + nbytes > available:
            raise FlashReadError(
                "the file ends inside a range",
                path=self.file.path,
                where=max(offset, available),
                expected=f"{nbytes} bytes from {offset}",
                actual=f"{max(available - offset, 0)}",
            )
        first = int(plan.first_segment[i])
        for address, size in plan.segments[first : first + int(plan.n_segments[i])].tolist():
            ctypes.memmove(address, self._map[offset : offset + size], size)
            offset += size
        return nbytes
