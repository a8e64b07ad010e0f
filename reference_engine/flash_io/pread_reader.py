"""Range reading with a pool of threads that call preadv: portable, and quick where the kernel has no queue for us.

Requests are handed out in small portions, so that a batch wanted now overtakes what was to be read ahead.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from queue import SimpleQueue
from typing import Final

from flashfmt.errors import FlashReadError
from reference_engine.flash_io.io_counters import IoCounters
from reference_engine.flash_io.open_file import OpenFile
from reference_engine.flash_io.range_reader import BatchMaker, Buffer, IoTuning, Pending, closed_reader
from reference_engine.flash_io.read_fully import read_fully
from reference_engine.flash_io.request_plan import I64

MAX_THREADS: Final = 32  # more cost more than they bring
_PORTION: Final = 4  # requests


class _Work:
    """A batch in portions; the thread that ends the last portion ends the batch."""

    def __init__(self, pending: Pending) -> None:
        self.pending = pending
        self.portions = range(0, len(pending.plan), _PORTION)
        self.error: FlashReadError | None = None
        self._n_ended = itertools.count(1)  # advanced atomically, without a lock
        self._n_calls: deque[int] = deque()
        self._bytes_read: deque[int] = deque()

    def perform(self, file: OpenFile, start: int) -> None:
        """Read one portion, or skip it where the batch has failed already."""
        plan = self.pending.plan
        try:
            for i in range(start, min(start + _PORTION, len(plan))):
                if self.error is not None or self.pending.is_cancelled:
                    break
                self._n_calls.append(read_fully(file, plan, i))
                self._bytes_read.append(int(plan.nbytes[i]))
        except FlashReadError as error:
            self.error = error
        finally:
            self.end_portion()

    def end_portion(self) -> None:
        if next(self._n_ended) == len(self.portions):
            self.pending.finish(self.error, n_requests=sum(self._n_calls), bytes_read=sum(self._bytes_read))


class PreadReader:
    """A `RangeReader` with ``min(tuning.depth, MAX_THREADS)`` threads. Owns `file`."""

    name = "pread"

    def __init__(self, file: OpenFile, tuning: IoTuning) -> None:
        self.file = file
        self._batches = BatchMaker(file, tuning)
        self._wanted: deque[tuple[_Work, int]] = deque()
        self._ahead: deque[tuple[_Work, int]] = deque()
        self._tokens: SimpleQueue[bool] = SimpleQueue()  # one True a portion in the two above
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"flash-pread-{i}", daemon=True)
            for i in range(min(tuning.depth, MAX_THREADS))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def counters(self) -> IoCounters:
        """What reading has cost so far."""
        return self._batches.tally.counters

    def submit(
        self, offsets: I64, nbytes: I64 | int, buffer: Buffer, positions: I64, *, ahead: bool = False
    ) -> Pending:
        """Begin to read; see `RangeReader.submit`."""
        if self._is_closed:
            raise closed_reader(self.file)
        pending = self._batches.batch(offsets, nbytes, buffer, positions, ahead=ahead)
        work = _Work(pending)
        if not work.portions:
            pending.finish(None, n_requests=0, bytes_read=0)
        lane = self._ahead if ahead else self._wanted
        for start in work.portions:
            lane.append((work, start))
            self._tokens.put(True)
        return pending

    def close(self) -> None:
        """Wait for the requests in flight, drop the others, end the threads and close the file."""
        if self._is_closed:
            return
        self._is_closed = True
        for _ in self._threads:
            self._tokens.put(False)
        for thread in self._threads:
            thread.join()
        self.file.close()

    def _serve(self) -> None:
        while self._tokens.get():
            try:
                work, start = self._wanted.popleft()
            except IndexError:
                work, start = self._ahead.popleft()
            if self._is_closed:
                work.error = work.error or closed_reader(self.file)
            work.perform(self.file, start)
