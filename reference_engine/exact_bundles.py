"""The FFN bundles of every layer, all of them, each time: pinned in DRAM as far as the plan allows, else streamed.

Exact mode's side of a decode step. It hands out blocks of neurons in order; the arithmetic on them does not know
which were pinned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from flashfmt import FlashModel
from flashfmt.layout import round_up
from reference_engine.bundle_blocks import Block, runs_of, split_layer
from reference_engine.bundle_checksums import Verify, require_checksums
from reference_engine.flash_io import (
    IO_ALIGNMENT,
    CyclicStream,
    DirectFile,
    IoCounters,
    StreamRange,
    aligned_empty,
)
from reference_engine.loading import run_side_by_side
from reference_engine.models.weights import F32, BundleBlock, WithoutLookAhead
from reference_engine.plan import RING_SLOTS

Bytes = npt.NDArray[np.uint8]


def model_blocks(model: FlashModel) -> list[Block]:
    """All blocks of a model in the order of a forward pass."""
    return [block for info in model.layers for block in split_layer(info)]


class ExactBundles(WithoutLookAhead):
    """Blocks of all layers; `load` first, then ``blocks(layer)`` for layer 0, 1, ... of every pass.

    Parameters
    ----------
    pinned_blocks : one flag a block of ``model_blocks(model)``.
    verify : check bundle checksums never, the first time a block is read, or always.

    Attributes
    ----------
    compute_seconds : that callers took for the blocks they were handed; layers taken as a `whole` are not in it.
    """

    def __init__(self, model: FlashModel, pinned_blocks: Sequence[bool], *, verify: Verify = "first") -> None:
        self._model = model
        self.compute_seconds = 0.0
        self._verify = verify
        self._blocks = model_blocks(model)
        self._files = {info.extent.path: DirectFile(info.extent.path) for info in model.layers}
        self._pinned: dict[Block, Bytes] = {}
        self._is_pinned = dict(zip(self._blocks, pinned_blocks, strict=True))
        self._streamed = [block for block in self._blocks if not self._is_pinned[block]]
        self._verified = [False] * len(self._streamed)
        self._stream: CyclicStream | None = None
        self._runs = [runs_of(split_layer(info), self._is_pinned) for info in model.layers]

    def load(self, progress: Callable[[int], None] | None = None) -> None:
        """Read the pinned blocks and start the stream; `progress` gets the bytes of each block.

        Raises
        ------
        FlashReadError, ChecksumError
        """
        pinned = [run for runs in self._runs for run in runs if self._is_pinned[run[0]]]
        arena = aligned_empty(sum(round_up(block.nbytes, IO_ALIGNMENT) for run in pinned for block in run))
        jobs = []
        start = 0
        for run in pinned:
            # all blocks but a layer's last have whole pages: no gap within a run
            nbytes, n_neurons = sum(block.nbytes for block in run), sum(block.n_neurons for block in run)
            self._pinned[run[0]] = arena[start : start + nbytes].reshape(n_neurons, -1)
            for block in run:
                buffer = arena[start : start + round_up(block.nbytes, IO_ALIGNMENT)]
                start += buffer.nbytes
                jobs.append(partial(self._load_block, block, buffer))
        run_side_by_side(jobs, progress)
        if self._streamed:
            ranges = [StreamRange(self._file(block), block.offset, block.nbytes) for block in self._streamed]
            self._stream = CyclicStream(ranges, n_slots=RING_SLOTS, check=self._check_arrival)

    def whole(self, layer: int) -> Bytes | None:
        """All bundles of a layer, where it is pinned as a whole and loaded."""
        runs = self._runs[layer]
        return self._pinned.get(runs[0][0]) if len(runs) == 1 else None

    def blocks(self, layer: int, x: F32 | None = None) -> Iterator[BundleBlock]:
        """Blocks of a layer in neuron order, whatever `x`; each is valid until the next is asked for.

        Neighbours that are pinned come as one.

        Raises
        ------
        FlashReadError, ChecksumError
            Naming layer, neuron and byte offset; nothing was computed with the bytes concerned.
        """
        if layer == 0 and self._stream is not None:
            self._stream.rewind()
        for run in self._runs[layer]:
            block = run[0]
            neurons = slice(block.first, run[-1].first + run[-1].n_neurons)
            if self._is_pinned[block]:
                yield from self._timed(BundleBlock(neurons, self._pinned[block]))
                continue
            if self._stream is None:
                raise RuntimeError("blocks of bundles that were not loaded")
            _, data = self._stream.take()
            try:
                yield from self._timed(BundleBlock(neurons, self._rows(block, data)))
            finally:
                self._stream.give_back()

    @property
    def counters(self) -> IoCounters:
        """Bytes and requests of all files so far, and the seconds spent waiting for blocks."""
        parts = [file.counters for file in self._files.values()]
        waited = self._stream.wait_seconds if self._stream is not None else 0.0
        return IoCounters(sum(p.bytes_read for p in parts), sum(p.n_requests for p in parts), waited)

    def close(self) -> None:
        """Stop reading and close the files."""
        if self._stream is not None:
            self._stream.close()
        for file in self._files.values():
            file.close()

    def _load_block(self, block: Block, buffer: Bytes) -> int:
        self._file(block).read_into(buffer, block.offset, block.nbytes)
        if self._verify != "never":
            self._check(block, buffer)
        return block.nbytes

    def _timed(self, block: BundleBlock) -> Iterator[BundleBlock]:
        began = time.perf_counter()
        yield block
        self.compute_seconds += time.perf_counter() - began

    def _file(self, block: Block) -> DirectFile:
        return self._files[self._model.layers[block.layer].extent.path]

    def _rows(self, block: Block, data: Bytes) -> Bytes:
        return data.reshape(block.n_neurons, self._model.layers[block.layer].geometry.stride)

    def _check_arrival(self, index: int, data: Bytes) -> None:
        if self._verify == "always" or (self._verify == "first" and not self._verified[index]):
            self._check(self._streamed[index], data)
            self._verified[index] = True

    def _check(self, block: Block, data: Bytes) -> None:
        info = self._model.layers[block.layer]
        neurons = range(block.first, block.first + block.n_neurons)
        checksums = self._model.bundles(block.layer).checksums
        require_checksums(info, neurons, self._rows(block, data[: block.nbytes]), checksums)
