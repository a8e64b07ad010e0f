"""Which backend reads a file: the one asked for, or the first that works here, found by trying it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

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


def _uring(file: OpenFile, tuning: IoTuning) -> RangeReader:
    return QueueReader("uring", file, tuning, UringQueue)


def _aio(file: OpenFile, tuning: IoTuning) -> RangeReader:
    return QueueReader("aio", file, tuning, AioQueue)


BACKENDS: Final[dict[str, Callable[[OpenFile, IoTuning], RangeReader]]] = {
    "uring": _uring,
    "aio": _aio,
    "pread": PreadReader,
    "mmap": MmapReader,
}


def open_reader(
    path: Path,
    *,
    backend: BackendName | Literal["auto"] = "auto",
    tuning: IoTuning | None = None,
    range_alignment: int = IO_ALIGNMENT,
) -> RangeReader:
    """Open `path` for reading many ranges at once.

    Parameters
    ----------
    backend : ``auto`` takes the device profile's choice first, then the quickest that works: kernel queues for direct
        reads, threads otherwise.
    tuning : what the device profile says, by default.
    range_alignment : what offsets, sizes and addresses will be multiples of. Where the device's direct reads need
        more, the file is read buffered.

    Raises
    ------
    FlashReadError
        If the file cannot be opened, or the backend that was asked for does not work here.
    """
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
            return BACKENDS[name](file, tuning)
        except OSError as error:
            failures.append(f"{name}: {error.strerror}")
        except BaseException:
            file.close()
            raise
    file.close()
    raise FlashReadError(f"no way to read works here: {'; '.join(failures)}", path=path)
