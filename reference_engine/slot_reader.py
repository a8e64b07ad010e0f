"""Reads rows of a file straight into scattered slots of a matrix: sorted rows in, filled slots out, wait.

`plan_requests` is pure: which neighbouring rows are read in one request, small gaps included. `SlotReader` performs
such requests on a few threads, each as one vectored read past the page cache whose pieces are the slots. What is
demanded goes before what is only expected to be needed.

Knows: files, offsets, strides, slots. Does not know: neurons, layers, why something is read.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from flashfmt.errors import FlashReadError
from flashfmt.layout import round_up
from reference_engine.flash_io import IO_ALIGNMENT, IoCounters, aligned_empty

GAP_BYTES: Final = 12 << 10  # reading this much for nothing takes as long as another request
REQUEST_BYTES: Final = 256 << 10
N_THREADS: Final = 16
_DEVICE_ALIGNMENTS: Final = (512, IO_ALIGNMENT)

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class RowTable:
    """Rows of `stride` bytes in a file: row i begins at ``offset + i * stride``."""

    path: Path
    offset: int
    stride: int


class ReadBatch(Protocol):
    """Reads under way. Row j of a batch is the j-th of those submitted."""

    @property
    def nbytes(self) -> int:
        """Bytes that all requests read, gaps included."""
        ...

    @property
    def n_requests(self) -> int:
        """Requests made."""
        ...

    def wait(self, n_rows: int) -> None:
        """Return when the first `n_rows` rows have arrived or failed."""
        ...

    def failures(self) -> dict[int, FlashReadError]:
        """What the rows that failed so far failed with, by their place in the batch."""
        ...

    def demand(self) -> None:
        """Put what is still to be read before everything that is only expected."""
        ...

    def cancel(self) -> list[int]:
        """Give up what was not begun; returns the places of these rows, which count as neither arrived nor failed."""
        ...


def plan_requests(rows: Indices, stride: int) -> list[tuple[int, int]]:
    """Cut sorted, unique row numbers into requests.

    Parameters
    ----------
    rows : int32 [n].
    stride : bytes of a row.

    Returns
    -------
    Half-open ranges of places in `rows`, in order, that cover them all. A request reads from its first row to its last
    one, at most `REQUEST_BYTES` unless it is a single row, with gaps of at most `GAP_BYTES` between rows.
    """
    n = len(rows)
    if n == 0:
        return []
    is_break = (np.diff(rows) - 1) > GAP_BYTES // stride
    starts = [0, *(np.flatnonzero(is_break) + 1).tolist(), n]
    limit = max(REQUEST_BYTES // stride, 1)
    requests: list[tuple[int, int]] = []
    for first, last in pairwise(starts):
        begin = first
        while rows[last - 1] - rows[begin] >= limit:
            end = begin + int(np.searchsorted(rows[begin:last], rows[begin] + limit))
            requests.append((begin, end))
            begin = end
        requests.append((begin, last))
    return requests


def reader_nbytes(strides: Iterable[int]) -> int:
    """DRAM that a `SlotReader` takes at most for tables of these strides."""
    widest = max(strides)
    bounce = max(REQUEST_BYTES, widest) + 2 * IO_ALIGNMENT if widest % IO_ALIGNMENT else 0
    return GAP_BYTES + N_THREADS * (bounce + _THREAD_BYTES)


_THREAD_BYTES: Final = 64 << 10  # of a stack that shallow calls touch


class SlotReader:
    """Threads that read rows of files into slots.

    Files that do not allow direct reads are read buffered, and dropped from the page cache at once.
    """

    def __init__(self, n_threads: int = N_THREADS) -> None:
        self._files: dict[Path, _File] = {}
        self._available = threading.Condition()
        self._demanded: deque[tuple[_Batch, int]] = deque()
        self._expected: deque[tuple[_Batch, int]] = deque()
        self._is_closed = False
        self._bytes_read = 0
        self._n_requests = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"slot-read-{i}", daemon=True) for i in range(n_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, table: RowTable, rows: Indices, target: Bytes, slots: Indices, *, expected: bool) -> ReadBatch:
        """Begin to read some rows of a table; returns at once.

        Parameters
        ----------
        rows : int32 [n], sorted, unique.
        target : uint8 [n_slots, stride], C-contiguous, at a multiple of `IO_ALIGNMENT`. Its rows `slots` belong to
            the reader until the batch has arrived.
        slots : int32 [n], where each row goes.
        expected : read after everything that is demanded.

        Raises
        ------
        FlashReadError
            If the file cannot be opened. Errors of reading are left to `ReadBatch.failures`.
        """
        batch = _Batch(self, self._file(table.path), table, rows, target=target, slots=slots)
        with self._available:
            queue = self._expected if expected else self._demanded
            queue.extend((batch, i) for i in range(len(batch.requests)))
            self._available.notify(len(batch.requests))
        return batch

    @property
    def counters(self) -> IoCounters:
        """Bytes and requests so far; waiting is known to the caller only."""
        with self._available:
            return IoCounters(self._bytes_read, self._n_requests)

    def close(self) -> None:
        """Finish the reads under way, end the threads, close the files. What was not begun is not read."""
        with self._available:
            self._is_closed = True
            self._available.notify_all()
        for thread in self._threads:
            thread.join()
        for file in self._files.values():
            os.close(file.fd)
        self._files.clear()

    def _file(self, path: Path) -> _File:
        if path not in self._files:
            self._files[path] = _File(path)
        return self._files[path]

    def _promote(self, batch: _Batch) -> None:
        with self._available:
            self._demanded.extend((batch, i) for i in _taken_out(self._expected, batch))

    def _withdraw(self, batch: _Batch) -> list[int]:
        with self._available:
            return _taken_out(self._demanded, batch) + _taken_out(self._expected, batch)

    def _work(self) -> None:
        bounce: Bytes | None = None
        n_requests = nbytes = 0
        while True:
            with self._available:
                self._n_requests += n_requests
                self._bytes_read += nbytes
                self._available.wait_for(lambda: self._is_closed or self._demanded or self._expected)
                if self._is_closed:
                    return
                batch, index = (self._demanded or self._expected).popleft()
            if batch.needs_bounce and (bounce is None or len(bounce) < batch.bounce_nbytes):
                bounce = aligned_empty(batch.bounce_nbytes)
            n_requests, nbytes = batch.perform(index, bounce)


class _File:
    """A file open for direct reads where the file system allows them; `alignment` is 1 where it does not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd, self.alignment = self._open_direct()
        except OSError as error:
            raise FlashReadError(f"cannot open: {error.strerror}", path=path) from error

    def _open_direct(self) -> tuple[int, int]:
        flags = os.O_RDONLY | os.O_CLOEXEC
        if hasattr(os, "O_DIRECT"):
            try:
                fd = os.open(self.path, flags | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:  # tmpfs and some overlay or FUSE file systems
                    raise
            else:
                return fd, next((a for a in _DEVICE_ALIGNMENTS if _allows(fd, a)), IO_ALIGNMENT)
        return os.open(self.path, flags), 1

    def read(self, buffers: list[memoryview], offset: int, nbytes: int) -> None:
        """Fill `buffers`, `nbytes` in all, from `offset` on."""
        done = 0
        while done < nbytes:
            try:
                got = os.preadv(self.fd, buffers, offset + done)
            except OSError as error:
                message = f"read of {nbytes} bytes failed: {error.strerror}"
                raise FlashReadError(message, path=self.path, where=offset) from error
            done += got
            if got == 0 or (got % self.alignment and done < nbytes):
                raise FlashReadError(
                    "the file ends inside a range",
                    path=self.path,
                    where=offset + done,
                    expected=f"{nbytes} bytes from {offset}",
                    actual=done,
                )
            if done < nbytes:
                buffers = _behind(buffers, got)
        if self.alignment == 1 and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


class _Batch:
    """`ReadBatch` of a `SlotReader`."""

    def __init__(
        self, reader: SlotReader, file: _File, table: RowTable, rows: Indices, *, target: Bytes, slots: Indices
    ) -> None:
        self._reader = reader
        self._file = file
        self._table = table
        self._rows: list[int] = rows.tolist()
        self._slots: list[int] = slots.tolist()
        self._target = target.reshape(-1).data
        self.requests = plan_requests(rows, table.stride)
        spans = [(self._rows[last - 1] - self._rows[first] + 1) * table.stride for first, last in self.requests]
        self.nbytes = sum(spans)
        self.n_requests = len(spans)
        self.needs_bounce = bool(table.offset % file.alignment or table.stride % file.alignment)
        self.bounce_nbytes = round_up(max(spans, default=0), IO_ALIGNMENT) + 2 * IO_ALIGNMENT
        self._is_done = [False] * len(spans)
        self._n_done = 0  # requests from the first on, without a gap
        self._changed = threading.Condition()
        self._failures: dict[int, FlashReadError] = {}

    def wait(self, n_rows: int) -> None:
        """See `ReadBatch.wait`."""
        with self._changed:
            self._changed.wait_for(lambda: self._n_done == self.n_requests or self.requests[self._n_done][0] >= n_rows)

    def failures(self) -> dict[int, FlashReadError]:
        """See `ReadBatch.failures`."""
        with self._changed:
            return dict(self._failures)

    def demand(self) -> None:
        """See `ReadBatch.demand`."""
        self._reader._promote(self)

    def cancel(self) -> list[int]:
        """See `ReadBatch.cancel`."""
        withdrawn = self._reader._withdraw(self)
        for index in withdrawn:
            self._finish(index, {})
        return [i for index in withdrawn for i in range(*self.requests[index])]

    def perform(self, index: int, bounce: Bytes | None) -> tuple[int, int]:
        """Read one request; returns (requests, bytes) that were asked of the system."""
        first, last = self.requests[index]
        cost, failures = self._read(first, last, bounce)
        self._finish(index, failures)
        return cost

    def _finish(self, index: int, failures: dict[int, FlashReadError]) -> None:
        with self._changed:
            self._failures.update(failures)
            self._is_done[index] = True
            while self._n_done < self.n_requests and self._is_done[self._n_done]:
                self._n_done += 1
            self._changed.notify_all()

    def _read(self, first: int, last: int, bounce: Bytes | None) -> tuple[tuple[int, int], dict[int, FlashReadError]]:
        """Read rows `first` to `last`; one by one where they fail together, to know which of them cannot be read."""
        stride = self._table.stride
        offset = self._table.offset + self._rows[first] * stride
        nbytes = (self._rows[last - 1] - self._rows[first] + 1) * stride
        try:
            if self.needs_bounce and bounce is not None:
                self._read_by_bounce(first, last, offset, nbytes, bounce)
            else:
                self._file.read(self._pieces(first, last), offset, nbytes)
        except FlashReadError as error:
            if last - first == 1:
                return (1, nbytes), {first: error}
        else:
            return (1, nbytes), {}
        results = [self._read(i, i + 1, bounce) for i in range(first, last)]
        failures = {place: error for _, failed in results for place, error in failed.items()}
        return (1 + len(results), nbytes + sum(cost[1] for cost, _ in results)), failures

    def _pieces(self, first: int, last: int) -> list[memoryview]:
        stride, rows, slots, target = self._table.stride, self._rows, self._slots, self._target
        pieces = [target[slots[first] * stride : (slots[first] + 1) * stride]]
        for i in range(first + 1, last):
            gap = (rows[i] - rows[i - 1] - 1) * stride
            if gap:
                pieces.append(_GAP[:gap])
            pieces.append(target[slots[i] * stride : (slots[i] + 1) * stride])
        return pieces

    def _read_by_bounce(self, first: int, last: int, offset: int, nbytes: int, bounce: Bytes) -> None:
        """Read whole blocks around the range and copy the rows out, where rows do not begin at blocks."""
        stride, begin = self._table.stride, offset - offset % self._file.alignment
        covered = round_up(offset + nbytes - begin, self._file.alignment)
        self._file.read([bounce[:covered].data], begin, covered)
        for i in range(first, last):
            start = offset - begin + (self._rows[i] - self._rows[first]) * stride
            self._target[self._slots[i] * stride : (self._slots[i] + 1) * stride] = bounce[start : start + stride].data


_GAP: Final = aligned_empty(GAP_BYTES).data  # where the bytes between wanted rows go; never looked at


def _taken_out(queue: deque[tuple[_Batch, int]], batch: _Batch) -> list[int]:
    """Remove the requests of a batch from a queue; returns their numbers."""
    kept, taken = [], []
    for task in queue:
        if task[0] is batch:
            taken.append(task[1])
        else:
            kept.append(task)
    if taken:
        queue.clear()
        queue.extend(kept)
    return taken


def _allows(fd: int, alignment: int) -> bool:
    """Whether a direct read may begin at any multiple of `alignment`."""
    probe = aligned_empty(2 * IO_ALIGNMENT)[alignment : 2 * alignment]
    try:
        os.preadv(fd, [probe.data], alignment)
    except OSError:
        return False
    return True


def _behind(buffers: list[memoryview], done: int) -> list[memoryview]:
    """What is left of `buffers` after their first `done` bytes."""
    left = []
    for buffer in buffers:
        if done < len(buffer):
            left.append(buffer[done:] if done else buffer)
        done = max(done - len(buffer), 0)
    return left
