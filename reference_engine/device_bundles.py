"""Sparse mode on a device: the bundles a token needs, in a bank of slots in device memory.

For each layer of a pass, as `sparse_bundles` does it for a CPU:

    select -> step the window -> copy out what leaves -> begin all reads -> hand out what is held -> what arrives

Selection scores stay on the device, windows decide on the host with the same rules as on a CPU, and bundles are
never compacted: those that come take the slots of those that leave. With a second tier in page-locked memory, what
leaves the device is kept there, and comes back without a read. What is read ahead waits in page-locked memory for the
layer's turn.

Knows: the order of these steps. Does not know: how bundles get there (`device_layer`), arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from flashfmt import FlashModel
from reference_engine.backends.cupy_protocol import Device
from reference_engine.bundle_checksums import Verify
from reference_engine.device_direct import SlotReader
from reference_engine.device_landing import LandingRing
from reference_engine.device_layer import GROUP_BUNDLES, DeviceFetch, DeviceLayer
from reference_engine.flash_io import IoCounters, RangeReader
from reference_engine.models.weights import F32, BundleBlock, TapPoint
from reference_engine.neuron_window import Ids, NeuronWindow, fitting_parts
from reference_engine.selectors import TappedSelector
from reference_engine.sparse_bundles import Observer, OpenReader
from reference_engine.telemetry import LayerFigures, LayerStep, PassRecord, SparseTotals

RING_BUFFERS: Final = 8
BLOCK_NEURONS: Final = 1024  # of several tokens at once: bounds the scratch of the arithmetic


def landing_nbytes(strides: Sequence[int]) -> int:
    """Bytes of the landing ring: so many on the device, and so many page-locked."""
    return RING_BUFFERS * (GROUP_BUNDLES * max(strides) + 4096)


@dataclass(slots=True)
class _LayerState:
    """What is known of a layer before its turn in a pass."""

    selected: Ids | None = None
    """What a look-ahead selector decided."""
    on_the_way: DeviceFetch | None = None
    figures: LayerFigures = field(default_factory=LayerFigures)


class DeviceBundles:
    """`BundleSource` of the active neurons of all layers, from device memory.

    Parameters
    ----------
    selectors : for each layer the one that decides; it is shown device activations and gives host ids.
    windows, capacities : for each layer, which bundles stay, and in how many slots.
    tier_capacities : for each layer the slots of its second tier; None for none.
    open_reader : opens a file of bundles for reading.
    hints : for each layer a selector whose choice is read ahead, without being decisive; None for no hints.
    open_direct : opens such a file for reading straight to the slots, where that is the faster way; None lets all land.
    overlap : hand out what is held while the rest is read; without it, wait until all is there.
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
        hints: Sequence[TappedSelector] | None = None,
        open_direct: Callable[[Path], SlotReader] | None = None,
        overlap: bool = True,
        verify: Verify = "first",
    ) -> None:
        self._selectors = selectors
        self._hints = hints
        self._overlap = overlap
        self._readers: dict[Path, RangeReader] = {}
        self._direct: dict[Path, SlotReader] = {}
        self._states = [_LayerState() for _ in model.layers]
        self._layers: list[DeviceLayer] = []
        self._steps: list[LayerStep] = []
        self._observers: list[Observer] = []
        self.totals = SparseTotals(len(model.layers))
        self.decode_totals = SparseTotals(len(model.layers))
        self.n_from_tier = 0
        self._ahead: dict[tuple[int, TapPoint], list[int]] = {}
        for layer, tapped in enumerate(selectors if hints is None else hints):
            if (tapped.tap.layer, tapped.tap.point) != (layer, "ffn_input"):
                self._ahead.setdefault((tapped.tap.layer, tapped.tap.point), []).append(layer)
        self._taps: list[tuple[TapPoint, ...]] = [
            tuple(point for place, point in self._ahead if place == layer and point != "ffn_input")
            for layer in range(len(model.layers))
        ]
        tiers = tier_capacities or [0] * len(model.layers)
        ring = LandingRing(device, RING_BUFFERS, GROUP_BUNDLES * max(info.geometry.stride for info in model.layers))
        try:
            for info, window, n_slots, n_tier in zip(model.layers, windows, capacities, tiers, strict=True):
                path = info.extent.path
                if path not in self._readers:
                    self._readers[path] = open_reader(path)
                    if open_direct is not None:
                        self._direct[path] = open_direct(path)
                layer_bundles = DeviceLayer(
                    info,
                    device,
                    ring,
                    window=window,
                    n_slots=n_slots,
                    n_tier_slots=n_tier,
                    checksums=model.bundles(info.layer).checksums,
                    verify=verify,
                    reader=self._readers[path],
                    direct=self._direct.get(path),
                )
                self._layers.append(layer_bundles)
        except BaseException:
            self.close()
            raise

    def preload(self, layer: int, tokens: Iterable[Ids], progress: Callable[[int], None] | None = None) -> None:
        """Fill the slots of a layer with what its window holds behind `tokens`, before anything is computed.

        Parameters
        ----------
        progress : called with bytes of bundles as they arrive.

        Raises
        ------
        FlashReadError, ChecksumError
            Naming layer, neuron and byte offset.
        """
        held = self._layers[layer]
        for arrived in held.preload(tokens).arrivals():
            if progress is not None:
                progress((arrived.stop - arrived.start) * held.info.geometry.stride)

    def watch(self, observer: Observer) -> None:
        """Call `observer` with the record of every pass to come, at its end."""
        self._observers.append(observer)

    def whole(self, layer: int) -> None:
        """Which bundles are on the device changes."""
        return

    def taps(self, layer: int) -> tuple[TapPoint, ...]:
        """What look-ahead selectors wait for; an FFN input they are shown in `blocks`, once its own reads began."""
        return self._taps[layer]

    @property
    def reads_ahead(self) -> bool:
        """Reads go on by themselves."""
        return False

    def carry_on(self) -> None:
        """Nothing to do."""

    def tap(self, layer: int, point: TapPoint, x: F32) -> None:
        """Select ahead for the layers whose look-ahead selectors wait for this activation."""
        self._look_ahead(layer, point, x)

    def blocks(self, layer: int, x: F32) -> Iterator[BundleBlock]:
        """Blocks of the active bundles of a layer: those held, then those that arrive. Ids and slots on the device.

        Raises
        ------
        FlashReadError, ChecksumError
            Naming layer, neuron and byte offset; nothing was computed with the bytes concerned, and they are read
            anew when they are next wanted.
        """
        state, self._states[layer] = self._states[layer], _LayerState()
        held, figures = self._layers[layer], state.figures
        if layer == 0:
            self._steps.clear()
        if state.selected is not None:
            active = state.selected
        else:
            began = time.perf_counter()
            active = self._selectors[layer].selector.select(x)
            figures.select_seconds += time.perf_counter() - began
            if state.on_the_way is not None:
                state.on_the_way.finish()
                figures.n_prefetched += state.on_the_way.n_missing
                self.n_from_tier += state.on_the_way.n_found
                _add_costs(figures, state.on_the_way)
                state.on_the_way = None
        figures.n_active = len(active)
        fetch, n_tokens = state.on_the_way, len(x)
        for place, neurons in enumerate(fitting_parts(active, held.n_slots, held.is_held(active))):
            if fetch is None:
                fetch = held.fetch(neurons)
            try:
                if place == 0:
                    self._look_ahead(layer, "ffn_input", x)
                for part in _computable(fetch, overlap=self._overlap):
                    yield from _cut(fetch, part, held, n_tokens)
            finally:
                fetch.finish()
            self._count(figures, fetch)
            fetch = None
        self._end_layer(LayerStep(active, figures), n_tokens)

    @property
    def counters(self) -> IoCounters:
        """Bytes and requests of all files so far, and the seconds spent waiting for reads."""
        parts = [reader.counters for reader in self._all_readers]
        return IoCounters(
            sum(p.bytes_read for p in parts), sum(p.n_requests for p in parts), self.totals.total("wait_seconds")
        )

    def close(self) -> None:
        """Stop reading and close the files."""
        for state in self._states:
            if state.on_the_way is not None:
                state.on_the_way.finish()
                state.on_the_way = None
        for reader in self._all_readers:
            reader.close()

    @property
    def _all_readers(self) -> list[RangeReader | SlotReader]:
        return [*self._readers.values(), *self._direct.values()]

    def _look_ahead(self, layer: int, point: TapPoint, x: F32) -> None:
        """Select for the layers that look at this activation, and begin to read what they miss."""
        for target in self._ahead.get((layer, point), ()):
            stale, held = self._states[target], self._layers[target]
            if stale.on_the_way is not None:  # of a pass that was broken off
                stale.on_the_way.finish()
            state = self._states[target] = _LayerState()
            began = time.perf_counter()
            selectors = self._selectors if self._hints is None else self._hints
            chosen = selectors[target].selector.select(x)
            state.figures.select_seconds = time.perf_counter() - began
            if self._hints is None:
                state.selected = chosen
            if len(chosen) <= held.n_slots:
                state.on_the_way = held.fetch(chosen, ahead=True)

    def _count(self, figures: LayerFigures, fetch: DeviceFetch) -> None:
        figures.n_hits += fetch.n_hits
        figures.n_missing += fetch.n_missing
        figures.n_evicted += fetch.n_evicted
        self.n_from_tier += fetch.n_found
        _add_costs(figures, fetch)

    def _end_layer(self, step: LayerStep, n_tokens: int) -> None:
        self._steps.append(step)
        if len(self._steps) < len(self._layers):
            return
        record = PassRecord(n_tokens, tuple(self._steps))
        self._steps.clear()
        self.totals.add(record)
        if n_tokens == 1:
            self.decode_totals.add(record)
        for observer in self._observers:
            observer(record)


def _computable(fetch: DeviceFetch, *, overlap: bool) -> Iterator[slice]:
    """Places in a fetch: first of what is there, then of the others as they arrive, or all once they are there."""
    arrivals = fetch.arrivals() if overlap else iter(list(fetch.arrivals()))
    if fetch.n_there:
        yield slice(0, fetch.n_there)
    yield from arrivals


def _cut(fetch: DeviceFetch, part: slice, held: DeviceLayer, n_tokens: int) -> Iterator[BundleBlock]:
    """Blocks of at most `BLOCK_NEURONS` where there are several tokens."""
    step = part.stop - part.start if n_tokens == 1 else BLOCK_NEURONS
    for first in range(part.start, part.stop, step):
        block = slice(first, min(first + step, part.stop))
        yield BundleBlock(fetch.ids[block], held.rows, fetch.slots[block])


def _add_costs(figures: LayerFigures, fetch: DeviceFetch) -> None:
    costs = fetch.costs
    figures.bytes_read += costs.bytes_read
    figures.n_requests += costs.n_requests
    figures.wait_seconds += costs.wait_seconds
    figures.check_seconds += costs.check_seconds
    figures.upkeep_seconds += costs.upkeep_seconds
