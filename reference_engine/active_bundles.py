"""The FFN bundles that a token needs: selected, looked up, the missing ones read; computed as they come.

Sparse mode's side of a decode step, for each layer:

    select -> step the window -> begin all reads -> hand out what is held -> hand out what arrives

An earlier layer's activation may select ahead: the reads then run behind whatever is demanded, while attention and the
layers before are computed. A look-ahead selector decides itself, unless another one is named to decide; then it is a
hint, and what it did not foresee is read on demand.

Knows: the order of these steps. Does not know: how bundles are read and kept (`layer_bundles` in DRAM, `device_layer`
on a device), arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from flashfmt import BundlesInfo
from reference_engine.flash_io import IoCounters, RangeReader
from reference_engine.models.weights import F32, BundleBlock, TapPoint
from reference_engine.neuron_window import Ids, fitting_parts
from reference_engine.selectors import TappedSelector
from reference_engine.telemetry import Costs, LayerFigures, LayerStep, PassRecord, SparseTotals

BLOCK_NEURONS: Final = 1024  # of several tokens at once: bounds the room that the arithmetic needs
OpenReader = Callable[[Path], RangeReader]
Observer = Callable[[PassRecord], None]


class ActiveFetch(Protocol):
    """Bundles of a layer on their way.

    Attributes
    ----------
    costs : so far.
    n_hits, n_missing, n_evicted : bundles that were held, that have to be read, and that left for them.
    """

    costs: Costs

    @property
    def n_hits(self) -> int: ...
    @property
    def n_missing(self) -> int: ...
    @property
    def n_evicted(self) -> int: ...

    def there(self) -> tuple[Any, Any]:
        """Neurons and slots of what can be computed at once; raises as `arrivals`."""
        ...

    def arrivals(self) -> Iterator[tuple[Any, Any]]:
        """Neurons and slots of the others as they arrive.

        Raises
        ------
        FlashReadError, ChecksumError
            Naming layer, neuron and byte offset. The fetch is finished then: what came well stays held.
        """
        ...

    def finish(self) -> None:
        """Keep what has arrived, give up the rest, and roll back what is not there, without a word."""
        ...


Fetched = TypeVar("Fetched", bound=ActiveFetch)
Fetched_co = TypeVar("Fetched_co", bound=ActiveFetch, covariant=True)


class ActiveLayer(Protocol[Fetched_co]):
    """Bundles of one layer in slots.

    Attributes
    ----------
    rows : uint8 [capacity, stride], where bundles are held; on the device, if that computes.
    """

    info: BundlesInfo

    @property
    def rows(self) -> Any: ...
    @property
    def capacity(self) -> int: ...
    @property
    def n_held(self) -> int: ...

    def is_held(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Which neurons have a slot, bool [len(ids)]."""
        ...

    def fetch(self, wanted: Ids, *, ahead: bool = False) -> Fetched_co:
        """Hold the neurons `wanted`, and begin to read those that are not held. No other fetch may be unfinished.

        Parameters
        ----------
        wanted : sorted, unique, at most as many as there are slots.
        ahead : let everything that is read for a layer in work go first.

        Raises
        ------
        FlashReadError
            If the reader is closed. What reading itself meets is raised by `ActiveFetch.arrivals`.
        """
        ...

    def preload(self, tokens: Iterable[Ids]) -> Fetched_co:
        """Hold what the window holds behind some tokens that nothing is computed of, and begin to read it.

        Nothing must have been fetched before.

        Raises
        ------
        FlashReadError
            If the reader is closed.
        """
        ...


class Counted(Protocol):
    """What reads, and counts what it reads."""

    @property
    def counters(self) -> IoCounters: ...


@dataclass(slots=True)
class _LayerState(Generic[Fetched]):
    """What is known of a layer before its turn in a pass."""

    selected: Ids | None = None
    """What a look-ahead selector decided."""
    on_the_way: Fetched | None = None
    figures: LayerFigures = field(default_factory=LayerFigures)


class ActiveBundles(Generic[Fetched]):
    """Bundles of the active neurons of all layers; `BundleSource`.

    Parameters
    ----------
    layers : in order.
    readers : of their files; `files` closes them.
    selectors : for each layer the one that decides.
    hints : for each layer a selector whose choice is read ahead, without being decisive; None for no hints.
    overlap : hand out what is held while the rest is read; without it, wait until all is there.
    held_first : where more neurons are active than there are slots, begin with those that are held.

    Attributes
    ----------
    totals, decode_totals : figures of all passes so far, and of those of a single token.
    """

    def __init__(
        self,
        layers: Sequence[ActiveLayer[Fetched]],
        readers: Sequence[Counted],
        files: ExitStack,
        *,
        selectors: Sequence[TappedSelector],
        hints: Sequence[TappedSelector] | None = None,
        overlap: bool = True,
        held_first: bool = True,
    ) -> None:
        self._layers = layers
        self._readers = readers
        self._files = files
        self._selectors = selectors
        self._hints = hints
        self._overlap = overlap
        self._held_first = held_first
        self._states = [_LayerState[Fetched]() for _ in layers]
        self._newest: Fetched | None = None  # of those read ahead
        self._steps: list[LayerStep] = []
        self._observers: list[Observer] = []
        self.totals = SparseTotals(len(layers))
        self.decode_totals = SparseTotals(len(layers))
        self._ahead: dict[tuple[int, TapPoint], list[int]] = {}
        for layer, tapped in enumerate(selectors if hints is None else hints):
            if (tapped.tap.layer, tapped.tap.point) != (layer, "ffn_input"):
                self._ahead.setdefault((tapped.tap.layer, tapped.tap.point), []).append(layer)
        self._taps: list[tuple[TapPoint, ...]] = [
            tuple(point for place, point in self._ahead if place == layer and point != "ffn_input")
            for layer in range(len(layers))
        ]

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
        """Which bundles are held changes."""
        return

    def taps(self, layer: int) -> tuple[TapPoint, ...]:
        """What look-ahead selectors wait for; `blocks` shows them FFN inputs, once the layer's own reads have begun."""
        return self._taps[layer]

    @property
    def reads_ahead(self) -> bool:
        """Whether reads have to be pushed that nobody waits for yet."""
        return False

    def carry_on(self) -> None:
        """Nothing to do: reads go on by themselves."""

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
                state.on_the_way.finish()
                figures.n_prefetched += state.on_the_way.n_missing
                figures.add(state.on_the_way.costs)
                state.on_the_way = None
        figures.n_active = len(active)
        fetch, n_tokens = state.on_the_way, len(x)
        is_held = held.is_held(active) if self._held_first else None
        for place, part in enumerate(fitting_parts(active, held.capacity, is_held)):
            if fetch is None:
                fetch = held.fetch(part)
            try:
                if place == 0:
                    self._look_ahead(layer, "ffn_input", x)
                for ids, slots in self._computable(fetch):
                    yield from _cut(ids, slots, held.rows, n_tokens, figures)
            finally:
                fetch.finish()
            figures.n_hits += fetch.n_hits
            figures.n_missing += fetch.n_missing
            figures.n_evicted += fetch.n_evicted
            figures.add(fetch.costs)
            fetch = None
        self._end_layer(LayerStep(active, figures), n_tokens)

    @property
    def counters(self) -> IoCounters:
        """Bytes and requests of all files so far, and the seconds spent waiting for bundles."""
        parts = [reader.counters for reader in self._readers]
        return IoCounters(
            sum(p.bytes_read for p in parts),
            sum(p.n_requests for p in parts),
            self.totals.total("wait_seconds"),
        )

    @property
    def n_held(self) -> int:
        """Bundles in slots now, of all layers."""
        return sum(layer.n_held for layer in self._layers)

    def close(self) -> None:
        """Stop reading and close the files."""
        for state in self._states:
            if state.on_the_way is not None:
                state.on_the_way.finish()
                state.on_the_way = None
        self._files.close()

    def _computable(self, fetch: Fetched) -> Iterator[tuple[Any, Any]]:
        """Neurons and their slots: those that are there, then the others as they arrive or once all have."""
        arrivals = fetch.arrivals() if self._overlap else iter(list(fetch.arrivals()))
        ids, slots = fetch.there()
        if len(ids):
            yield ids, slots
        yield from arrivals

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
            if len(chosen) <= held.capacity:
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


def _cut(ids: Any, slots: Any, rows: Any, n_tokens: int, figures: LayerFigures) -> Iterator[BundleBlock]:
    """Blocks of at most `BLOCK_NEURONS` where there are several tokens; counts the time the caller takes for each."""
    step = len(ids) if n_tokens == 1 else BLOCK_NEURONS
    for first in range(0, len(ids), step):
        block = slice(first, first + step)
        began = time.perf_counter()
        yield BundleBlock(ids[block], rows, slots[block])
        figures.compute_seconds += time.perf_counter() - began
