"""Sparse mode on a device: the bundles a token needs, in a bank of slots in device memory.

For each layer of a pass:

    select -> step the window -> copy out what leaves -> begin all reads -> hand out what is held -> what arrives

Selection scores stay on the device, windows decide on the host with the same rules as on a CPU, and bundles are
never compacted: those that come take the slots of those that leave. With a second tier in page-locked memory, what
leaves the device is kept there, and comes back without a read.

Knows: the order of these steps. Does not know: how neurons are selected, arithmetic.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from flashfmt import BundlesInfo, FlashModel
from flashfmt.errors import FlashReadError
from reference_engine.backends.cupy_protocol import Bytes, Device, DeviceArray
from reference_engine.bundle_checksums import Verify, require_checksums
from reference_engine.device_landing import Arriving, LandingRing
from reference_engine.device_slots import Slots, SlotTable, VictimTable
from reference_engine.flash_io import IoCounters, RangeReader
from reference_engine.models.weights import F32, BundleBlock, TapPoint
from reference_engine.neuron_window import Ids, NeuronWindow
from reference_engine.selectors import TappedSelector
from reference_engine.sparse_bundles import Observer, OpenReader
from reference_engine.telemetry import LayerFigures, LayerStep, PassRecord, SparseTotals

GROUP_BUNDLES: Final = 128  # what arrives together is copied and computed together
RING_BUFFERS: Final = 8
BLOCK_NEURONS: Final = 1024  # of several tokens at once: bounds the scratch of the arithmetic
_COPY_THREADS: Final = 128


def landing_nbytes(strides: Sequence[int]) -> int:
    """Bytes of the landing ring: so many on the device, and so many page-locked."""
    return RING_BUFFERS * (GROUP_BUNDLES * max(strides) + 4096)


@dataclass(slots=True, eq=False)
class _LayerBank:
    """What a layer holds on the device, and behind it in the second tier."""

    info: BundlesInfo
    window: NeuronWindow
    rows: DeviceArray
    table: SlotTable
    tier_rows: Bytes | None
    tier: VictimTable | None
    is_verified: np.ndarray[Any, np.dtype[np.bool_]]


class DeviceBundles:
    """`BundleSource` of the active neurons of all layers, from device memory.

    Parameters
    ----------
    selectors : for each layer the one that decides; it is shown device activations and gives host ids.
    windows, capacities : for each layer, which bundles stay, and in how many slots.
    tier_capacities : for each layer the slots of its second tier; None for none.
    open_reader : opens a file of bundles for reading.
    verify : when to check bundle checksums.

    Attributes
    ----------
    totals, decode_totals : figures of all passes so far, and of those of a single token.
    n_from_tier : bundles that the second tier saved a read for.
    """

    def __init__(
        self,
        model: FlashModel,
        device: Device,
        *,
        selectors: Sequence[TappedSelector],
        windows: Sequence[NeuronWindow],
        capacities: Sequence[int],
        open_reader: OpenReader,
        tier_capacities: Sequence[int] | None = None,
        verify: Verify = "first",
    ) -> None:
        self._model = model
        self._device = device
        self._selectors = selectors
        self._verify = verify
        self._readers: dict[Path, RangeReader] = {}
        self._chosen: dict[int, tuple[Ids, float]] = {}
        self._steps: list[LayerStep] = []
        self._observers: list[Observer] = []
        self.totals = SparseTotals(len(model.layers))
        self.decode_totals = SparseTotals(len(model.layers))
        self.n_from_tier = 0
        self._ahead: dict[tuple[int, TapPoint], list[int]] = {}
        for layer, tapped in enumerate(selectors):
            if (tapped.tap.layer, tapped.tap.point) != (layer, "ffn_input"):
                self._ahead.setdefault((tapped.tap.layer, tapped.tap.point), []).append(layer)
        strides = [info.geometry.stride for info in model.layers]
        self._ring = LandingRing(device, RING_BUFFERS, GROUP_BUNDLES * max(strides))
        tiers = tier_capacities or [0] * len(model.layers)
        self._banks = [
            _LayerBank(
                info=info,
                window=window,
                rows=device.empty((capacity, info.geometry.stride), np.uint8),
                table=SlotTable(capacity, info.geometry.n_neurons),
                tier_rows=_tier_rows(device, n_tier, info.geometry.stride) if n_tier else None,
                tier=VictimTable(n_tier, info.geometry.n_neurons) if n_tier else None,
                is_verified=np.zeros(info.geometry.n_neurons, np.bool_),
            )
            for info, window, capacity, n_tier in zip(model.layers, windows, capacities, tiers, strict=True)
        ]
        try:
            for info in model.layers:
                if info.extent.path not in self._readers:
                    self._readers[info.extent.path] = open_reader(info.extent.path)
        except BaseException:
            self.close()
            raise

    def whole(self, layer: int) -> None:
        """Which bundles are on the device changes."""
        return

    def taps(self, layer: int) -> tuple[TapPoint, ...]:
        """What selectors look at."""
        return tuple(point for place, point in self._ahead if place == layer)

    def tap(self, layer: int, point: TapPoint, x: F32) -> None:
        """Select for the layers whose selectors look at this activation."""
        for target in self._ahead.get((layer, point), ()):
            self._chosen[target] = self._select(target, x)

    def blocks(self, layer: int, x: F32) -> Iterator[BundleBlock]:
        """Blocks of the active bundles of a layer: those held, then those that arrive. Ids and slots on the device.

        Raises
        ------
        FlashReadError, ChecksumError
            Naming layer, neuron and byte offset; nothing was computed with the bytes concerned.
        """
        if layer == 0:
            self._steps.clear()
        chosen = self._chosen.pop(layer, None)
        active, seconds = self._select(layer, x) if chosen is None else chosen
        figures = LayerFigures(n_active=len(active), select_seconds=seconds)
        bank, n_tokens = self._banks[layer], len(x)
        for first in range(0, len(active), bank.table.n_slots):
            yield from self._held_and_arriving(bank, active[first : first + bank.table.n_slots], n_tokens, figures)
        self._steps.append(LayerStep(active, figures))
        if len(self._steps) == len(self._banks):
            self._end_pass(PassRecord(n_tokens, tuple(self._steps)))

    @property
    def counters(self) -> IoCounters:
        """Bytes and requests of all files so far, and the seconds spent waiting for reads."""
        parts = [reader.counters for reader in self._readers.values()]
        return IoCounters(
            sum(p.bytes_read for p in parts), sum(p.n_requests for p in parts), self.totals.total("wait_seconds")
        )

    def close(self) -> None:
        """Stop reading and close the files."""
        for reader in self._readers.values():
            reader.close()

    def watch(self, observer: Observer) -> None:
        """Call `observer` with the record of every pass to come, at its end."""
        self._observers.append(observer)

    def _end_pass(self, record: PassRecord) -> None:
        self.totals.add(record)
        if record.n_tokens == 1:
            self.decode_totals.add(record)
        for observer in self._observers:
            observer(record)

    def _select(self, layer: int, x: F32) -> tuple[Ids, float]:
        began = time.perf_counter()
        active = self._selectors[layer].selector.select(x)
        return active, time.perf_counter() - began

    def _held_and_arriving(
        self, bank: _LayerBank, wanted: Ids, n_tokens: int, figures: LayerFigures
    ) -> Iterator[BundleBlock]:
        began = time.perf_counter()
        step = bank.window.step(wanted)
        evicted_slots = bank.table.release(step.evicted)
        bank.table.assign(step.missing)
        found, found_slots, kept, kept_slots = _exchange(bank, step.missing, step.evicted)
        missing = np.setdiff1d(step.missing, found, assume_unique=True)
        order = np.concatenate((np.setdiff1d(wanted, missing, assume_unique=True), missing))
        ids, slots, kept_from, kept_to, found_from, found_to = self._upload(
            order, bank.table.slots(order), evicted_slots[len(evicted_slots) - len(kept) :], kept_slots,
            found_slots, bank.table.slots(found),
        )  # fmt: skip
        self._device.wait("copy", self._device.record("compute"))  # launched kernels may still read given up slots
        self._move(bank, bank.rows, kept_from, bank.tier_rows, kept_to)
        self._move(bank, bank.tier_rows, found_from, bank.rows, found_to)
        self._device.wait("compute", self._device.record("copy"))
        self.n_from_tier += len(found)
        figures.n_hits += len(step.hits)
        figures.n_missing += len(missing)
        figures.n_evicted += len(step.evicted)
        figures.upkeep_seconds += time.perf_counter() - began
        n_done = len(order) - len(missing)
        n_begun = n_done
        under_way: deque[tuple[Ids, Arriving]] = deque()
        try:
            n_begun = self._begin(bank, order, n_begun, under_way)
            yield from _cut(bank, ids[:n_done], slots[:n_done], n_tokens)
            while under_way:
                group, arriving = under_way.popleft()
                try:
                    self._land(bank, group, arriving, slots[n_done : n_done + len(group)], figures)
                finally:
                    self._ring.release(arriving)
                arrived = slice(n_done, n_done + len(group))
                n_done += len(group)
                n_begun = self._begin(bank, order, n_begun, under_way)
                self._device.wait("compute", self._device.record("copy"))
                yield from _cut(bank, ids[arrived], slots[arrived], n_tokens)
        finally:
            for _, arriving in under_way:
                self._abandon(arriving)
            absent = order[n_done:]
            if len(absent):
                bank.window.forget(absent)
                bank.table.release(absent)

    def _upload(self, *lists: Slots) -> list[DeviceArray]:
        """Several int32 lists in one copy."""
        together = self._device.upload(np.concatenate(lists))
        ends = np.cumsum([len(part) for part in lists]).tolist()
        return [together[end - len(part) : end] for part, end in zip(lists, ends, strict=True)]

    def _begin(self, bank: _LayerBank, order: Ids, n_begun: int, under_way: deque[tuple[Ids, Arriving]]) -> int:
        """Begin to read as many groups as the ring has room for; returns how much of `order` is begun or there."""
        info, stride = bank.info, bank.info.geometry.stride
        while n_begun < len(order) and self._ring.has_room:
            group = order[n_begun : n_begun + GROUP_BUNDLES]
            offsets = group.astype(np.int64) * stride + info.extent.offset
            under_way.append((group, self._ring.begin(self._readers[info.extent.path], offsets, stride)))
            n_begun += len(group)
        return n_begun

    def _land(self, bank: _LayerBank, ids: Ids, arriving: Arriving, slots: DeviceArray, figures: LayerFigures) -> None:
        """Wait for a group, check it, and begin to copy it to its slots."""
        before = self._ring.wait_seconds
        try:
            self._ring.wait(arriving)
        except FlashReadError as error:
            raise _named(error, bank.info, ids) from error
        finally:
            figures.wait_seconds += self._ring.wait_seconds - before
        figures.n_requests += len(arriving.pending.plan)
        figures.bytes_read += int(arriving.pending.plan.nbytes.sum())
        checked = time.perf_counter()
        self._check(bank, ids, arriving.data.reshape(len(ids), bank.info.geometry.stride))
        landed = time.perf_counter()
        self._move(bank, self._ring.send(arriving), None, bank.rows, slots)
        figures.check_seconds += landed - checked
        figures.upkeep_seconds += time.perf_counter() - landed

    def _check(self, bank: _LayerBank, ids: Ids, rows: Bytes) -> None:
        if self._verify == "never":
            return
        places = np.arange(len(ids)) if self._verify == "always" else np.flatnonzero(~bank.is_verified[ids])
        checksums = self._model.bundles(bank.info.layer).checksums
        require_checksums(bank.info, ids[places].tolist(), (rows[place] for place in places), checksums)
        bank.is_verified[ids] = True

    def _abandon(self, arriving: Arriving) -> None:
        """Wait until the reader has let go of a buffer that nobody wants any more."""
        arriving.pending.is_cancelled = True
        with suppress(FlashReadError):
            self._ring.wait(arriving)
        self._ring.release(arriving)

    def _move(self, bank: _LayerBank, source: Any, source_slots: Any, target: Any, target_slots: DeviceArray) -> None:
        """Begin to copy rows from slots (row after row where None) to slots, in the copy queue."""
        n, stride = len(target_slots), np.int64(bank.info.geometry.stride)
        if n:
            arguments = (source, source_slots, target, target_slots, stride, stride)
            self._device.launch("move_rows", (n, 1, 1), _COPY_THREADS, *arguments, queue="copy")


def _exchange(bank: _LayerBank, missing: Ids, evicted: Ids) -> tuple[Ids, Slots, Ids, Slots]:
    """What the second tier hands out of `missing` and takes in of `evicted`; nothing where there is none."""
    if bank.tier is None:
        nothing = missing[:0]
        return nothing, nothing, nothing, nothing
    return bank.tier.exchange(missing, evicted)


def _cut(bank: _LayerBank, ids: DeviceArray, slots: DeviceArray, n_tokens: int) -> Iterator[BundleBlock]:
    """Blocks of at most `BLOCK_NEURONS` where there are several tokens."""
    step = max(len(ids), 1) if n_tokens == 1 else BLOCK_NEURONS
    for first in range(0, len(ids), step):
        yield BundleBlock(ids[first : first + step], bank.rows, slots[first : first + step])


def _tier_rows(device: Device, n_slots: int, stride: int) -> Bytes:
    return device.pinned(n_slots * stride).reshape(n_slots, stride)


def _named(error: FlashReadError, info: BundlesInfo, ids: Ids) -> FlashReadError:
    """`error`, with the layer and the neurons concerned."""
    message = f"bundles of layer {info.layer}, neurons {ids[0]} to {ids[-1]}, cannot be read: {error.message}"
    return FlashReadError(message, path=info.extent.path, where=error.where)
