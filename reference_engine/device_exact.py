"""Exact mode on a device: all bundles of every layer, pinned in device memory as far as the plan allows, else streamed.

The blocks and their order are those of `exact_bundles`, so that the output does not depend on the budget.

Knows: which blocks are pinned or streamed. Does not know: arithmetic.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from flashfmt import FlashModel
from flashfmt.errors import FlashReadError
from reference_engine.backends.cupy_protocol import Bytes, Device, DeviceArray
from reference_engine.bundle_blocks import Block, runs_of, split_layer
from reference_engine.bundle_checksums import Verify, require_checksums
from reference_engine.device_landing import Arriving, LandingRing
from reference_engine.exact_bundles import model_blocks
from reference_engine.flash_io import IoCounters, RangeReader
from reference_engine.models.weights import F32, BundleBlock, WithoutLookAhead
from reference_engine.plan import RING_SLOTS


class DeviceExactBundles(WithoutLookAhead):
    """`BundleSource` of all bundles; `load` first, then ``blocks(layer)`` for layer 0, 1, ... of every pass.

    Parameters
    ----------
    pinned_blocks : one flag a block of ``model_blocks(model)``.
    open_reader : opens a file of bundles for reading.
    verify : check bundle checksums never, the first time a block is read, or always.
    """

    def __init__(
        self,
        model: FlashModel,
        device: Device,
        pinned_blocks: Sequence[bool],
        *,
        open_reader: Callable[[Path], RangeReader],
        verify: Verify = "first",
    ) -> None:
        self._model = model
        self._device = device
        self._verify = verify
        self._blocks = model_blocks(model)
        self._is_pinned = dict(zip(self._blocks, pinned_blocks, strict=True))
        self._streamed = [block for block in self._blocks if not self._is_pinned[block]]
        self._place_of = {block: place for place, block in enumerate(self._streamed)}
        self._is_verified: set[Block] = set()
        self._runs = [runs_of(split_layer(info), self._is_pinned) for info in model.layers]
        self._pinned: dict[Block, DeviceArray] = {}  # rows of a pinned run, by its first block
        self._under_way: deque[tuple[int, Arriving]] = deque()  # places in `_streamed`
        self._ring = LandingRing(device, RING_SLOTS, max(block.nbytes for block in self._blocks))
        self._readers = {path: open_reader(path) for path in {info.extent.path for info in model.layers}}

    def load(self, progress: Callable[[int], None] | None = None) -> None:
        """Read the pinned blocks and start the stream; `progress` gets the bytes of each block.

        Raises
        ------
        FlashReadError, ChecksumError
        """
        pinned = [run for runs in self._runs for run in runs if self._is_pinned[run[0]]]
        wanted = [block for run in pinned for block in run]
        arena = self._device.empty((sum(block.nbytes for block in wanted),), np.uint8)
        start = 0
        for run in pinned:
            nbytes = sum(block.nbytes for block in run)
            n_neurons = sum(block.n_neurons for block in run)
            self._pinned[run[0]] = arena[start : start + nbytes].reshape(n_neurons, -1)
            start += nbytes
        self._device.wait("copy", self._device.record("compute"))  # what had this memory before may still be in use
        start = 0
        ahead: deque[Arriving] = deque()
        for i, block in enumerate(wanted):
            while self._ring.has_room() and i + len(ahead) < len(wanted):
                ahead.append(self._begin(wanted[i + len(ahead)]))
            arriving = ahead.popleft()
            self._receive(block, arriving)
            self._ring.send(arriving, arena[start : start + block.nbytes])
            self._ring.release(arriving)
            start += block.nbytes
            if progress is not None:
                progress(block.nbytes)
        self._device.wait("compute", self._device.record("copy"))
        self._refill(0)

    def whole(self, layer: int) -> DeviceArray | None:
        """See `BundleSource.whole`; after `load`."""
        runs = self._runs[layer]
        return self._pinned[runs[0][0]] if len(runs) == 1 and self._is_pinned[runs[0][0]] else None

    def blocks(self, layer: int, x: F32) -> Iterator[BundleBlock]:
        """Blocks of a layer in neuron order, on the device, whatever `x`; each is valid until the next is asked for.

        Raises
        ------
        FlashReadError, ChecksumError
            Naming layer, neuron and byte offset; nothing was computed with the bytes concerned.
        """
        for run in self._runs[layer]:
            block = run[0]
            neurons = slice(block.first, run[-1].first + run[-1].n_neurons)
            if self._is_pinned[block]:
                yield BundleBlock(neurons, self._pinned[block])
                continue
            if not self._under_way or self._under_way[0][0] != self._place_of[block]:  # a pass was broken off
                self._rewind(self._place_of[block])
            place, arriving = self._under_way.popleft()
            try:
                self._receive(block, arriving)
                rows = self._ring.send(arriving).reshape(block.n_neurons, -1)
                self._device.wait("compute", self._device.record("copy"))
                yield BundleBlock(neurons, rows)
            finally:
                self._ring.release(arriving, read_by=self._device.record("compute"))
                following = self._under_way[-1][0] + 1 if self._under_way else place + 1
                self._refill(following % len(self._streamed))

    @property
    def counters(self) -> IoCounters:
        """Bytes and requests of all files so far, and the seconds spent waiting for blocks."""
        parts = [reader.counters for reader in self._readers.values()]
        bytes_read, n_requests = sum(p.bytes_read for p in parts), sum(p.n_requests for p in parts)
        return IoCounters(bytes_read, n_requests, self._ring.wait_seconds)

    def close(self) -> None:
        """Stop reading and close the files."""
        for reader in self._readers.values():
            reader.close()

    def _begin(self, block: Block) -> Arriving:
        reader = self._readers[self._model.layers[block.layer].extent.path]
        return self._ring.begin(reader, np.array([block.offset], np.int64), block.nbytes)

    def _refill(self, place: int) -> None:
        """Begin to read streamed blocks from `place` on, in the one order in which they are needed."""
        while self._streamed and self._ring.has_room():
            self._under_way.append((place, self._begin(self._streamed[place])))
            place = (place + 1) % len(self._streamed)

    def _rewind(self, place: int) -> None:
        """Let go of all that is under way, and begin with the streamed block at `place`."""
        while self._under_way:
            _, arriving = self._under_way.popleft()
            arriving.pending.is_cancelled = True
            with suppress(FlashReadError):
                self._ring.wait(arriving)
            self._ring.release(arriving)
        self._refill(place)

    def _receive(self, block: Block, arriving: Arriving) -> None:
        """Wait for a block and check it."""
        self._ring.wait(arriving)
        if self._verify == "never" or (self._verify == "first" and block in self._is_verified):
            return
        info = self._model.layers[block.layer]
        rows: Bytes = arriving.data.reshape(block.n_neurons, info.geometry.stride)
        neurons = range(block.first, block.first + block.n_neurons)
        require_checksums(info, neurons, rows, self._model.bundles(block.layer).checksums)
        self._is_verified.add(block)
