"""Range reading by a kernel queue (io_uring or native AIO), carried on by the threads that want the bytes.

There is no thread of its own: waking one, and handing the interpreter over to it and back, costs as much as the device
takes for a dozen requests. ``submit`` itself fills the kernel's queue; whoever waits for a batch takes results, his
own and others', and refills. What does not fit into the queue is thus pushed only while somebody waits, so the queue
should be deep enough for what is read while its caller computes.

Two locks: `_turn` belongs to the one thread that waits for the kernel and takes results, `_lock` guards the state,
never while waiting. A signal's handler may raise anywhere in between. Waiting changes nothing, so that is harmless;
what breaks off a change of state marks it torn, and then all batches under way fail and the queue is cleared.
"""

from __future__ import annotations

import errno
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import numpy as np

from flashfmt.errors import FlashReadError
from reference_engine.flash_io.batch_steps import REQUEST_MASK, TAG_BITS, BatchSteps, PlainSteps, PlanLimits
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

_REFILL_SHARE: Final = 4  # of what is in flight: when this part has ended, more is pushed
_INCOMPLETE: Final = RETRIES | {errno.ECANCELED}  # the last where the thread that began a request has ended
_FIRST_PUSH: Final = 4  # an idle device begins with these while the kernel is still handed the rest
_MAX_REFUSALS: Final = 1000
_REFUSAL_SECONDS: Final = 0.001


class _Work:
    """A batch under way; drives its `Pending`."""

    def __init__(self, reader: QueueReader, pending: Pending, number: int, entries: Entries) -> None:
        self.pending = pending
        self.entries = entries
        self.plan = pending.plan
        self.number = number
        self.n_planned = len(pending.plan)
        self.n_pushed = 0
        self.n_in_flight = 0
        self.n_requests = 0
        self.bytes_read = 0
        self.error: FlashReadError | None = None
        self._reader = reader

    def attend(self) -> None:
        """Carry the batch on until it has ended; see `Driver`."""
        self._reader.attend(self)

    def look(self) -> None:
        """Carry the batch on without waiting; see `Driver`."""
        self._reader.look(self)

    @property
    def is_fed(self) -> bool:
        """Whether nothing of it is to be pushed any more."""
        return self.n_pushed == self.n_planned or self.error is not None or self.pending.is_cancelled

    def fail(self, error: FlashReadError) -> None:
        """Note the first error; no further requests are then made."""
        self.error = self.error or error

    def finish(self) -> None:
        """Let the caller have it."""
        if not self.pending.has_ended:
            self.pending.finish(self.error, n_requests=self.n_requests, bytes_read=self.bytes_read)


class QueueReader:
    """A `RangeReader` over what `make_queue` makes of a file descriptor and a depth. Owns `file`.

    Raises
    ------
    OSError
        If the queue cannot be made; `file` then stays open.
    """

    def __init__(
        self,
        name: str,
        file: OpenFile,
        tuning: IoTuning,
        make_queue: Callable[[int, int], KernelQueue],
        make_steps: Callable[[PlanLimits], BatchSteps] = PlainSteps,
    ) -> None:
        self.name = name
        self.file = file
        self._batches = BatchMaker(file, tuning, make_steps)
        self._steps = self._batches.steps
        self._queue = make_queue(file.fd, tuning.depth)
        self._depth = min(self._queue.depth, tuning.depth)
        self._turn = threading.Lock()  # taken before `_lock` where both are
        self._lock = threading.Lock()
        self._is_torn = False
        self._n_in_flight = 0
        self._n_refusals = 0
        self._numbers = itertools.count(1)
        self._lanes: tuple[deque[_Work], deque[_Work]] = (deque(), deque())  # wanted now; to be read ahead
        self._works: dict[int, _Work] = {}  # that have not ended, by number; keeps their buffers alive
        self._breakdown: FlashReadError | None = None
        self._is_closed = False
        self._is_released = False

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
        number = next(self._numbers)
        work = _Work(self, pending, number, self._queue.prepare(pending.plan, number << TAG_BITS))
        try:
            self._begin(work)
            return pending
        except BaseException:  # a signal's handler raised: the caller does not know of the batch, so it must not go on
            pending.is_cancelled = True
            self.attend(work)
            raise

    def attend(self, work: _Work) -> None:
        """Wait until `work` has ended, whoever takes its results."""
        while not work.pending.has_ended:
            with self._turn:
                if not work.pending.has_ended:
                    self._advance(work, may_wait=True)

    def look(self, work: _Work) -> None:
        """Take what results there are, unless another thread is about it."""
        if self._turn.acquire(blocking=False):
            try:
                if not work.pending.has_ended:
                    self._advance(work, may_wait=False)
            finally:
                self._turn.release()

    def close(self) -> None:
        """Wait for the requests in flight, drop the others and close the file."""
        self._is_closed = True
        with self._turn:
            if self._is_released:
                return
            with self._lock:
                self._mend()
                for work in list(self._works.values()):
                    if not work.is_fed:
                        work.fail(closed_reader(self.file))
            while self._works:
                self._advance(next(iter(self._works.values())), may_wait=True)
            self._is_released = True
            self._queue.close()
            self.file.close()

    def __del__(self) -> None:
        """Requests in flight write into memory that a dropped reader no longer keeps."""
        if hasattr(self, "_is_released"):
            self.close()

    def _begin(self, work: _Work) -> None:
        while True:
            with self._lock:
                if not self._is_torn:
                    self._is_torn = True
                    if self._breakdown is not None:
                        work.fail(self._breakdown)
                    work.pending.driver = work
                    self._works[work.number] = work
                    self._lanes[work.pending.ahead].append(work)
                    self._feed()
                    if not work.n_in_flight:
                        self._end_if_done(work)
                    self._is_torn = False
                    return
            with self._turn, self._lock:
                self._mend()

    def _advance(self, work: _Work, *, may_wait: bool) -> None:
        """Take results once, after waiting for as many as `work` needs. By the thread whose turn it is."""
        with self._lock:
            self._mend()
            if not work.n_in_flight:
                self._end_if_done(work)
            if work.pending.has_ended:
                return
            at_least = self._n_needed(work) if may_wait else 0
        try:
            if may_wait and not at_least:  # the kernel refused all of it for the moment
                time.sleep(_REFUSAL_SECONDS)
                n = 0
            else:
                n = self._queue.wait(at_least)
        except OSError as error:
            with self._lock:
                self._abandon(error)
            return
        with self._lock:
            self._is_torn = True
            self._collect(n)
            if not work.n_in_flight:
                self._end_if_done(work)
            self._is_torn = False

    def _n_needed(self, work: _Work) -> int:
        """Results to wait for: never more than `work` needs, and few where there is something to refill with."""
        if not any(self._lanes):
            return work.n_in_flight
        refill = self._n_in_flight // _REFILL_SHARE or min(self._n_in_flight, 1)
        return min(work.n_in_flight or refill, refill)

    def _collect(self, n: int) -> None:
        """Refill the queue after `n` requests have ended, then take and settle their results: the device works then."""
        self._n_in_flight -= n
        self._feed()
        if not n:
            return
        tags, results = self._queue.take(n)
        for work in list(self._works.values()):
            if work.n_in_flight:
                n -= self._settle(work, tags, results)
            if not n:
                return

    def _settle(self, work: _Work, tags: I64, results: I64) -> int:
        """Take from results what belongs to `work`; returns how many."""
        nbytes = work.plan.nbytes
        n, wanted_bytes, are_whole = self._steps.settle(tags, results, work.number, nbytes)
        work.n_in_flight -= n
        work.bytes_read += wanted_bytes
        if not are_whole:
            mine = tags >> TAG_BITS == work.number
            requests, got = tags[mine] & REQUEST_MASK, results[mine]
            for k in np.flatnonzero(got != nbytes[requests]).tolist():
                self._repair(work, int(requests[k]), int(got[k]))
        self._end_if_done(work)
        return n

    def _repair(self, work: _Work, i: int, result: int) -> None:
        """Carry out a request anew that came back incomplete; any other failure is the batch's."""
        try:
            if result < 0 and -result not in _INCOMPLETE:
                raise read_failure(self.file, int(work.plan.offsets[i]), int(work.plan.nbytes[i]), 0, -result)
            if work.error is None:
                work.n_requests += read_fully(self.file, work.plan, i)
        except FlashReadError as error:
            work.fail(error)

    def _feed(self) -> None:
        """Push requests until the queue is full or none are left."""
        for lane in self._lanes:
            while lane:
                work = lane[0]
                if work.is_fed:
                    lane.popleft()
                    self._end_if_done(work)
                elif self._n_in_flight == self._depth or not self._push(work):
                    return

    def _push(self, work: _Work) -> bool:
        """Push what fits of a batch; False where the kernel took nothing for now."""
        start = work.n_pushed
        stop = min(start + self._depth - self._n_in_flight, work.n_planned)
        if self._n_in_flight == 0:
            stop = min(stop, start + _FIRST_PUSH)
        try:
            n = self._queue.push(work.entries, start, stop)
        except OSError as error:
            self._refuse(work, error.errno or 0)
            return True
        if n == 0 and self._n_in_flight == 0:  # nothing whose end would make room
            self._n_refusals += 1
            if self._n_refusals > _MAX_REFUSALS:
                self._refuse(work, next(iter(RETRIES)))
            return False
        self._n_refusals = 0
        work.n_pushed += n
        work.n_in_flight += n
        work.n_requests += n
        self._n_in_flight += n
        return n > 0

    def _refuse(self, work: _Work, number: int) -> None:
        i = work.n_pushed
        work.fail(read_failure(self.file, int(work.plan.offsets[i]), int(work.plan.nbytes[i]), 0, number))

    def _end_if_done(self, work: _Work) -> None:
        if work.is_fed and not work.n_in_flight and not work.pending.has_ended:
            self._works.pop(work.number, None)
            if work.n_pushed < work.n_planned:  # a cancelled one has no error yet
                work.fail(closed_reader(self.file))
            work.finish()

    def _mend(self) -> None:
        """Where a change of state was broken off: let all requests end, and fail the batches under way."""
        if not self._is_torn:
            return
        try:
            self._queue.clear()
        except OSError as error:
            self._abandon(error)
        else:
            self._drop_all(FlashReadError("reading was interrupted", path=self.file.path))
        self._is_torn = False

    def _abandon(self, cause: OSError) -> None:
        """Fail all there is and all that comes, after waiting for completions has itself failed."""
        self._breakdown = FlashReadError(f"the kernel's queue broke down: {cause.strerror}", path=self.file.path)
        self._drop_all(self._breakdown)

    def _drop_all(self, error: FlashReadError) -> None:
        for lane in self._lanes:
            lane.clear()
        self._n_in_flight = 0
        while self._works:
            work = next(iter(self._works.values()))
            work.fail(error)
            work.finish()
            del self._works[work.number]
