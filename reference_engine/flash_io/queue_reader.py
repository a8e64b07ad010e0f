"""Range reading by a kernel queue (io_uring or native AIO) that one dedicated thread owns.

The thread keeps the queue full while there are requests, and sleeps in the kernel while they are carried out. It
takes what it does once a batch or once a few dozen completions, never once a request.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Final

import numpy as np

from flashfmt.errors import FlashReadError
from reference_engine.flash_io.io_counters import IoCounters
from reference_engine.flash_io.kernel_queue import Entries, KernelQueue
from reference_engine.flash_io.open_file import OpenFile
from reference_engine.flash_io.range_reader import (
    BatchMaker,
    Buffer,
    IoTuning,
    Pending,
    closed_reader,
    read_failure,
)
from reference_engine.flash_io.read_fully import RETRIES, read_fully
from reference_engine.flash_io.request_plan import I64

_TAG_BITS: Final = 32  # a tag is the batch's number and, in these bits, the request's
_REQUEST_MASK: Final = (1 << _TAG_BITS) - 1
_WAKE_SHARE: Final = 2  # of what is in flight, this part must have ended before more is pushed
_MAX_WAIT: Final = 128  # completions that are waited for in one go; new batches are looked for in between
_TAIL: Final = 16
_MAX_REFUSALS: Final = 1000
_REFUSAL_SECONDS: Final = 0.001


class _Work:
    """A batch on the I/O thread."""

    def __init__(self, pending: Pending, number: int, entries: Entries) -> None:
        self.pending = pending
        self.entries = entries
        self.plan = pending.plan
        self.number = number
        self.n_pushed = 0
        self.n_in_flight = 0
        self.n_requests = 0
        self.bytes_read = 0
        self.error: FlashReadError | None = None

    @property
    def is_fed(self) -> bool:
        """Whether nothing of it is to be pushed any more."""
        return self.n_pushed == len(self.plan) or self.error is not None or self.pending.is_cancelled

    def fail(self, error: FlashReadError) -> None:
        """Note the first error; no further requests are then made."""
        self.error = self.error or error

    def finish(self) -> None:
        """Let the caller have it."""
        self.pending.finish(self.error, n_requests=self.n_requests, bytes_read=self.bytes_read)


class QueueReader:
    """A `RangeReader` over what `make_queue` makes of a file descriptor and a depth. Owns `file`.

    Raises
    ------
    OSError
        If the queue cannot be made; `file` then stays open.
    """

    def __init__(
        self, name: str, file: OpenFile, tuning: IoTuning, make_queue: Callable[[int, int], KernelQueue]
    ) -> None:
        self.name = name
        self.file = file
        self._batches = BatchMaker(file, tuning)
        self._depth = tuning.depth
        self._make_queue = make_queue
        self._inbox: SimpleQueue[Pending | None] = SimpleQueue()
        self._is_closed = False
        started: SimpleQueue[OSError | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(started,), name=f"flash-{name}", daemon=True)
        self._thread.start()
        error = started.get()
        if error is not None:
            self._thread.join()
            raise error

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
        self._inbox.put(pending)
        return pending

    def close(self) -> None:
        """Wait for the requests in flight, drop the others, end the thread and close the file."""
        if not self._is_closed:
            self._is_closed = True
            self._inbox.put(None)
            self._thread.join()
            self.file.close()

    def _run(self, started: SimpleQueue[OSError | None]) -> None:
        try:
            queue = self._make_queue(self.file.fd, self._depth)
        except OSError as error:
            started.put(error)
            return
        started.put(None)
        service = _Service(self.file, queue, min(queue.depth, self._depth), self._inbox)
        try:
            service.run()
        except OSError as error:
            queue.close()
            service.abandon(error)
        else:
            queue.close()


class _Service:
    """The I/O thread's own state; nothing else touches it."""

    def __init__(self, file: OpenFile, queue: KernelQueue, depth: int, inbox: SimpleQueue[Pending | None]) -> None:
        self._file = file
        self._queue = queue
        self._inbox = inbox
        self._n_free = self._depth = depth
        self._lanes: tuple[deque[_Work], deque[_Work]] = (deque(), deque())  # wanted now; to be read ahead
        self._works: dict[int, _Work] = {}  # that have not ended, by number
        self._n_batches = 0
        self._n_refusals = 0
        self._is_closing = False

    def run(self) -> None:
        """Serve until closed and nothing is in flight."""
        while True:
            self._take_batches()
            if self._is_closing and not self._works:
                return
            self._feed()
            n_in_flight = self._depth - self._n_free
            if n_in_flight:
                is_tail = n_in_flight <= _TAIL and not any(self._lanes)
                self._collect(n_in_flight if is_tail else max(1, min(n_in_flight // _WAKE_SHARE, _MAX_WAIT)))

    def abandon(self, cause: OSError) -> None:
        """Fail all there is and all that comes, after waiting for completions has itself failed."""
        failure = FlashReadError(f"the kernel's queue broke down: {cause.strerror}", path=self._file.path)
        for work in self._works.values():
            work.fail(failure)
            work.finish()
        while not self._is_closing and (pending := self._inbox.get()) is not None:
            pending.finish(failure, n_requests=0, bytes_read=0)

    def _take_batches(self) -> None:
        """Accept all that was submitted; sleep for the next where there is nothing else to do."""
        while True:
            try:
                pending = self._inbox.get(block=not self._works and not self._is_closing)
            except Empty:
                return
            if pending is None:
                self._is_closing = True
                for work in list(self._works.values()):
                    if not work.is_fed:
                        work.fail(closed_reader(self._file))
                        self._end_if_done(work)
                continue
            self._n_batches += 1
            number = self._n_batches
            work = _Work(pending, number, self._queue.prepare(pending.plan, number << _TAG_BITS))
            self._works[number] = work
            if self._is_closing:
                work.fail(closed_reader(self._file))
            else:
                self._lanes[pending.ahead].append(work)
            self._end_if_done(work)

    def _feed(self) -> None:
        """Push requests until the queue is full or none are left."""
        for lane in self._lanes:
            while lane and self._n_free:
                work = lane[0]
                if work.is_fed:
                    lane.popleft()
                    self._end_if_done(work)
                elif not self._push(work):
                    return

    def _push(self, work: _Work) -> bool:
        """Push what fits of a batch; False where the kernel took nothing for now."""
        start = work.n_pushed
        stop = min(start + self._n_free, len(work.plan))
        try:
            n = self._queue.push(work.entries, start, stop)
        except OSError as error:
            self._refuse(work, error.errno or 0)
            return True
        if n == 0 and self._n_free == self._depth:  # nothing in flight whose end would make room
            self._n_refusals += 1
            if self._n_refusals > _MAX_REFUSALS:
                self._refuse(work, next(iter(RETRIES)))
            time.sleep(_REFUSAL_SECONDS)
            return False
        self._n_refusals = 0
        work.n_pushed += n
        work.n_in_flight += n
        work.n_requests += n
        self._n_free -= n
        return n > 0

    def _refuse(self, work: _Work, number: int) -> None:
        i = work.n_pushed
        work.fail(read_failure(self._file, int(work.plan.offsets[i]), int(work.plan.nbytes[i]), 0, number))

    def _collect(self, at_least: int) -> None:
        """Wait for completions and settle them."""
        tags, results = self._queue.reap(at_least)
        self._n_free += len(tags)
        numbers, requests = tags >> _TAG_BITS, tags & _REQUEST_MASK
        if (numbers == numbers[0]).all():
            self._settle(self._works[int(numbers[0])], requests, results)
            return
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            self._settle(self._works[number], requests[mine], results[mine])

    def _settle(self, work: _Work, requests: I64, results: I64) -> None:
        wanted = work.plan.nbytes[requests]
        work.n_in_flight -= len(requests)
        work.bytes_read += int(wanted.sum())
        for k in np.flatnonzero(results != wanted).tolist():
            self._repair(work, int(requests[k]), int(results[k]))
        self._end_if_done(work)

    def _repair(self, work: _Work, i: int, result: int) -> None:
        """Carry out a request anew that came back short or interrupted; any other failure is the batch's."""
        try:
            if result < 0 and -result not in RETRIES:
                raise read_failure(self._file, int(work.plan.offsets[i]), int(work.plan.nbytes[i]), 0, -result)
            if work.error is None:
                work.n_requests += read_fully(self._file, work.plan, i)
        except FlashReadError as error:
            work.fail(error)

    def _end_if_done(self, work: _Work) -> None:
        if work.is_fed and not work.n_in_flight and self._works.pop(work.number, None) is not None:
            if work.n_pushed < len(work.plan):  # a cancelled one has no error yet
                work.fail(closed_reader(self._file))
            work.finish()
