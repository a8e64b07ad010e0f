"""Reads a fixed list of ranges over and over, always a few ranges ahead of the reader of the bytes.

Exact mode needs every streamed block once a pass, in the same order each time. So nothing has to be asked for:
background threads fill a ring of buffers in that order while the consumer computes with earlier ones, from one
token into the next.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashfmt.layout import round_up
from reference_engine.flash_io.aligned_memory import IO_ALIGNMENT, aligned_empty
from reference_engine.flash_io.direct_file import DirectFile

Buffer = npt.NDArray[np.uint8]
CheckArrival = Callable[[int, Buffer], None]


@dataclass(frozen=True, slots=True)
class StreamRange:
    """``[offset, offset + nbytes)`` of `file`; `offset` is a multiple of `IO_ALIGNMENT`."""

    file: DirectFile
    offset: int
    nbytes: int


class CyclicStream:
    """Delivers `ranges` in order, again and again: ``take()`` the next, use it, ``give_back()`` its buffer.

    Parameters
    ----------
    ranges : at least one.
    n_slots : buffers in the ring, each as large as the largest range.
    n_readers : threads that read, at most `n_slots`; two keep a device busy while one of them is between requests.
    check : called on a reader's thread with (index of the range, its bytes); what it raises reaches ``take()``.
    """

    def __init__(
        self,
        ranges: Sequence[StreamRange],
        *,
        n_slots: int,
        n_readers: int = 2,
        check: CheckArrival | None = None,
    ) -> None:
        if not ranges or n_slots < 1:
            raise ValueError("a stream needs ranges and slots")
        self._ranges = tuple(ranges)
        self._check = check
        slot_nbytes = round_up(max(r.nbytes for r in ranges), IO_ALIGNMENT)
        ring = aligned_empty(n_slots * slot_nbytes)
        self._slots = [ring[i * slot_nbytes : (i + 1) * slot_nbytes] for i in range(n_slots)]
        self._changed = threading.Condition()
        self._next_read = 0  # ticket of the next range to read; tickets count on over all passes
        self._next_take = 0  # ticket that the consumer takes next
        self._n_released = 0
        self._arrived: set[int] = set()
        self._error: BaseException | None = None
        self._closed = False
        self.wait_seconds = 0.0
        self._threads = [
            threading.Thread(target=self._read_ahead, name=f"flash-read-{i}", daemon=True)
            for i in range(min(n_readers, n_slots))
        ]
        for thread in self._threads:
            thread.start()

    def take(self) -> tuple[int, Buffer]:
        """Wait for the next range; returns (its index, its bytes). One range is held at a time.

        Raises
        ------
        FlashReadError, ChecksumError
            Whatever reading or checking this or an earlier range met; the stream is then dead.
        """
        with self._changed:
            if self._n_released != self._next_take:
                raise RuntimeError("the last range was not given back")
            ticket = self._next_take
            if ticket not in self._arrived and self._error is None:
                started = time.perf_counter()
                self._changed.wait_for(lambda: ticket in self._arrived or self._error is not None or self._closed)
                self.wait_seconds += time.perf_counter() - started
            if ticket not in self._arrived:
                raise self._error or RuntimeError("the stream is closed")
            self._arrived.discard(ticket)
            self._next_take += 1
        index = ticket % len(self._ranges)
        return index, self._slots[ticket % len(self._slots)][: self._ranges[index].nbytes]

    def give_back(self) -> None:
        """Let the buffer of the range taken last be filled anew."""
        with self._changed:
            if self._n_released != self._next_take:
                self._n_released += 1
                self._changed.notify_all()

    def rewind(self) -> None:
        """Make the next ``take()`` deliver range 0, after a pass that was broken off."""
        self.give_back()
        while self._next_take % len(self._ranges):
            self.take()
            self.give_back()

    def close(self) -> None:
        """Stop reading and wait for the readers to end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _read_ahead(self) -> None:
        while (ticket := self._claim()) is not None:
            index = ticket % len(self._ranges)
            wanted = self._ranges[index]
            slot = self._slots[ticket % len(self._slots)]
            try:
                wanted.file.read_into(slot, wanted.offset, wanted.nbytes)
                if self._check is not None:
                    self._check(index, slot[: wanted.nbytes])
            except BaseException as error:  # noqa: BLE001  (re-raised where the bytes are wanted)
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify_all()
                return
            with self._changed:
                self._arrived.add(ticket)
                self._changed.notify_all()

    def _claim(self) -> int | None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._error is not None or self._next_read < self._n_released + len(self._slots)
            )
            if self._closed or self._error is not None:
                return None
            self._next_read += 1
            return self._next_read - 1
