"""Statistics of active sets against a plain model of sets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_engine.calibration.activity import ActivityStatistics


def plain_window_curve(active, window_tokens):
    """s_agg as SPEC.md defines it, over Python sets."""
    sets = [set(np.flatnonzero(row)) for row in active]
    curve = []
    for k in range(1, window_tokens + 1):
        unions = [len(set().union(*sets[t - k + 1 : t + 1])) for t in range(k - 1, len(sets))]
        curve.append(sum(unions) / len(unions) / active.shape[1])
    return curve


@settings(max_examples=60, deadline=None)
@given(
    n_tokens=st.integers(1, 30),
    n_neurons=st.integers(1, 12),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_the_curve_and_the_frequencies_are_those_of_plain_sets(n_tokens, n_neurons, density, seed, data):
    active = np.random.default_rng(seed).random((n_tokens, n_neurons)) < density
    window_tokens = data.draw(st.integers(1, n_tokens))
    cut = data.draw(st.integers(0, n_tokens))
    statistics = ActivityStatistics(n_neurons, window_tokens)
    statistics.add(active[:cut])
    statistics.add(active[cut:])
    np.testing.assert_allclose(statistics.firing_frequency(), active.mean(axis=0), atol=1e-6)
    expected = np.maximum.accumulate(plain_window_curve(active, window_tokens))
    np.testing.assert_allclose(statistics.aggregated_window(), expected, atol=1e-6)


def test_a_known_curve():
    active = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]], bool)
    statistics = ActivityStatistics(4, 3)
    statistics.add(active)
    np.testing.assert_allclose(statistics.aggregated_window(), [1 / 4, 2 / 4, (2 + 3) / 2 / 4])


def test_a_window_longer_than_the_text_is_refused():
    statistics = ActivityStatistics(4, 3)
    statistics.add(np.ones((2, 4), bool))
    with pytest.raises(ValueError, match="do not fill"):
        statistics.aggregated_window()
