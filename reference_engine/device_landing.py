"""The way of bundles from flash to the device: direct reads into page-locked slots, then copies beside the arithmetic.

A ring of page-locked buffers, each with its twin on the device. Reads of several buffers are under way at a time;
what has arrived is copied in the copy queue while kernels run in the compute queue.

Knows: byte ranges, buffers, queues. Does not know: neurons, slots, what the bytes mean.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flashfmt.layout import round_up
from reference_engine.backends.cupy_protocol import Bytes, Device, DeviceArray, Event
from reference_engine.flash_io import IO_ALIGNMENT, Pending, RangeReader

I64 = npt.NDArray[np.int64]


@dataclass(slots=True)
class _Berth:
    """A page-locked buffer, its twin, and what must have happened before each is written to again."""

    host: Bytes
    twin: DeviceArray
    copied: Event = None
    read_by: Event = None


@dataclass(slots=True)
class Arriving:
    """Ranges being read into a buffer of the ring."""

    pending: Pending
    data: Bytes
    """uint8 [total of the ranges]: page-locked, valid once `pending` has ended."""
    is_ahead: bool
    _berth: Any


class LandingRing:
    """Buffers for `n_buffers` batches of at most `nbytes` bytes."""

    def __init__(self, device: Device, n_buffers: int, nbytes: int) -> None:
        self._device = device
        nbytes = round_up(nbytes, IO_ALIGNMENT)
        arena = device.pinned(n_buffers * nbytes)
        self._free = [
            _Berth(arena[i * nbytes : (i + 1) * nbytes], device.empty((nbytes,), np.uint8)) for i in range(n_buffers)
        ]
        self._n_buffers = n_buffers
        self._n_ahead = 0
        self.wait_seconds = 0.0

    def has_room(self, *, ahead: bool = False) -> bool:
        """Whether another batch can be begun. Half of the buffers are never lent to what is read ahead."""
        return bool(self._free) and not (ahead and self._n_ahead >= self._n_buffers // 2)

    def begin(self, reader: RangeReader, offsets: I64, nbytes: int, *, ahead: bool = False) -> Arriving:
        """Begin to read ranges of `nbytes` bytes each, one behind the other, into a free buffer.

        Parameters
        ----------
        offsets : int64 [n], sorted file offsets.
        ahead : let every request of other batches go first.
        """
        berth = self._free[0]
        if berth.copied is not None:
            self._device.synchronize(berth.copied)
        positions = np.arange(len(offsets), dtype=np.int64) * nbytes
        pending = reader.submit(offsets, nbytes, berth.host, positions, ahead=ahead)
        self._free.pop(0)
        self._n_ahead += ahead
        return Arriving(pending, berth.host[: len(offsets) * nbytes], ahead, berth)

    def wait(self, arriving: Arriving) -> None:
        """Return when all ranges have arrived.

        Raises
        ------
        FlashReadError
        """
        began = time.perf_counter()
        try:
            arriving.pending.wait()
        finally:
            self.wait_seconds += time.perf_counter() - began

    def send(self, arriving: Arriving, target: DeviceArray | None = None) -> DeviceArray:
        """Begin to copy what has arrived to the device; later work in the copy queue finds it in the result.

        Parameters
        ----------
        target : where to, uint8 of that size; the buffer's twin where None.
        """
        berth: _Berth = arriving._berth
        if target is None:
            if berth.read_by is not None:
                self._device.wait("copy", berth.read_by)
            target = berth.twin[: arriving.data.nbytes]
        self._device.copy_in(target, arriving.data)
        berth.copied = self._device.record("copy")
        return target

    def release(self, arriving: Arriving, read_by: Event = None) -> None:
        """Give the buffer back. Its twin is not written to before `read_by`; the copy queue keeps its own order."""
        berth: _Berth = arriving._berth
        if read_by is not None:  # else whoever read it before may still do so
            berth.read_by = read_by
        self._n_ahead -= arriving.is_ahead
        self._free.append(berth)
