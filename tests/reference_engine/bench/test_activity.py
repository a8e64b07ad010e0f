"""Synthetic activity has the statistics that it is fitted to."""

import dataclasses

import numpy as np
import pytest

from reference_engine.bench.activity import PUBLISHED, ActivityStatistics, SyntheticActivity, fit
from reference_engine.neuron_window import RecentTokens


@pytest.fixture(scope="module")
def activity():
    return SyntheticActivity(fit(PUBLISHED), n_layers=3, n_neurons=16384, n_tokens=48)


def test_the_fit_has_the_published_statistics():
    popularity = fit(PUBLISHED)
    assert popularity.aggregated(1) == pytest.approx(0.10, abs=1e-4)
    assert popularity.aggregated(5) == pytest.approx(0.24, abs=1e-4)
    assert popularity.aggregated(6) - popularity.aggregated(5) == pytest.approx(0.024, abs=1e-4)


def test_so_has_the_draw(activity):
    achieved = activity.statistics(5)
    assert achieved.active_share == pytest.approx(0.10, rel=0.05)
    assert achieved.held_share == pytest.approx(0.24, rel=0.05)
    assert achieved.incremental_share == pytest.approx(0.024, rel=0.05)


def test_the_paper_s_window_loads_what_the_statistics_say(activity):
    """The statistics and the engine's own rule count alike: window of five, misses from the sixth token on."""
    window, missing, held = RecentTokens(activity.n_neurons, 5), [], []
    for token in range(activity.n_tokens):
        missing.append(len(window.step(activity.active(0, token)).missing))
        held.append(len(window.held()))
    alone = SyntheticActivity(fit(PUBLISHED), 1, activity.n_neurons, activity.n_tokens).statistics(5)
    assert np.mean(missing[5:]) / activity.n_neurons == pytest.approx(alone.incremental_share, rel=1e-6)
    assert np.mean(held[4:]) / activity.n_neurons == pytest.approx(alone.held_share, rel=1e-6)


def test_popularity_is_skewed(activity):
    counts = np.zeros(activity.n_neurons)
    for token in range(activity.n_tokens):
        counts[activity.active(0, token)] += 1
    counts.sort()
    busiest_tenth = counts[-len(counts) // 10 :].sum() / counts.sum()
    assert 0.6 < busiest_tenth < 0.9


def test_several_tokens_are_a_union_and_the_end_is_the_beginning(activity):
    three = activity.active(1, 46, 3)
    expected = np.unique(np.concatenate([activity.active(1, token) for token in (46, 47, 0)]))
    assert three.dtype == np.int32
    assert (three == expected).all()


def test_a_seed_repeats_itself_and_layers_differ(activity):
    again = SyntheticActivity(fit(PUBLISHED), 3, 16384, 48)
    assert (again.active(2, 7) == activity.active(2, 7)).all()
    assert (
        len(activity.active(0, 7)) != len(activity.active(1, 7))
        or (activity.active(0, 7) != activity.active(1, 7)).any()
    )


@pytest.mark.parametrize(
    "change", [{"held_share": 0.5}, {"held_share": 0.05}, {"incremental_share": 0.2}, {"window_tokens": 1}]
)
def test_impossible_statistics_are_refused(change):
    with pytest.raises(ValueError, match="no activity"):
        fit(dataclasses.replace(PUBLISHED, **change))


def test_other_statistics_can_be_fitted():
    target = ActivityStatistics(0.05, 4, 0.12, 0.016)
    achieved = SyntheticActivity(fit(target), 2, 16384, 40).statistics(4)
    assert achieved.held_share == pytest.approx(0.12, rel=0.05)
    assert achieved.incremental_share == pytest.approx(0.016, rel=0.07)


def test_too_few_tokens_say_nothing():
    with pytest.raises(ValueError, match="nothing about windows"):
        SyntheticActivity(fit(PUBLISHED), 1, 256, 5).statistics(5)
