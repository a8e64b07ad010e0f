"""Which backend reads a file: the one asked for, or the first that works here, found by trying it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final, Literal, Protocol

from flashfmt.errors import FlashReadError
from reference_engine.flash_io.aio_queue import AioQueue
from reference_engine.flash_io.aligned_memory import IO_ALIGNMENT
from reference_engine.flash_io.device_profile import DEFAULT_BACKENDS, load_profile
from reference_engine.flash_io.mmap_reader import MmapReader
from reference_engine.flash_io.open_file import OpenFile, open_file
from reference_engine.flash_io.pread_reader import PreadReader
from reference_engine.flash_io.queue_reader import QueueReader
from reference_engine.flash_io.range_reader import IoTuning, RangeReader
from reference_engine.flash_io.uring_queue import UringQueue

BackendName = Literal["uring", "aio", "pread", "mmap"]
_NEEDS_DIRECT: Final = ("uring", "aio")


def _uring(file: OpenFile, tuning: IoTuning, *, compiled: bool) -> RangeReader:
    if compiled:
        from reference_engine.flash_io.numba_queue import CompiledSteps, CompiledUringQueue

        return QueueReader("uring", file, tuning, CompiledUringQueue, CompiledSteps)
    return QueueReader("uring", file, tuning, UringQueue)


def _aio(file: OpenFile, tuning: IoTuning, *, compiled: bool) -> RangeReader:
    if compiled:
        from reference_engine.flash_io.numba_queue import CompiledAioQueue, CompiledSteps

        return QueueReader("aio", file, tuning, CompiledAioQueue, CompiledSteps)
    return QueueReader("aio", file, tuning, AioQueue)


def _pread(file: OpenFile, tuning: IoTuning, *, compiled: bool) -> RangeReader:
    return PreadReader(file, tuning)


def _mmap(file: OpenFile, tuning: IoTuning, *, compiled: bool) -> RangeReader:
    return MmapReader(file, tuning)


class _Opens(Protocol):
    def __call__(self, file: OpenFile, tuning: IoTuning, *, compiled: bool) -> RangeReader: ...


_BACKENDS: Final[dict[str, _Opens]] = {"uring": _uring, "aio": _aio, "pread": _pread, "mmap": _mmap}


def open_reader(
    path: Path,
    *,
    backend: BackendName | Literal["auto"] = "auto",
    tuning: IoTuning | None = None,
    range_alignment: int = IO_ALIGNMENT,
    compiled: bool | None = None,
) -> RangeReader:
    """Open `path` for reading many ranges at once.

    Parameters
    ----------
    backend : ``auto`` takes the device profile's choice first, then the quickest that works: kernel queues for direct
        reads, threads otherwise.
    tuning : what the device profile says, by default.
    range_alignment : what offsets, sizes and addresses will be multiples of. Where the device's direct reads need
        more, the file is read buffered.
    compiled : drive kernel queues by compiled functions, which need numba; by default where this process has loaded it.

    Raises
    ------
    FlashReadError
        If the file cannot be opened, or the backend that was asked for does not work here.
    """
    compiled = "numba" in sys.modules if compiled is None else compiled
    profile = load_profile(path)
    tuning = tuning or profile.tuning
    names = [backend] if backend != "auto" else list(dict.fromkeys((profile.backend, *DEFAULT_BACKENDS)))
    file = open_file(path, range_alignment=range_alignment, direct=backend != "mmap")
    failures = []
    for name in names:
        if name in _NEEDS_DIRECT and not file.is_direct:
            failures.append(f"{name}: the file system or the ranges' alignment allows no direct reads")
            continue
        try:
            return _BACKENDS[name](file, tuning, compiled=compiled)
        except OSError as error:
            failures.append(f"{name}: {error.strerror}")
        except BaseException:
            file.close()
            raise
    file.close()
    raise FlashReadError(f"no way to read works here: {'; '.join(failures)}", path=path)
