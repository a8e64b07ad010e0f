"""Losses of perplexity with a margin, on scores that are made up."""

import math

import numpy as np
import pytest

from reference_engine.calibration.costs import PairedScores
from reference_engine.perplexity import Score

N_TOKENS = 100


def paired(exact, losses):
    """Windows with these nats per token, and these more."""
    return PairedScores(
        tuple(Score(N_TOKENS * nats, N_TOKENS) for nats in exact),
        tuple(Score(N_TOKENS * (nats + loss), N_TOKENS) for nats, loss in zip(exact, losses, strict=True)),
    )


def test_the_ratio_is_that_of_perplexities():
    scores = paired([3.0, 4.0], [0.02, 0.0])
    assert scores.exact_perplexity == pytest.approx(math.exp(3.5))
    assert scores.predicted_perplexity == pytest.approx(math.exp(3.51))
    assert scores.ratio == pytest.approx(math.exp(0.01))


def test_a_loss_that_is_the_same_everywhere_needs_no_margin():
    assert paired([3.0, 9.0, 1.0], [0.02, 0.02, 0.02]).loss_bound(10) == pytest.approx(math.expm1(0.02))


def test_one_window_tells_no_more_than_its_loss():
    assert paired([3.0], [0.01]).loss_bound(10) == pytest.approx(math.expm1(0.01))


def test_how_much_text_is_in_a_window_before_does_not_widen_the_margin():
    losses = [0.01, 0.03, 0.02, 0.0]
    assert paired([1.0, 9.0, 2.0, 7.0], losses).loss_bound(8) == pytest.approx(paired([4.0] * 4, losses).loss_bound(8))


@pytest.mark.parametrize(("n_chosen", "n_measured"), [(12, 24), (50, 100), (60, 5)])
def test_other_windows_stay_below_the_bound_as_often_as_promised(n_chosen, n_measured):
    rng = np.random.default_rng(0)
    draws = rng.normal(0.01, 0.02, (1000, n_chosen + n_measured))
    kept = [
        np.expm1(row[n_chosen:].mean()) <= paired(rng.uniform(2, 6, n_chosen), row[:n_chosen]).loss_bound(n_measured)
        for row in draws
    ]
    assert 0.925 <= np.mean(kept) <= 0.975
