"""Neuron windows over recorded active sets: how often an active neuron is held already. Pure; no model is run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from reference_engine.evaluation.results import WindowResult
from reference_engine.neuron_window import DEFAULT_WINDOW, NeuronWindow, WindowChoice
from reference_engine.slot_sharing import expected_misses, share_slots

Mask = npt.NDArray[np.bool_]

CAPACITY_RULES: Final = (WindowChoice("lru"), DEFAULT_WINDOW)


def simulate_windows(
    layers: Sequence[Mask],
    *,
    k_tokens: Iterable[int],
    capacities: Iterable[float],
    aggregated_windows: Sequence[npt.NDArray[np.float32]] | None = None,
) -> tuple[WindowResult, ...]:
    """Run the rules over the sets of every layer, from empty windows.

    Parameters
    ----------
    layers : by layer, bool [n_tokens, n_neurons]; at least one.
    k_tokens : window lengths of the paper's rule, which then has all the room that it wants.
    capacities : of the rules that go by capacity, as shares of all neurons.
    aggregated_windows : by layer, the file's s_agg, by which slots are shared among layers as an engine shares them;
        None shares them evenly.
    """
    n_neurons = layers[0].shape[1]
    curves = None if aggregated_windows is None else [expected_misses(s_agg, n_neurons) for s_agg in aggregated_windows]
    results = []
    for k in k_tokens:
        windows = [WindowChoice("paper", k).build(n_neurons, n_neurons) for _ in layers]
        results.append(_simulate("paper", k, layers, windows, [n_neurons] * len(layers)))
    shares = tuple(capacities)
    for rule in CAPACITY_RULES:
        for share in shares:
            n_slots = max(1, round(share * n_neurons)) * len(layers)
            rooms = share_slots(n_slots, n_neurons, curves, n_layers=len(layers), minimum=1)
            windows = [rule.build(n_neurons, room) for room in rooms]
            results.append(_simulate(rule.rule, share, layers, windows, rooms))
    return tuple(results)


def _simulate(
    rule: str, size: float, layers: Sequence[Mask], windows: Sequence[NeuronWindow], rooms: Sequence[int]
) -> WindowResult:
    hits = missing = held = 0
    for active_sets, window, room in zip(layers, windows, rooms, strict=True):
        n_held = 0
        for mask in active_sets:
            active = np.flatnonzero(mask).astype(np.int32)
            for first in range(0, max(len(active), 1), room):  # a token without active neurons is a token, too
                step = window.step(active[first : first + room])
                hits += len(step.hits)
                missing += len(step.missing)
                n_held += len(step.missing) - len(step.evicted)
            held += n_held
    n_entries = max(sum(m.size for m in layers), 1)
    return WindowResult(rule, float(size), hits / max(hits + missing, 1), held / n_entries, missing / n_entries)
