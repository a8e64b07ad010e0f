"""Fitting low-rank predictors, against plain float64 arithmetic and planted structure."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_engine.predictor_training import (
    CutCurve,
    LowRankFit,
    RegressionStart,
    TrainingOptions,
    balanced_loss,
    balanced_slope,
    choose_rank,
    cut_curve,
    fit_low_rank,
    moments,
)

D_MODEL, N_NEURONS, RANK = 32, 96, 6
PIECE = 128


class Planted:
    """Activity that a low-rank map of z decides: the predictor that exists is the one to be found."""

    def __init__(self, n_tokens, seed, noise=0.0):
        structure, rng = np.random.default_rng(0), np.random.default_rng(seed)
        down = structure.standard_normal((RANK, D_MODEL))
        up = structure.standard_normal((N_NEURONS, RANK))
        mixing = np.eye(D_MODEL) + 0.3 * structure.standard_normal((D_MODEL, D_MODEL))
        shift = structure.standard_normal(D_MODEL)
        z = rng.standard_normal((n_tokens, D_MODEL)) @ mixing
        logits = z @ down.T @ up.T
        cuts = np.quantile(logits, structure.uniform(0.8, 0.98, N_NEURONS), axis=0).diagonal()
        self.z = (z + shift).astype(np.float32)
        self.active = logits + noise * rng.standard_normal(logits.shape) > cuts

    @property
    def n_pieces(self):
        return -(-len(self.z) // PIECE)

    def piece(self, index):
        tokens = slice(index * PIECE, (index + 1) * PIECE)
        return self.z[tokens].copy(), self.active[tokens].copy()


@pytest.fixture(scope="module")
def train():
    return Planted(6000, 1)


@pytest.fixture(scope="module")
def validation():
    return Planted(2000, 2)


def test_moments_are_those_of_numpy(train):
    of = moments(train)
    z, y = train.z.astype(np.float64), train.active.astype(np.float64)
    np.testing.assert_allclose(of.mean, z.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(of.scale, z.std(axis=0), rtol=1e-4)
    np.testing.assert_allclose(of.correlation, np.corrcoef(z.T), atol=1e-4)
    np.testing.assert_allclose(of.active_share, y.mean(axis=0), atol=1e-12)
    standard = (z - z.mean(axis=0)) / z.std(axis=0)
    np.testing.assert_allclose(of.cross, standard.T @ (y - y.mean(axis=0)) / len(z), atol=1e-4)


def test_each_kind_of_entry_counts_one_half(train):
    of = moments(train)
    share = train.active.mean()
    active, inactive = of.weights()
    assert active * share == pytest.approx(0.5)
    assert inactive * (1 - share) == pytest.approx(0.5)


def test_a_start_of_full_rank_is_the_linear_discriminant(train):
    of = moments(train)
    down, up, _ = RegressionStart(of).parameters(D_MODEL)
    ridge = 1e-3 * np.trace(of.correlation) / D_MODEL
    least_squares = np.linalg.solve(of.correlation + ridge * np.eye(D_MODEL), of.cross)  # (d_model, n_neurons)
    expected = (least_squares / (of.active_share * (1 - of.active_share))).T
    np.testing.assert_allclose(up.astype(np.float64) @ down, expected, atol=1e-3 * np.abs(expected).max())


def test_the_slope_is_that_of_the_loss():
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 3, (5, 7)).astype(np.float32)
    active, weights, step = rng.random((5, 7)) < 0.3, (4.0, 0.6), 1e-2
    slope = balanced_slope(logits.copy(), active, weights)
    for place in np.ndindex(logits.shape):
        above, below = logits.astype(np.float64), logits.astype(np.float64)
        above[place] += step
        below[place] -= step
        numeric = (balanced_loss(above, active, weights) - balanced_loss(below, active, weights)) / (2 * step)
        assert slope[place] == pytest.approx(numeric, rel=1e-3, abs=1e-6)


def test_the_slope_of_huge_logits_is_finite():
    logits = np.array([[1e30, -1e30, 500.0, -500.0]], np.float32)
    slope = balanced_slope(logits, np.array([[False, True, True, False]]), (1.0, 1.0))
    np.testing.assert_allclose(slope, [[0.25, -0.25, 0, 0]], atol=1e-6)


def test_planted_structure_is_found(train, validation):
    of = moments(train)
    fit = fit_low_rank(train, RANK, of, RegressionStart(of), TrainingOptions(epochs=6))
    curve = cut_curve(fit, validation)
    recall, predicted = curve.at(curve.cut_for_recall(0.95))
    assert recall >= 0.95
    assert predicted <= 1.25 * validation.active.mean()


def test_fitting_improves_on_its_start_and_repeats_with_its_seed(train, validation):
    of = moments(train)
    start = RegressionStart(of)
    losses = [
        balanced_loss(
            fit_low_rank(train, RANK, of, start, TrainingOptions(epochs=epochs)).logits(validation.z),
            validation.active,
            of.weights(),
        )
        for epochs in (0, 2)
    ]
    assert losses[1] < 0.9 * losses[0]
    again = [fit_low_rank(train, RANK, of, start, TrainingOptions(epochs=1, seed=5)) for _ in range(2)]
    np.testing.assert_array_equal(again[0].up, again[1].up)


def test_the_rank_of_the_structure_is_chosen(train, validation):
    choice = choose_rank(
        train, validation, (2, 6, 24), recall=0.95, bundle_stride=8192, options=TrainingOptions(epochs=4)
    )
    assert choice.fit.rank == 6
    cheap = choose_rank(train, validation, (2, 6, 24), recall=0.95, bundle_stride=1, options=TrainingOptions(epochs=1))
    assert cheap.fit.rank == 2


def test_a_choice_counts_with_the_matrices_that_float16_stores(train, validation):
    choice = choose_rank(train, validation, (4,), recall=0.9, bundle_stride=64, options=TrainingOptions(epochs=1))
    np.testing.assert_array_equal(choice.fit.up, choice.fit.up.astype(np.float16))
    np.testing.assert_array_equal(choice.fit.down, choice.fit.down.astype(np.float16))


def test_neurons_that_never_or_always_fire_do_no_harm():
    data = Planted(1000, 4)
    data.active[:, 0], data.active[:, 1] = False, True
    data.z[:, 3] = 7.0
    of = moments(data)
    fit = fit_low_rank(data, 4, of, RegressionStart(of), TrainingOptions(epochs=1))
    logits = fit.logits(data.z)
    assert np.isfinite(logits).all()
    assert logits[:, 0].max() < logits[:, 1].min()


def test_nothing_to_learn_from_is_refused():
    empty = Planted(1, 0)
    empty.z, empty.active = empty.z[:0], empty.active[:0]
    with pytest.raises(ValueError, match="no tokens"):
        moments(empty)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_cut_for_a_recall_is_the_highest_that_reaches_it(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    logits = rng.normal(0, data.draw(st.floats(0.1, 30)), (20, 10)).astype(np.float32)
    active = rng.random((20, 10)) < data.draw(st.floats(0, 1))
    recall = data.draw(st.floats(0.01, 1))
    curve = CutCurve()
    curve.add(logits[:7], active[:7])
    curve.add(logits[7:], active[7:])
    cut = curve.cut_for_recall(recall)
    reached, predicted = curve.at(cut)
    clipped = np.clip(logits, -19.999, 19.999)
    assert predicted == pytest.approx((clipped >= cut).mean(), abs=0.02)
    if active.any():
        assert reached >= recall - 1e-9
        higher = cut + 0.02
        assert (clipped[active] >= higher).mean() <= max(recall, reached) + 1e-9


def test_logits_are_the_product_of_the_matrices():
    rng = np.random.default_rng(0)
    fit = LowRankFit(*(rng.standard_normal(shape).astype(np.float32) for shape in ((3, 8), (5, 3), (5,))))
    z = rng.standard_normal((4, 8)).astype(np.float32)
    expected = z.astype(np.float64) @ fit.down.T.astype(np.float64) @ fit.up.T + fit.bias
    np.testing.assert_allclose(fit.logits(z), expected, atol=1e-4)
