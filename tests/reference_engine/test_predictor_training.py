"""Fitting low-rank predictors, against plain float64 arithmetic and planted structure."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfmt.errors import MissingExtraError
from reference_engine.predictor_training import (
    CutCurve,
    LowRankFit,
    TrainingOptions,
    balanced_loss,
    choose_rank,
    cut_curve,
)
from reference_engine.training import NumpyFit, load_fitter
from reference_engine.training.numpy_fit import balanced_slope
from reference_engine.training.regression_start import RegressionStart, moments

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


def test_each_kind_of_entry_counts_one_half(train):
    of = moments(train)
    share = train.active.mean()
    active, inactive = of.weights()
    assert active * share == pytest.approx(0.5)
    assert inactive * (1 - share) == pytest.approx(0.5)


def discriminant(train, of):
    """Coefficients of the linear discriminant of every neuron for standardised z, in float64: [n_neurons, d_model]."""
    standard = (train.z.astype(np.float64) - of.mean) / of.scale
    cross = standard.T @ (train.active - of.active_share) / len(train.z)
    ridge = 1e-3 * np.trace(of.correlation) / D_MODEL
    least_squares = np.linalg.solve(of.correlation + ridge * np.eye(D_MODEL), cross)
    return (least_squares / (of.active_share * (1 - of.active_share))).T


def test_a_start_of_full_rank_is_the_linear_discriminant(train):
    of = moments(train)
    down, up, _ = RegressionStart(train, of, D_MODEL).parameters(D_MODEL)
    expected = discriminant(train, of)
    np.testing.assert_allclose(up.astype(np.float64) @ down, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("rank", [2, 5])
def test_a_start_of_low_rank_loses_hardly_more_than_the_best_approximation(train, rank):
    of = moments(train)
    ridge = 1e-3 * np.trace(of.correlation) / D_MODEL
    whitened = np.linalg.cholesky(of.correlation + ridge * np.eye(D_MODEL)).T  # coefficients meet whitened z
    spread = np.sqrt(of.active_share * (1 - of.active_share))[:, None]
    down, up, _ = RegressionStart(train, of, rank).parameters(rank)
    scaled = spread * discriminant(train, of) @ whitened.T
    lost = np.linalg.norm(scaled - spread * (up.astype(np.float64) @ down) @ whitened.T)
    best = np.sqrt((np.linalg.svd(scaled, compute_uv=False)[rank:] ** 2).sum())
    assert lost <= 1.02 * best


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


FITTERS = ["numpy", "torch"]


def fitter(name):
    """One of the ways to fit; skips the test where it cannot be had."""
    try:
        return load_fitter(name)
    except MissingExtraError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", FITTERS)
def test_planted_structure_is_found(train, validation, name):
    fit = fitter(name)(train, validation, RANK, TrainingOptions(epochs=6)).fit(RANK)
    curve = cut_curve(fit, validation)
    recall, predicted = curve.at(curve.cut_for_recall(0.95))
    assert recall >= 0.95
    assert predicted <= 1.25 * validation.active.mean()


def test_numpy_and_torch_reach_the_same(train, validation):
    noisy = Planted(4000, 3, noise=2.0)
    reached = []
    for name in FITTERS:
        fit = fitter(name)(noisy, validation, 8, TrainingOptions(epochs=3)).fit(4)
        curve = cut_curve(fit, validation)
        shares = [curve.at(curve.cut_for_recall(recall))[1] for recall in (0.8, 0.9, 0.95)]
        reached.append((fit, shares))
    (numpy_fit, numpy_shares), (torch_fit, torch_shares) = reached
    np.testing.assert_allclose(torch_shares, numpy_shares, rtol=0.02)
    np.testing.assert_allclose(torch_fit.logits(validation.z), numpy_fit.logits(validation.z), atol=0.1)
    assert torch_fit.up.dtype == torch_fit.down.dtype == torch_fit.bias.dtype == np.float32


def test_products_in_bfloat16_reach_hardly_less(train, validation):
    torch = pytest.importorskip("torch", reason="fitting with torch needs torch")
    shares = []
    for dtype in (torch.float32, torch.bfloat16):
        fits = fitter("torch")(train, validation, RANK, TrainingOptions(epochs=3), device="cpu", dtype=dtype)
        curve = cut_curve(fits.fit(RANK), validation)
        shares.append(curve.at(curve.cut_for_recall(0.95))[1])
    assert shares[1] <= 1.05 * shares[0]


@pytest.mark.parametrize("name", FITTERS)
def test_fitting_improves_on_its_start_and_repeats_with_its_seed(train, validation, name):
    fits = {
        epochs: fitter(name)(train, validation, RANK, TrainingOptions(epochs=epochs)).fit(RANK) for epochs in (0, 2)
    }
    weights = moments(train).weights()
    losses = {e: balanced_loss(fit.logits(validation.z), validation.active, weights) for e, fit in fits.items()}
    assert losses[2] < 0.9 * losses[0]
    again = fitter(name)(train, validation, RANK, TrainingOptions(epochs=2)).fit(RANK)
    np.testing.assert_array_equal(again.up, fits[2].up)


@pytest.mark.parametrize("name", FITTERS)
def test_an_epoch_that_makes_it_worse_is_not_taken(validation, name):
    few = Planted(64, 5)  # more parameters than there is text: every step leads away from other text
    start, fitted = (
        fitter(name)(few, validation, 24, TrainingOptions(epochs=e, learning_rate=0.5)).fit(24) for e in (0, 3)
    )
    np.testing.assert_allclose(fitted.up, start.up)


def test_torch_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "reference_engine.training.torch_fit", raising=False)
    with pytest.raises(MissingExtraError, match=r"flashfmt\[train\]"):
        load_fitter("torch")
    assert load_fitter("numpy") is NumpyFit


def test_the_rank_of_the_structure_is_chosen(train, validation):
    choice = choose_rank(
        train,
        validation,
        (2, 6, 24),
        recall=0.95,
        bundle_stride=8192,
        options=TrainingOptions(epochs=4),
        fitter=NumpyFit,
    )
    assert choice.fit.rank == 6
    options = TrainingOptions(epochs=1)
    cheap = choose_rank(train, validation, (2, 6, 24), recall=0.95, bundle_stride=1, options=options, fitter=NumpyFit)
    assert cheap.fit.rank == 2


def test_a_choice_counts_with_the_matrices_that_float16_stores(train, validation):
    options = TrainingOptions(epochs=1)
    choice = choose_rank(train, validation, (4,), recall=0.9, bundle_stride=64, options=options, fitter=NumpyFit)
    np.testing.assert_array_equal(choice.fit.up, choice.fit.up.astype(np.float16))
    np.testing.assert_array_equal(choice.fit.down, choice.fit.down.astype(np.float16))


def test_neurons_that_never_or_always_fire_do_no_harm():
    data = Planted(1000, 4)
    data.active[:, 0], data.active[:, 1] = False, True
    data.z[:, 3] = 7.0
    fit = NumpyFit(data, data, 4, TrainingOptions(epochs=1)).fit(4)
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
