"""Reading many ranges of one file at once, each to its own slot of a buffer: the contract, and what all backends share.

Knows byte ranges, slots and when a batch has ended. Does not know how bytes are moved: that is one file a backend.
"""

from __future__ import annotations

import _thread
import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flashfmt.errors import FlashReadError
from reference_engine.flash_io.aligned_memory import aligned_empty
from reference_engine.flash_io.batch_steps import BatchSteps, PlainSteps, PlanLimits
from reference_engine.flash_io.io_counters import IoCounters, IoTally
from reference_engine.flash_io.open_file import OpenFile
from reference_engine.flash_io.request_plan import I64, RequestPlan

MAX_SEGMENTS = 1024  # IOV_MAX of Linux and macOS
Buffer = npt.NDArray[np.uint8]
_BYTE = np.dtype(np.uint8)


@dataclass(frozen=True, slots=True)
class IoTuning:
    """How requests are made; what is best depends on the device.

    gap_bytes : longest gap between two ranges that is read through.
    max_request_bytes : size no request exceeds.
    depth : requests in flight at once. What is more waits for a thread that waits. The block layer takes so many for
        a device (nr_requests, often 256); with more, ``submit`` itself stands still until the device gets on.
    """

    gap_bytes: int = 8 << 10
    max_request_bytes: int = 256 << 10
    depth: int = 256


class RangeReader(Protocol):
    """Reads ranges of one file. Everything but ``close`` may be called from any thread.

    Attributes
    ----------
    name : of the backend, such as ``uring``.
    file : the open file; ranges and slots must be multiples of its `alignment`.
    """

    name: str
    file: OpenFile

    @property
    def counters(self) -> IoCounters:
        """What reading has cost so far."""
        ...

    def submit(
        self, offsets: I64, nbytes: I64 | int, buffer: Buffer, positions: I64, *, ahead: bool = False
    ) -> Pending:
        """Begin to read ``[offsets[i], offsets[i] + nbytes[i])`` to ``buffer.reshape(-1)[positions[i]:]``.

        Parameters
        ----------
        offsets : int64 [n], sorted; bytes from the file's start. The ranges must not overlap.
        nbytes : int64 [n], or one size for all; above 0.
        buffer : C-contiguous, of any shape. The ranges' slots belong to the reader until ``wait`` returns or
            raises, and nothing else of it is written to; it is kept alive until then.
        positions : int64 [n]; byte positions in `buffer`, in any order. Slots must not overlap.
        ahead : let every request of other batches that has not begun go first.

        Raises
        ------
        ValueError
            If ranges are misaligned, unsorted, overlapping or empty, or slots lie outside the buffer.
        FlashReadError
            If the reader is closed.
        """
        ...

    def close(self) -> None:
        """Wait for the requests in flight, drop the others (their ``wait`` raises), and close the file.

        No other thread may be in ``submit`` meanwhile.
        """
        ...


class Driver(Protocol):
    """What a batch needs of the thread that wants it, where its backend has no threads of its own."""

    def attend(self) -> None:
        """Carry the batch on until it has ended."""
        ...

    def look(self) -> None:
        """Carry the batch on as far as goes without waiting."""
        ...


class Pending:
    """A batch of reads that was begun. Made by ``RangeReader.submit``.

    A backend moves the bytes that `plan` asks for and calls ``finish`` once, when nothing more will be written into
    the buffer, whether or not all went well. Where nothing moves unless somebody looks after it, it sets `driver`.
    """

    def __init__(self, plan: RequestPlan, *, keep: tuple[Buffer, ...], ahead: bool, tally: IoTally) -> None:
        self.plan = plan
        self.ahead = ahead
        self.is_cancelled = False
        self.driver: Driver | None = None
        self._keep: tuple[Buffer, ...] = keep
        self._tally = tally
        self._error: FlashReadError | None = None
        self._in_progress = _thread.allocate_lock()
        self._in_progress.acquire()

    @property
    def has_ended(self) -> bool:
        """Whether ``finish`` was called."""
        return not self._in_progress.locked()

    @property
    def is_done(self) -> bool:
        """Whether ``wait`` would return, or raise, at once."""
        self.look()
        return self.has_ended

    def look(self) -> None:
        """Carry the reader's batches on as far as goes without waiting."""
        driver = self.driver
        if driver is not None and not self.has_ended:
            driver.look()

    def wait(self) -> None:
        """Return when every range is in its slot. May be called more than once.

        Raises
        ------
        FlashReadError
            Naming path, offset and byte counts of a range that could not be read. No request of the batch is then in
            flight, and what the slots hold is not defined.
        """
        try:
            if not self.has_ended:
                started = time.perf_counter()
                self._attend()
                self._tally.add(wait_seconds=time.perf_counter() - started)
        except BaseException:  # a signal's handler raised: the buffer must be left in peace all the same
            self.is_cancelled = True
            self._attend()
            raise
        if self._error is not None:
            raise self._error

    def _attend(self) -> None:
        driver = self.driver
        if driver is not None:
            driver.attend()
        with self._in_progress:
            return

    def finish(self, error: FlashReadError | None, *, n_requests: int, bytes_read: int) -> None:
        """End the batch, for the backend: wakes whoever waits, and lets go of the buffer."""
        self._error = error
        self._keep = ()
        self.driver = None
        self._tally.add(bytes_read=bytes_read, n_requests=n_requests)
        self._in_progress.release()


class BatchMaker:
    """Turns the arguments of ``submit`` into a batch: checks them and plans the requests."""

    def __init__(
        self, file: OpenFile, tuning: IoTuning, make_steps: Callable[[PlanLimits], BatchSteps] = PlainSteps
    ) -> None:
        if tuning.max_request_bytes % file.alignment or tuning.gap_bytes % file.alignment or tuning.depth < 1:
            raise ValueError(f"{tuning} does not suit a file with an alignment of {file.alignment}")
        self._file = file
        self._scratch = aligned_empty(tuning.gap_bytes)
        self.tally = IoTally()
        limits = PlanLimits(
            file.alignment, tuning.gap_bytes, tuning.max_request_bytes, MAX_SEGMENTS, self._scratch.ctypes.data
        )
        self.steps = make_steps(limits)

    def batch(self, offsets: I64, nbytes: I64 | int, buffer: Buffer, positions: I64, *, ahead: bool) -> Pending:
        """A batch that nothing was read of yet; raises ValueError as ``RangeReader.submit`` says."""
        flags = buffer.flags
        if buffer.dtype != _BYTE or not flags.c_contiguous or not flags.writeable:
            raise ValueError("a buffer must be writable, C-contiguous uint8")
        offsets = np.array(offsets, np.int64)
        sizes = np.empty(offsets.shape, np.int64)
        sizes[...] = nbytes
        positions = np.array(positions, np.int64)
        if offsets.ndim != 1 or positions.shape != offsets.shape:
            raise ValueError(f"offsets {offsets.shape} and positions {positions.shape} must be of one length")
        plan = self.steps.plan(offsets, sizes, positions, buffer.reshape(-1))
        if plan is None:
            raise self._fault(offsets, sizes, positions, buffer)
        return Pending(plan, keep=(buffer, self._scratch), ahead=ahead, tally=self.tally)

    def _fault(self, offsets: I64, sizes: I64, positions: I64, buffer: Buffer) -> ValueError:
        """What is wrong with ranges that cannot be planned."""
        if sizes.min() <= 0 or offsets[0] < 0 or (offsets[1:] < (offsets + sizes)[:-1]).any():
            return ValueError("ranges must be sorted, must not overlap, and must not be empty")
        if positions.min() < 0 or (positions + sizes).max() > buffer.nbytes:
            return ValueError(f"a slot lies outside the buffer of {buffer.nbytes} bytes")
        alignment = self._file.alignment
        i = ((offsets | sizes | positions + buffer.ctypes.data) & (alignment - 1)).nonzero()[0][0]
        return ValueError(
            f"misaligned read of {sizes[i]} bytes at {offsets[i]} to position {positions[i]}: "
            f"{self._file.path} needs multiples of {alignment}"
        )


def read_failure(file: OpenFile, offset: int, nbytes: int, got: int, number: int) -> FlashReadError:
    """The error for a request that the system refused with errno `number` after `got` bytes."""
    return FlashReadError(
        f"read of {nbytes} bytes failed: {os.strerror(number)} [{errno.errorcode.get(number, number)}]",
        path=file.path,
        where=offset + got,
        expected=f"{nbytes} bytes from {offset}",
        actual=f"{got}",
    )


def closed_reader(file: OpenFile) -> FlashReadError:
    """The error for reads that a closing reader did not make."""
    return FlashReadError("the reader was closed before the range was read", path=file.path)
