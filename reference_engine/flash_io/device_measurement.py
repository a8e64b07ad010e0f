"""Measures how fast a device is read: by backend, pattern, block size and depth, on a temporary file.

The page cache is kept out of it: reads are direct, and where they cannot be, the file is dropped from it first.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np

from flashfmt.errors import FlashReadError, FlashWriteError
from reference_engine.flash_io.aligned_memory import aligned_empty
from reference_engine.flash_io.device_profile import Measurement
from reference_engine.flash_io.open_reader import BackendName, open_reader
from reference_engine.flash_io.range_reader import IoTuning, RangeReader
from reference_engine.flash_io.request_plan import I64

Pattern = Literal["random", "sequential"]

BLOCKS: Final = tuple(kib << 10 for kib in (4, 16, 32, 64, 256, 1024, 2048))
DEPTHS: Final = (1, 8, 32, 128, 256, 512)
PATTERNS: Final[tuple[Pattern, ...]] = ("random", "sequential")
BACKEND_NAMES: Final[tuple[BackendName, ...]] = ("uring", "aio", "pread", "mmap")
_MAX_IN_FLIGHT: Final = 64 << 20
_MIN_BATCH: Final = 64  # requests
_WRITE_BLOCK: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure."""

    backend: BackendName
    pattern: Pattern
    block_bytes: int
    depth: int


def cases(backends: Sequence[BackendName], blocks: Sequence[int], depths: Sequence[int]) -> list[Case]:
    """What to measure: the backends in turn for each pattern, block and depth, so that all see the same weather.

    Left out: more in flight than 64 MiB, and depths of `mmap`, which has none.
    """
    return [
        Case(backend, pattern, block, depth)
        for pattern in PATTERNS
        for block in blocks
        for depth in depths
        for backend in backends
        if block * depth <= _MAX_IN_FLIGHT and (backend != "mmap" or depth == depths[0])
    ]


@contextmanager
def temporary_file(directory: Path, nbytes: int) -> Iterator[Path]:
    """A file of `nbytes` of noise in `directory`, written through to the device, deleted afterwards.

    Raises
    ------
    FlashWriteError
        If there is no room for it, or it cannot be written.
    """
    noise = np.random.default_rng(0).bytes(_WRITE_BLOCK)
    path = None
    try:
        try:
            free = os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize
            if free < nbytes:
                raise FlashWriteError("no room for the test file", path=directory, expected=nbytes, actual=free)
            handle, name = tempfile.mkstemp(prefix=".flashfmt-doctor-", dir=directory)
            path = Path(name)
            with os.fdopen(handle, "wb", buffering=0) as file:
                for start in range(0, nbytes, _WRITE_BLOCK):
                    file.write(noise[: min(_WRITE_BLOCK, nbytes - start)])
                os.fsync(file.fileno())
        except OSError as error:
            raise FlashWriteError(f"cannot write the test file: {error.strerror}", path=directory) from error
        yield path
    finally:
        if path is not None:
            path.unlink(missing_ok=True)


def measure(
    path: Path, wanted: Sequence[Case], *, seconds: float, progress: Callable[[], None] = lambda: None
) -> list[Measurement]:
    """Measure each case twice for about `seconds` on the file at `path`; what does not work here is left out.

    The faster counts, since other users of the device can only slow a measurement down.

    Raises
    ------
    FlashReadError
        If none of the cases works.
    """
    results: dict[Case, Measurement] = {}
    failure: FlashReadError | None = None
    rng = np.random.default_rng(0)
    for case in (*wanted, *wanted):
        try:
            found = measure_case(path, case, seconds=seconds, rng=rng)
        except FlashReadError as error:
            failure = error
        else:
            results[case] = max(found, results.get(case, found), key=lambda m: m.bytes_per_second)
        progress()
    if not results and failure is not None:
        raise failure
    return list(results.values())


def measure_case(path: Path, case: Case, *, seconds: float, rng: np.random.Generator) -> Measurement:
    """Bandwidth and processor time of one case; two batches are kept under way, so that the depth is kept up."""
    tuning = IoTuning(gap_bytes=0, max_request_bytes=case.block_bytes, depth=case.depth)
    n_blocks = path.stat().st_size // case.block_bytes
    n_batch = int(min(max(_MIN_BATCH, 2 * case.depth), max(1, _MAX_IN_FLIGHT // case.block_bytes), n_blocks))
    _drop_cached(path)
    reader = open_reader(path, backend=case.backend, tuning=tuning)
    try:
        buffers = [aligned_empty(n_batch * case.block_bytes) for _ in range(2)]
        for buffer in buffers:
            buffer[:: 4 << 10] = 0
        batches = _batches(case, n_blocks, n_batch, rng)
        n, elapsed, cpu = _read_for(reader, case, batches, buffers, seconds)
    finally:
        reader.close()
    nbytes = n * n_batch * case.block_bytes
    return Measurement(
        case.backend, case.pattern, case.block_bytes, case.depth, nbytes / elapsed, cpu / (nbytes / 2**30)
    )


def _read_for(
    reader: RangeReader, case: Case, batches: Iterator[I64], buffers: Sequence[np.ndarray], seconds: float
) -> tuple[int, float, float]:
    """(batches read, wall seconds, processor seconds)."""
    positions = np.arange(buffers[0].nbytes // case.block_bytes) * case.block_bytes
    cpu, started = time.process_time(), time.perf_counter()
    under_way = []
    n = 0
    while not n or time.perf_counter() - started < seconds:
        under_way.append(reader.submit(next(batches), case.block_bytes, buffers[n % 2], positions))
        n += 1
        if len(under_way) == 2:
            under_way.pop(0).wait()
    for pending in under_way:
        pending.wait()
    return n, time.perf_counter() - started, time.process_time() - cpu


def _batches(case: Case, n_blocks: int, n_batch: int, rng: np.random.Generator) -> Iterator[I64]:
    """Sorted offsets of the blocks of one batch after the other, for ever."""
    first = 0
    while True:
        if case.pattern == "random":
            blocks = np.sort(rng.choice(n_blocks, n_batch, replace=False, shuffle=False))
        else:
            if first + n_batch > n_blocks:
                first = 0
            blocks = np.arange(first, first + n_batch)
            first += n_batch
        yield blocks.astype(np.int64) * case.block_bytes


def _drop_cached(path: Path) -> None:
    if hasattr(os, "posix_fadvise"):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
