"""Bundles from flash straight to their slots on the device, by kvikio (NVIDIA's cuFile, GPUDirect Storage).

Nothing of it passes through the CUDA queues: a slot must be out of use before its read begins, and who computes with it
waits for the read first. kvikio cannot take a read back, and knows no precedence between reads.

Signatures are those of kvikio 25.10 to 26.10.

Knows: kvikio, byte ranges, rows. Does not know: neurons, checksums, whether this way is the faster one.
"""

from __future__ import annotations

import importlib
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from flashfmt.errors import FlashError, FlashReadError, MissingExtraError
from reference_engine.backends.cupy_protocol import DeviceArray
from reference_engine.device_slots import Slots
from reference_engine.flash_io import IoCounters

I64 = npt.NDArray[np.int64]

_EXTRAS: Final = "flashfmt[gds] for CUDA 12, flashfmt[gds-cuda13] for CUDA 13"
_THREADS: Final = 32  # each has one read in flight
_BOUNCE_NBYTES: Final = 1 << 20  # page-locked, for each thread that must go by way of the host
_KVIKIO_ERRORS: Final = (RuntimeError, OSError, ValueError)  # what its C++ exceptions become


def load_kvikio() -> Any:
    """kvikio, set up for many small reads. Its settings are those of the process.

    Raises
    ------
    MissingExtraError
        If it is not installed; names the extras that bring it.
    FlashError
        If it cannot be loaded, or would go by way of the host anyway: cuFile is missing, or its compatibility mode on.
    """
    try:
        kvikio, defaults = importlib.import_module("kvikio"), importlib.import_module("kvikio.defaults")
    except ImportError as error:
        raise MissingExtraError(f"kvikio is not installed; {_EXTRAS}") from error
    except _KVIKIO_ERRORS as error:
        raise FlashError(f"kvikio cannot be loaded: {error}") from error
    if defaults.is_compat_mode_preferred():
        raise FlashError("kvikio is in its compatibility mode: there is no cuFile here")
    # What is below the threshold kvikio reads at once and by way of the host, and it has one thread at first.
    defaults.set({"gds_threshold": 0, "num_threads": _THREADS, "bounce_buffer_size": _BOUNCE_NBYTES})
    return kvikio


class SlotReader:
    """Reads ranges of one file to rows of device arrays.

    Raises
    ------
    FlashReadError
        If the file cannot be opened.
    """

    def __init__(self, kvikio: Any, path: Path) -> None:
        self.path = path
        self._bytes_read = self._n_requests = 0
        try:
            self._file = kvikio.CuFile(path, "r")
        except _KVIKIO_ERRORS as error:
            raise FlashReadError(f"kvikio cannot open this file: {error}", path=path) from error

    @property
    def counters(self) -> IoCounters:
        """What reading has cost so far; seconds are counted by whoever waits."""
        return IoCounters(self._bytes_read, self._n_requests)

    def begin(self, offsets: I64, rows: DeviceArray, slots: Slots) -> SlotReads:
        """Begin to read a row's bytes at each of `offsets`; what fails is raised by `SlotReads.wait`.

        Parameters
        ----------
        offsets : int64 [n], bytes from the file's start; multiples of 4096 are read fastest.
        rows : uint8 [n_slots, nbytes] on the device.
        slots : int32 [n], which row each range goes to. Nothing that was put into a queue may use those any more.
        """
        reads = SlotReads(self.path, rows)
        reads.begin(self._file, offsets, slots)
        self._n_requests += len(reads)
        self._bytes_read += len(reads) * rows.shape[1]
        return reads

    def close(self) -> None:
        """Close the file; no read may be in flight."""
        self._file.close()


class SlotReads:
    """Reads to rows of a device array that were begun. The rows belong to them until `wait` returns or raises."""

    def __init__(self, path: Path, rows: DeviceArray) -> None:
        self._path = path
        self._rows = rows  # kvikio does not keep it alive
        self._nbytes: int = rows.shape[1]
        self._futures: deque[tuple[int, Any]] = deque()
        self._error: FlashReadError | None = None

    def __len__(self) -> int:
        return len(self._futures)

    def begin(self, file: Any, offsets: I64, slots: Slots) -> None:
        """Begin to read, for `SlotReader`."""
        try:
            for offset, slot in zip(offsets.tolist(), slots.tolist(), strict=True):
                try:
                    future = file.pread(self._rows[slot], size=self._nbytes, file_offset=offset)
                except _KVIKIO_ERRORS as error:
                    self._fail(offset, 0, str(error))
                    return
                self._futures.append((offset, future))
        except BaseException:
            self._drain()
            raise

    def wait(self) -> None:
        """Return when every range is in its row.

        Raises
        ------
        FlashReadError
            Naming path, offset and byte counts of the first range that could not be read. Nothing is in flight then.
        """
        try:
            while self._futures:
                offset, future = self._futures.popleft()  # a future may be asked but once
                try:
                    got = future.get()
                except _KVIKIO_ERRORS as error:
                    self._fail(offset, 0, str(error))
                    continue
                if got != self._nbytes:
                    self._fail(offset, got, "the file ends inside a range")
        except BaseException:  # a signal's handler raised: the rows must be left in peace all the same
            self._drain()
            raise
        if self._error is not None:
            raise self._error

    def _drain(self) -> None:
        while self._futures:
            with suppress(*_KVIKIO_ERRORS):
                self._futures.popleft()[1].get()

    def _fail(self, offset: int, got: int, why: str) -> None:
        if self._error is None:
            self._error = FlashReadError(
                f"a read straight to the device failed: {why}",
                path=self._path,
                where=offset + got,
                expected=f"{self._nbytes} bytes from {offset}",
                actual=f"{got}",
            )
