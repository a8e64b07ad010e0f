"""The FFN bundles that a token needs: selected, looked up, the missing ones read; computed as they come.

Sparse mode's side of a decode step, for each layer:

    select -> step the window -> begin all reads -> hand out what is held -> hand out what arrives

An earlier layer's activation may select ahead: the reads then run behind whatever is demanded, while attention and the
layers before are computed. A look-ahead selector decides itself, unless another one is named to decide; then it is a
hint, and what it did not foresee is read on demand.

Knows: the order of these steps. Does not know: how bundles are read and kept (`layer_bundles`), arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from flashfmt import FlashModel
from flashfmt.layout import round_up
from reference_engine.bundle_checksums import Verify
from reference_engine.flash_io import IO_ALIGNMENT, IoCounters, RangeReader, aligned_empty
from reference_engine.layer_bundles import Costs, Fetch, LayerBundles, Slots
from reference_engine.models.weights import F32, BundleBlock, TapPoint
from reference_engine.neuron_window import Ids, NeuronWindow, fitting_parts
from reference_engine.selectors import TappedSelector
from reference_engine.telemetry import LayerFigures, LayerStep, PassRecord, SparseTotals

BLOCK_NEURONS: Final = 1024  # of several tokens at once: bounds the room that the arithmetic needs
OpenReader = Callable[[Path], RangeReader]
Observer = Callable[[PassRecord], None]


@dataclass(slots=True)
class _LayerState:
    """What is known of a layer before its turn in a pass."""

    selected: Ids | None = None
    """What a look-ahead selector decided."""
    on_the_way: Fetch | None = None
    figures: LayerFigures = field(default_factory=LayerFigures)


class SparseBundles:
    """Bundles of the active neurons of all layers; `BundleSource`.

    Parameters
    ----------
    selectors : for each layer the one that decides.
    windows, capacities : for each layer, which bundles stay, and in how many slots.
    open_reader : opens a file of bundles for reading.
    hints : for each layer a selector whose choice is read ahead, without being decisive; None for no hints.
    overlap : hand out what is held while the rest is read; without it, wait until all is there.
    held_first : where more neurons are active than there are slots, begin with those that are held.
    verify : when to check bundle checksums.

    Attributes
    ----------
    totals, decode_totals : figures of all passes so far, and of those of a single token.
    """

    def __init__(
        self,
        model: FlashModel,
        *,
        selectors: Sequence[TappedSelector],
        windows: Sequence[NeuronWindow],
        capacities: Sequence[int],
        open_reader: OpenReader,
        hints: Sequence[TappedSelector] | None = None,
        overlap: bool = True,
        held_first: bool = True,
        verify: Verify = "first",
    ) -> None:
        self._selectors = selectors
        self._hints = hints
        self._overlap = overlap
        self._held_first = held_first
        self._readers: dict[Path, RangeReader] = {}
        self._states = [_LayerState() for _ in model.layers]
        self._layers: list[LayerBundles] = []
        self._newest: Fetch | None = None  # of those read ahead
        self._steps: list[LayerStep] = []
        self._observers: list[Observer] = []
        self.totals = SparseTotals(len(model.layers))
        self.decode_totals = SparseTotals(len(model.layers))
        self._ahead: dict[tuple[int, TapPoint], list[int]] = {}
        for layer, tapped in enumerate(selectors if hints is None else hints):
            if (tapped.tap.layer, tapped.tap.point) != (layer, "ffn_input"):
                self._ahead.setdefault((tapped.tap.layer, tapped.tap.point), []).append(layer)
        self._taps: list[tuple[TapPoint, ...]] = [
            tuple(point for place, point in self._ahead if place == layer and point != "ffn_input")
            for layer in range(len(model.layers))
        ]
        strides = [info.geometry.stride for info in model.layers]
        arena = aligned_empty(slots_nbytes(capacities, strides))
        start = 0
        try:
            for info, window, capacity in zip(model.layers, windows, capacities, strict=True):
                stride = info.geometry.stride
                rows = arena[start : start + capacity * stride].reshape(capacity, stride)
                start += round_up(capacity * stride, IO_ALIGNMENT)
                path = info.extent.path
                if path not in self._readers:
                    self._readers[path] = open_reader(path)
                layer_bundles = LayerBundles(
                    info,
                    window=window,
                    rows=rows,
                    checksums=model.bundles(info.layer).checksums,
                    verify=verify,
                    reader=self._readers[path],
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
        for ids, _ in held.preload(tokens).arrivals():
            if progress is not None:
                progress(len(ids) * held.info.geometry.stride)

    def watch(self, observer: Observer) -> None:
        """Call `observer` with the record of every pass to come, at its end."""
        self._observers.append(observer)

    def whole(self, layer: int) -> None:
        """Which bundles are in memory changes."""
        return

    def taps(self, layer: int) -> tuple[TapPoint, ...]:
        """What look-ahead selectors wait for; `blocks` shows them FFN inputs, once the layer's own reads have begun."""
        return self._taps[layer]

    @property
    def reads_ahead(self) -> bool:
        """Whether there are look-ahead selectors."""
        return bool(self._ahead)

    def carry_on(self) -> None:
        """Push what did not fit into the device's queue at once."""
        if self._newest is not None:
            self._newest.carry_on()

    def tap(self, layer: int, point: TapPoint, x: F32) -> None:
        """Select ahead for the layers whose look-ahead selectors wait for this activation."""
        self._look_ahead(layer, point, x)

    def blocks(self, layer: int, x: F32) -> Iterator[BundleBlock]:
        """Blocks of the active bundles of a layer: those held, then those that arrive. Valid until the next.

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
                state.on_the_way.finish(cancel=True)
                _add_costs(figures, state.on_the_way.costs)
                figures.n_prefetched += len(state.on_the_way.missing)
                state.on_the_way = None
        figures.n_active = len(active)
        fetch = state.on_the_way
        n_tokens = len(x)
        is_held = held.cache.is_held(active) if self._held_first else None
        for place, part in enumerate(fitting_parts(active, held.cache.capacity, is_held)):
            if fetch is None:
                fetch = held.fetch(part)
            try:
                if place == 0:
                    self._look_ahead(layer, "ffn_input", x)
                for ids, slots in _computable(fetch, held, overlap=self._overlap):
                    yield from _cut(ids, slots, held, n_tokens, figures)
            finally:
                fetch.finish(cancel=True)
            _count(figures, fetch)
            fetch = None
        self._end_layer(LayerStep(active, figures), n_tokens)

    @property
    def counters(self) -> IoCounters:
        """Bytes and requests of all files so far, and the seconds spent waiting for bundles."""
        parts = [reader.counters for reader in self._readers.values()]
        return IoCounters(
            sum(p.bytes_read for p in parts),
            sum(p.n_requests for p in parts),
            self.totals.total("wait_seconds"),
        )

    @property
    def n_held(self) -> int:
        """Bundles in slots now, of all layers."""
        return sum(layer.cache.num_used for layer in self._layers)

    def close(self) -> None:
        """Stop reading and close the files."""
        for state in self._states:
            if state.on_the_way is not None:
                state.on_the_way.finish(cancel=True)
                state.on_the_way = None
        for reader in self._readers.values():
            reader.close()

    def _look_ahead(self, layer: int, point: TapPoint, x: F32) -> None:
        """Select for the layers that look at this activation, and begin to read what they miss."""
        for target in self._ahead.get((layer, point), ()):
            stale, held = self._states[target], self._layers[target]
            if stale.on_the_way is not None:  # of a pass that was broken off
                stale.on_the_way.finish(cancel=True)
            state = self._states[target] = _LayerState()
            began = time.perf_counter()
            selectors = self._selectors if self._hints is None else self._hints
            chosen = selectors[target].selector.select(x)
            state.figures.select_seconds = time.perf_counter() - began
            if self._hints is None:
                state.selected = chosen
            if len(chosen) <= held.cache.capacity:
                state.on_the_way = self._newest = held.fetch(chosen, ahead=True)

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


def slots_nbytes(capacities: Sequence[int], strides: Sequence[int]) -> int:
    """DRAM that the slots of all layers take."""
    return sum(round_up(n * stride, IO_ALIGNMENT) for n, stride in zip(capacities, strides, strict=True))


def _computable(fetch: Fetch, held: LayerBundles, *, overlap: bool) -> Iterator[tuple[Ids, Slots]]:
    """Neurons and their slots: first the held ones, then the others as they arrive, or all once they are there."""
    arrivals = fetch.arrivals() if overlap else iter(list(fetch.arrivals()))
    if len(fetch.hits):
        yield fetch.hits, held.cache.slots(fetch.hits)
    yield from arrivals


def _cut(ids: Ids, slots: Slots, held: LayerBundles, n_tokens: int, figures: LayerFigures) -> Iterator[BundleBlock]:
    """Blocks of at most `BLOCK_NEURONS` where there are several tokens; counts the time the caller takes for each."""
    step = len(ids) if n_tokens == 1 else BLOCK_NEURONS
    for first in range(0, len(ids), step):
        block = slice(first, first + step)
        began = time.perf_counter()
        yield BundleBlock(ids[block], held.cache.rows, slots[block])
        figures.compute_seconds += time.perf_counter() - began


def _count(figures: LayerFigures, fetch: Fetch) -> None:
    figures.n_hits += len(fetch.hits)
    figures.n_missing += len(fetch.missing)
    figures.n_evicted += fetch.n_evicted
    _add_costs(figures, fetch.costs)


def _add_costs(figures: LayerFigures, costs: Costs) -> None:
    figures.bytes_read += costs.bytes_read
    figures.n_requests += costs.n_requests
    figures.wait_seconds += costs.wait_seconds
    figures.check_seconds += costs.check_seconds
    figures.upkeep_seconds += costs.upkeep_seconds
