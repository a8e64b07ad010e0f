"""Neuron windows over recorded active sets: how often an active neuron is held already. Pure; no model is run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from reference_engine.evaluation.results import WindowResult
from reference_engine.neuron_window import LeastRecent, NeuronWindow, RecentTokens

Mask = npt.NDArray[np.bool_]


def simulate_windows(
    layers: Sequence[Mask], *, k_tokens: Iterable[int], capacities: Iterable[float]
) -> tuple[WindowResult, ...]:
    """Run both rules over the sets of every layer, from empty windows.

    Parameters
    ----------
    layers : by layer, bool [n_tokens, n_neurons].
    k_tokens : window lengths of the paper's rule.
    capacities : of the capacity-bound rule, as shares of a layer.
    """
    results = [_simulate("recent", k, layers, [RecentTokens(m.shape[1], k) for m in layers]) for k in k_tokens]
    for share in capacities:
        windows = [LeastRecent(m.shape[1], max(1, round(share * m.shape[1]))) for m in layers]
        results.append(_simulate("least_recent", share, layers, windows))
    return tuple(results)


def _simulate(rule: str, size: float, layers: Sequence[Mask], windows: Sequence[NeuronWindow]) -> WindowResult:
    hits = missing = held = 0
    for active_sets, window in zip(layers, windows, strict=True):
        n_held = 0
        for mask in active_sets:
            active = np.flatnonzero(mask).astype(np.int32)
            room = window.capacity if isinstance(window, LeastRecent) else max(len(active), 1)
            for first in range(0, len(active), room):
                step = window.step(active[first : first + room])
                hits += len(step.hits)
                missing += len(step.missing)
                n_held += len(step.missing) - len(step.evicted)
            held += n_held
    n_entries = max(sum(m.size for m in layers), 1)
    return WindowResult(rule, float(size), hits / max(hits + missing, 1), held / n_entries, missing / n_entries)
