"""What neurons are worth: a layer in which few neurons add most, and how little of that is missed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_engine.neuron_weights import NeuronWeights, WeighedFit
from reference_engine.predictor_training import LowRankFit, TrainingOptions, cut_curve
from reference_engine.training import NumpyFit

D_MODEL, N_NEURONS, PIECE = 32, 128, 128
CONSTANT, RARE = 0, 1


class Layer:
    """Activity with noise; one neuron adds much for nearly every token, one adds much for one token in two hundred.

    The few tokens for which the first is silent lie far out in a direction; `shift` moves all tokens that way, without
    silencing it: text of another kind.
    """

    def __init__(self, n_tokens, seed, shift=0.0):
        structure, rng = np.random.default_rng(0), np.random.default_rng(seed)
        down, up = structure.standard_normal((6, D_MODEL)), structure.standard_normal((N_NEURONS, 6))
        quantiles = structure.uniform(0.8, 0.98, N_NEURONS)
        outwards = structure.standard_normal(D_MODEL)
        reference = structure.standard_normal((4000, D_MODEL)) @ down.T @ up.T
        cuts = np.quantile(reference, quantiles, axis=0).diagonal()
        z = rng.standard_normal((n_tokens, D_MODEL))
        logits = z @ down.T @ up.T
        self.active = logits + 4 * rng.standard_normal((n_tokens, N_NEURONS)) > cuts
        silent, rare = rng.random(n_tokens) < 0.003, rng.random(n_tokens) < 0.005
        self.active[:, CONSTANT], self.active[:, RARE] = ~silent, rare
        z += np.where(silent, 3.0, shift)[:, None] * outwards + 0.3 * rare[:, None] * down[0]
        self.z = z.astype(np.float32)
        self.size = np.ones(N_NEURONS)
        self.size[CONSTANT], self.size[RARE] = 40.0, 100.0
        self.n_pieces = n_tokens // PIECE

    def piece(self, index):
        tokens = slice(index * PIECE, (index + 1) * PIECE)
        return self.z[tokens].copy(), self.active[tokens].copy()

    def weights(self):
        n_active = self.active.sum(axis=0)
        return NeuronWeights.of(n_active, n_active * self.size, len(self.z))


@pytest.fixture(scope="module")
def predictors():
    """(plain, weighed) predictors of a layer, each a fit and a cut for a recall of 0.95."""
    train, validation = Layer(6400, 1), Layer(2560, 2)
    fit = NumpyFit(train, validation, 12, TrainingOptions(epochs=4)).fit(12).rounded()
    weighed = train.weights().apply(fit)
    plain_cut = cut_curve(fit, validation).cut_for_recall(0.95)
    weighed_cut = cut_curve(weighed, validation).cut_for_recall(0.95)
    return (fit, plain_cut), (weighed.at_cut(weighed_cut), weighed_cut)


def outcome(predictor, layer):
    """(share of tokens that lose more than half of what the neurons add, predicted share, recall)."""
    fit, cut = predictor
    predicted = fit.logits(layer.z) > cut
    added = layer.active * layer.size
    lost = np.where(predicted, 0, added)
    bad = lost.sum(axis=1) > 0.5 * added.sum(axis=1)
    return bad.mean(), predicted.mean(), predicted[layer.active].mean()


def test_what_adds_much_is_not_missed(predictors):
    plain, weighed = (outcome(predictor, Layer(5120, 3)) for predictor in predictors)
    assert plain[0] > 0.001
    assert weighed[0] < 0.4 * plain[0]
    assert weighed[1] < plain[1] + 0.02  # for hardly more neurons
    assert weighed[2] == pytest.approx(0.95, abs=0.01)


def test_nor_on_text_of_another_kind(predictors):
    plain, weighed = (outcome(predictor, Layer(5120, 4, shift=1.0)) for predictor in predictors)
    assert plain[0] > 0.05
    assert weighed[0] < 0.1 * plain[0]


def test_what_neurons_weigh():
    weights = NeuronWeights.of(np.array([900, 100, 0, 1000]), np.array([900.0, 1000.0, 0.0, 100.0]), 1000)
    assert weights.added[1] > weights.added[0] > weights.added[3]
    assert weights.added[1] - weights.added[0] == pytest.approx(np.log(10), abs=0.1)
    assert weights.added[2] == pytest.approx(0, abs=1e-6)  # nothing is known of it
    assert weights.floor[2] < -50  # and it is not predicted for its own sake
    assert weights.floor[0] - weights.floor[1] == pytest.approx(np.log(9) - np.log(10), abs=0.1)


def test_a_layer_in_which_nothing_happens_has_no_weights():
    weights = NeuronWeights.of(np.zeros(5, np.int64), np.zeros(5), 100)
    assert not weights.added.any()
    assert (weights.floor == -np.inf).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.floats(-19, 19))
def test_what_is_stored_predicts_what_was_counted(seed, cut):
    rng = np.random.default_rng(seed)
    fit = LowRankFit(*(rng.normal(0, 3, shape).astype(np.float32) for shape in ((3, 8), (20, 3), (20,))))
    n_active = rng.integers(0, 400, 20)
    weighed = NeuronWeights.of(n_active, n_active * rng.lognormal(0, 3, 20), 400).apply(fit)
    z = rng.standard_normal((30, 8)).astype(np.float32)
    expected = weighed.logits(z) > np.float32(cut)
    np.testing.assert_array_equal(weighed.at_cut(cut).logits(z) > np.float32(cut), expected)
    always = weighed.floor > np.float32(cut)
    assert expected[:, always].all()


def test_neurons_that_weigh_alike_are_predicted_as_by_the_fit():
    rng = np.random.default_rng(0)
    fit = LowRankFit(*(rng.standard_normal(shape).astype(np.float32) for shape in ((3, 8), (5, 3), (5,))))
    weighed: WeighedFit = NeuronWeights.alike(5).apply(fit)
    z = rng.standard_normal((4, 8)).astype(np.float32)
    np.testing.assert_array_equal(weighed.logits(z), fit.logits(z))
    np.testing.assert_array_equal(weighed.at_cut(0.0).up, fit.up)
