"""Readers of bundles that an ablation needs: one that knows what beginning reads costs, one that reads in halves.

Knows: range readers. Does not know: neurons, how bytes are moved.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from flashfmt.layout import round_up
from reference_engine.active_bundles import OpenReader
from reference_engine.flash_io import IoCounters, Pending, RangeReader
from reference_engine.flash_io.range_reader import Buffer
from reference_engine.flash_io.request_plan import I64, RequestPlan


class Clock:
    """Seconds, added up."""

    def __init__(self) -> None:
        self.seconds = 0.0


class _AroundReader:
    """What `RangeReader`s have in common that read with another one."""

    def __init__(self, inner: RangeReader) -> None:
        self.name = inner.name
        self.file = inner.file
        self._inner = inner

    @property
    def counters(self) -> IoCounters:
        """What reading has cost so far."""
        return self._inner.counters

    def close(self) -> None:
        """Close what it reads with."""
        self._inner.close()


class TimedReader(_AroundReader):
    """A `RangeReader` that adds the time ``submit`` takes to `clock`; what ``wait`` takes is counted elsewhere."""

    def __init__(self, inner: RangeReader, clock: Clock) -> None:
        super().__init__(inner)
        self._clock = clock

    def submit(
        self, offsets: I64, nbytes: I64 | int, buffer: Buffer, positions: I64, *, ahead: bool = False
    ) -> Pending:
        """Begin to read; see `RangeReader.submit`."""
        began = time.perf_counter()
        pending = self._inner.submit(offsets, nbytes, buffer, positions, ahead=ahead)
        self._clock.seconds += time.perf_counter() - began
        return pending


class UnbundledReader(_AroundReader):
    """A `RangeReader` that reads every range in `n_parts` requests, as if its parts lay in different matrices.

    All first parts are requested before the first second part, so that the system has no neighbours to merge. Ranges
    are of one size; they are cut at multiples of the file's alignment.
    """

    def __init__(self, inner: RangeReader, n_parts: int) -> None:
        super().__init__(inner)
        self._n_parts = n_parts

    def submit(
        self, offsets: I64, nbytes: I64 | int, buffer: Buffer, positions: I64, *, ahead: bool = False
    ) -> Pending:
        """Begin to read; see `RangeReader.submit`.

        Raises
        ------
        ValueError
            If the ranges are of different sizes.
        """
        if not isinstance(nbytes, int):
            raise ValueError("ranges of one size are read in parts")
        step = round_up(-(-nbytes // self._n_parts), self.file.alignment)
        pieces = [(start, min(step, nbytes - start)) for start in range(0, nbytes, step)]
        return _Together(
            [
                self._inner.submit(offsets + start, size, buffer, positions + start, ahead=ahead)
                for start, size in pieces
            ]
        )


class _Together(Pending):
    """Several batches as one."""

    def __init__(self, parts: Sequence[Pending]) -> None:
        self._parts = parts
        self.ahead = parts[0].ahead
        plans = [part.plan for part in parts]
        self.plan = RequestPlan(
            offsets=np.concatenate([plan.offsets for plan in plans]),
            nbytes=np.concatenate([plan.nbytes for plan in plans]),
            segments=np.concatenate([plan.segments for plan in plans]),
            first_segment=np.concatenate([plan.first_segment for plan in plans]),
            n_segments=np.concatenate([plan.n_segments for plan in plans]),
        )

    @property
    def is_cancelled(self) -> bool:
        """Whether the reader may leave out what it has not begun."""
        return any(part.is_cancelled for part in self._parts)

    @is_cancelled.setter
    def is_cancelled(self, value: bool) -> None:
        for part in self._parts:
            part.is_cancelled = value

    @property
    def is_done(self) -> bool:
        """Whether ``wait`` would return, or raise, at once."""
        return all(part.is_done for part in self._parts)

    def wait(self) -> None:
        """Return when all parts are there; raises what the first failing one met, once none is in flight."""
        failure: Exception | None = None
        for part in self._parts:
            try:
                part.wait()
            except Exception as error:  # noqa: BLE001  (raised when the others have ended)
                failure = failure or error
        if failure is not None:
            raise failure


def timed(opener: OpenReader, clock: Clock) -> OpenReader:
    """An opener of readers whose ``submit`` is timed."""
    return lambda path: TimedReader(opener(path), clock)


def unbundled(opener: OpenReader, n_parts: int) -> OpenReader:
    """An opener of readers that read every bundle in `n_parts` requests."""
    return lambda path: UnbundledReader(opener(path), n_parts)
