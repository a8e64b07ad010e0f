"""Simulated neuron windows against plain sets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_engine.evaluation.window_simulation import simulate_windows


@settings(max_examples=25, deadline=None)
@given(k=st.integers(1, 6), density=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_the_papers_window_over_sets(k, density, seed):
    rng = np.random.default_rng(seed)
    layers = [rng.random((25, 16)) < density for _ in range(2)]
    hits = held = missing = 0
    for layer in layers:
        sets = [set(np.flatnonzero(row)) for row in layer]
        for t, active in enumerate(sets):
            before = set().union(*sets[max(0, t - k) : t])
            hits += len(active & before)
            missing += len(active - before)
            held += len(set().union(*sets[max(0, t - k + 1) : t + 1]))
    (result,) = simulate_windows(layers, k_tokens=[k], capacities=[])
    assert result.hit_rate == pytest.approx(hits / max(hits + missing, 1))
    assert result.missing_share == pytest.approx(missing / (2 * 25 * 16))
    assert result.held_share == pytest.approx(held / (2 * 25 * 16))


def test_room_for_all_misses_each_neuron_once():
    layer = np.random.default_rng(0).random((50, 20)) < 0.3
    results = simulate_windows([layer], k_tokens=[], capacities=[1.0])
    assert [result.rule for result in results] == ["lru", "frequency"]
    for result in results:
        assert result.missing_share * layer.size == pytest.approx(layer.any(axis=0).sum())


def test_more_room_never_hits_less():
    layer = np.random.default_rng(1).random((80, 40)) < np.linspace(0.01, 0.5, 40)
    results = simulate_windows([layer], k_tokens=[], capacities=[0.05, 0.2, 0.5, 0.8, 1.0])
    for rule in ("lru", "frequency"):
        rates = [result.hit_rate for result in results if result.rule == rule]
        assert rates == sorted(rates)
    assert results[0].held_share <= 0.05


def test_slots_go_where_the_stored_curves_say():
    rng = np.random.default_rng(2)
    busy, idle = rng.random((60, 40)) < 0.4, rng.random((60, 40)) < 0.02
    curves = [np.array([0.4, 0.64, 0.8, 1.0], np.float32), np.array([0.02, 0.04, 0.06, 0.08], np.float32)]
    (even, _) = simulate_windows([busy, idle], k_tokens=[], capacities=[0.5])
    (shared, _) = simulate_windows([busy, idle], k_tokens=[], capacities=[0.5], aggregated_windows=curves)
    assert shared.hit_rate > even.hit_rate
