"""What this machine allows: how fast its device and its memory are, measured in the same run, and what that comes to.

Knows: bandwidths and sizes. Does not know: how a run was made.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from flashfmt import FlashModel
from flashfmt.encodings import Encoding
from flashfmt.layout import round_up
from reference_engine.bench.results import Floor, RunResult
from reference_engine.bundle_blocks import BLOCK_BYTES
from reference_engine.engine import EngineOptions
from reference_engine.flash_io.device_measurement import Case, Pattern, cases, measure
from reference_engine.flash_io.open_file import open_file
from reference_engine.kv_cache import kv_cache_nbytes
from reference_engine.machine import available_nbytes
from reference_engine.resident_encoding import POSITIONS, resident_encoding, stored_nbytes
from reference_engine.residents import resident_tensors
from reference_engine.selectors import SelectorChoice, selectors_nbytes

_RANDOM_DEPTHS: Final = (32, 128, 512)
_SEQUENTIAL_DEPTHS: Final = (2, 8)
_MEMORY_BYTES: Final = 512 << 20
_MEMORY_SHARE: Final = 4  # of what is free, at most this part is read through
_MEMORY_ROUNDS: Final = 8


@dataclass
class Machine:
    """Bandwidths, measured when they are asked for; the device's once for each size of request.

    Parameters
    ----------
    n_threads : that read memory at once.
    seconds : for each way to read the device; each is measured twice.
    """

    n_threads: int
    seconds: float
    _memory: float = 0.0
    _reads: dict[tuple[Path, int, Pattern], float] = field(default_factory=dict)

    def memory_bandwidth(self) -> float:
        """Bytes a second of reading memory that no cache holds: the best of all calls, as others can only slow it."""
        n_words = min(_MEMORY_BYTES, available_nbytes() // _MEMORY_SHARE) // 8
        words = np.ones(n_words, np.uint64)
        parts = np.array_split(words, self.n_threads)
        with ThreadPoolExecutor(self.n_threads) as pool:
            for _ in range(_MEMORY_ROUNDS):
                began = time.perf_counter()
                list(pool.map(np.add.reduce, parts))
                self._memory = max(self._memory, words.nbytes / (time.perf_counter() - began))
        return self._memory

    def read_bandwidth(
        self, path: Path, request_bytes: int, pattern: Pattern, progress: Callable[[], None] = lambda: None
    ) -> float:
        """Bytes a second of the best way to read `path` in requests of `request_bytes`.

        Raises
        ------
        FlashReadError
            If the file cannot be read.
        """
        key = (path, request_bytes, pattern)
        if key not in self._reads:
            depths = _RANDOM_DEPTHS if pattern == "random" else _SEQUENTIAL_DEPTHS
            wanted: list[Case] = [
                case for case in cases(("uring", "aio", "pread"), (request_bytes,), depths) if case.pattern == pattern
            ]
            found = measure(path, wanted, seconds=self.seconds, progress=progress)
            self._reads[key] = max(m.bytes_per_second for m in found)
        return self._reads[key]


def sparse_floor(
    machine: Machine, model: FlashModel, run: RunResult, options: EngineOptions, selector: SelectorChoice
) -> Floor:
    """Floor of a run that selects neurons: what is missing at random, what is active out of memory."""
    info = model.layers[0]
    touched = _always_touched(model, run, options) + selectors_nbytes(model, selector)
    return _floor(
        machine,
        info.extent.path,
        read_bytes=run.costs.n_missing / run.n_tokens * info.geometry.stride,
        request_bytes=info.geometry.stride,
        pattern="random",
        memory_bytes=touched + run.costs.n_active / run.n_tokens * info.geometry.row_nbytes,
    )


def dense_floor(
    machine: Machine, model: FlashModel, run: RunResult, options: EngineOptions, *, read_bytes: float
) -> Floor:
    """Floor of a run that computes every neuron and reads `read_bytes` for each token, one after the other."""
    bundles = sum(info.geometry.n_neurons * info.geometry.row_nbytes for info in model.layers)
    return _floor(
        machine,
        model.layers[0].extent.path,
        read_bytes=read_bytes,
        request_bytes=BLOCK_BYTES,
        pattern="sequential",
        memory_bytes=_always_touched(model, run, options) + bundles,
    )


def _floor(
    machine: Machine, path: Path, *, read_bytes: float, request_bytes: int, pattern: Pattern, memory_bytes: float
) -> Floor:
    file = open_file(path)
    alignment = file.alignment
    file.close()
    request = round_up(request_bytes, alignment)
    return Floor(
        read_bytes=read_bytes,
        request_bytes=request,
        pattern=pattern,
        read_bandwidth=machine.read_bandwidth(path, request, pattern),
        memory_bytes=memory_bytes,
        memory_bandwidth=machine.memory_bandwidth(),
    )


def _always_touched(model: FlashModel, run: RunResult, options: EngineOptions) -> float:
    """Resident matrices, of which a token touches all, and the keys and values of half the measured tokens."""
    name = run.plan.get("resident_encoding", "stored")
    encoding = None if name == "stored" else Encoding(name)
    residents = sum(
        stored_nbytes(info, resident_encoding(info, encoding))
        for info in resident_tensors(model)
        if info.name != POSITIONS
    )
    n_past = run.prompt_tokens + run.n_tokens // (2 * len(run.first_token_seconds))
    return residents + kv_cache_nbytes(model.decoder, n_past, options.kv_type)
