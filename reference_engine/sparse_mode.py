"""Sparse mode put together: options, plan, selectors, windows, readers -> `SparseBundles`.

Knows: how the parts of sparse mode fit together. Does not know: their insides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from flashfmt import FlashModel
from flashfmt.encodings import Encoding
from flashfmt.errors import PromptError
from reference_engine.active_bundles import OpenReader
from reference_engine.backends import Backend
from reference_engine.bundle_checksums import Verify
from reference_engine.flash_io import IO_ALIGNMENT, IoTuning, RangeReader, open_reader
from reference_engine.neuron_window import DEFAULT_WINDOW, Ids, NeuronWindow
from reference_engine.plan import FixedParts, MemoryPlan
from reference_engine.preloading import likely_tokens
from reference_engine.resident_encoding import ResidentsChoice, choose_plan, encodings_to_try
from reference_engine.residents import resident_matrices
from reference_engine.selectors import (
    SelectorChoice,
    TappedSelector,
    load_selectors,
    selectors_load_nbytes,
    selectors_nbytes,
)
from reference_engine.slot_sharing import F64, expected_misses, predicted_window
from reference_engine.sparse_bundles import SparseBundles
from reference_engine.sparse_plan import BundleSizes, SparsePlan, plan_sparse

_WINDOW_TOKENS: Final = 5
_PAPER_SHARE: Final = 0.24


class BuildsWindow(Protocol):
    """A rule for the neuron window, such as a `WindowChoice`."""

    def build(self, n_neurons: int, capacity: int) -> NeuronWindow:
        """The window of a layer with `capacity` slots."""
        ...


@dataclass(frozen=True, slots=True)
class SparseOptions:
    """How neurons are left out.

    Parameters
    ----------
    selector : decides which neurons are computed.
    prefetch : a selector whose choice is read ahead and decides nothing; None for none.
    window : which bundles stay from token to token.
    open_reader : opens a file of bundles for reading; None takes the best way that works here.
    overlap : compute with the bundles that are held while the others are read; without it, wait for all of them first.
    substitute : puts others in the place of the loaded selectors, for measurements with activity that is given.
    preload : fill the slots while loading, where the file has statistics that say with what.
    """

    selector: SelectorChoice
    prefetch: SelectorChoice | None = None
    window: BuildsWindow = DEFAULT_WINDOW
    open_reader: OpenReader | None = None
    overlap: bool = True
    substitute: Callable[[list[TappedSelector]], list[TappedSelector]] | None = None
    preload: bool = True

    @property
    def choices(self) -> tuple[SelectorChoice, ...]:
        """All selectors that are asked for."""
        return (self.selector,) if self.prefetch is None else (self.selector, self.prefetch)


def sparse_selectors_nbytes(model: FlashModel, options: SparseOptions) -> int:
    """DRAM that all selectors take.

    Raises
    ------
    FlashError
        If a selector does not go with the model.
    """
    return sum(selectors_nbytes(model, choice) for choice in options.choices)


def selector_encodings(options: SparseOptions) -> set[Encoding]:
    """Encodings of the matrices that selectors make while loading."""
    return {choice.encoding for choice in options.choices if choice.encoding is not None}


def window_share(model: FlashModel, options: SparseOptions) -> float:
    """Share of the neurons that the whole window takes: those of the last five tokens (LLM in a flash, section 3.1).

    By the file's statistics, with what its predictors name beyond what is active; the paper's figure without.
    """
    windows = _aggregated_windows(model, options)
    if windows is None:
        return _PAPER_SHARE
    return float(np.mean([window[min(_WINDOW_TOKENS, len(window)) - 1] for window in windows]))


def plan_with_residents(
    model: FlashModel,
    choice: ResidentsChoice,
    sparse: SparseOptions | None,
    plan_exact: Callable[[Encoding | None], MemoryPlan],
    plan_selected: Callable[[SparseOptions, Encoding | None], SparsePlan],
) -> MemoryPlan | SparsePlan:
    """The plan with the resident encoding of `choice`; ``auto`` re-encodes only where neurons are left out already.

    Parameters
    ----------
    sparse : how neurons are left out; None computes all of them.
    plan_exact, plan_selected : plan without and with leaving neurons out, with residents in an encoding.

    Raises
    ------
    BudgetError
        If no encoding fits; names the smallest ceiling that works.
    """
    encodings = encodings_to_try(resident_matrices(model), choice, may_be_lossy=sparse is not None)
    if sparse is None:
        return choose_plan(encodings, plan_exact, lambda plan: True)
    whole = window_share(model, sparse)
    return choose_plan(encodings, partial(plan_selected, sparse), lambda plan: plan.held_share >= whole)


def sparse_load_nbytes(model: FlashModel, options: SparseOptions, capacities: Sequence[int]) -> int:
    """Bytes that `load_sparse` reports to its progress callback with so many slots in each layer."""
    nbytes = sum(selectors_load_nbytes(model, choice) for choice in options.choices)
    for layer, tokens in starting_tokens(model, options, capacities):
        window = options.window.build(model.decoder.ffn.d_ff, capacities[layer])
        for active in tokens:
            window.step(active)
        nbytes += len(window.held()) * model.layers[layer].geometry.stride
    return nbytes


def plan_sparse_mode(
    model: FlashModel, options: SparseOptions, fixed: FixedParts, ceiling: int, context_tokens: int
) -> SparsePlan:
    """Split `ceiling` bytes.

    Raises
    ------
    BudgetError
        If the ceiling is below the floor; names the floor.
    """
    sizes = BundleSizes(
        n_layers=model.decoder.n_layers,
        n_neurons=model.decoder.ffn.d_ff,
        stride=max(info.geometry.stride for info in model.layers),
        n_files=len({info.extent.path for info in model.layers}),
    )
    return plan_sparse(fixed, sizes, ceiling, context_tokens, _curves(model, options))


def load_sparse(
    model: FlashModel,
    options: SparseOptions,
    plan: SparsePlan,
    backend: Backend,
    *,
    verify: Verify,
    progress: Callable[[int], None] | None = None,
) -> SparseBundles:
    """Load the selectors, open the files, and fill the slots where `options` and statistics say with what.

    Raises
    ------
    FlashReadError, ChecksumError
        If a selector, or a bundle to begin with, cannot be read.
    FlashError
        If the selectors do not go with the model, or with each other.
    """

    def load(choice: SelectorChoice, progress: Callable[[int], None] | None) -> list[TappedSelector]:
        return load_selectors(model, choice, backend, verify=verify, progress=progress)

    selectors, hints = load_with_hints(options, load, progress)
    n_neurons = model.decoder.ffn.d_ff
    bundles = SparseBundles(
        model,
        selectors=selectors,
        hints=hints,
        windows=[options.window.build(n_neurons, capacity) for capacity in plan.capacities],
        capacities=plan.capacities,
        open_reader=options.open_reader or bundle_opener(model),
        overlap=options.overlap,
        verify=verify,
    )
    try:
        for layer, tokens in starting_tokens(model, options, plan.capacities):
            bundles.preload(layer, tokens, progress)
    except BaseException:
        bundles.close()
        raise
    return bundles


def load_with_hints(
    options: SparseOptions,
    load: Callable[[SelectorChoice, Callable[[int], None] | None], list[TappedSelector]],
    progress: Callable[[int], None] | None = None,
) -> tuple[list[TappedSelector], list[TappedSelector] | None]:
    """The selectors that decide, and those whose choice is read ahead where there are such; `load` makes them.

    Raises
    ------
    FlashReadError, ChecksumError
        If what they need cannot be read.
    FlashError
        If they do not go with the model, or with each other.
    """
    selectors = load(options.selector, progress)
    if options.substitute is not None:
        selectors = options.substitute(selectors)
    if options.prefetch is None:
        return selectors, None
    if any((s.tap.layer, s.tap.point) != (layer, "ffn_input") for layer, s in enumerate(selectors)):
        raise PromptError("a selector that decides beside a prefetching one looks at the FFN input itself")
    return selectors, load(options.prefetch, progress)


def starting_tokens(
    model: FlashModel, options: SparseOptions, capacities: Sequence[int]
) -> Iterator[tuple[int, Iterator[Ids]]]:
    """(layer, made-up tokens that its window is to begin with), for the layers that the file has statistics of."""
    for layer in range(model.decoder.n_layers):
        statistics = model.statistics(layer) if options.preload else None
        if statistics is not None:
            yield layer, likely_tokens(statistics["firing_frequency"], capacities[layer])


def _curves(model: FlashModel, options: SparseOptions) -> list[tuple[F64, F64]] | None:
    """Expected misses of each layer over its slots, where the file has statistics."""
    windows = _aggregated_windows(model, options)
    return None if windows is None else [expected_misses(window, model.decoder.ffn.d_ff) for window in windows]


def _aggregated_windows(model: FlashModel, options: SparseOptions) -> list[F64] | None:
    """s_agg of what is computed in each layer, where the file has statistics."""
    windows: list[F64] = []
    for layer in range(model.decoder.n_layers):
        statistics = model.statistics(layer)
        if statistics is None:
            return None
        aggregated = statistics["aggregated_window"]
        stored = model.predictor(layer) if options.selector.kind == "file" else None
        if stored is not None and stored[0].measured is not None:
            aggregated = predicted_window(aggregated, stored[0].measured.predicted_fraction)
        windows.append(np.asarray(aggregated, np.float64))
    return windows


def bundle_opener(model: FlashModel, tuning: IoTuning | None = None) -> OpenReader:
    """Opens the files that the bundles of a model lie in, the best way that works here; may outlive the model.

    `tuning` is what the device profile says by default.
    """
    alignments: dict[Path, int] = {}
    for info in model.layers:
        known = alignments.get(info.extent.path, IO_ALIGNMENT)
        alignments[info.extent.path] = math.gcd(known, info.extent.offset, info.geometry.stride)

    def opener(path: Path) -> RangeReader:
        return open_reader(path, tuning=tuning, range_alignment=alignments[path])

    return opener
