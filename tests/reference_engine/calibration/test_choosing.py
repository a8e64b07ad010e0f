"""Choosing cuts for a target, with costs that are known."""

import numpy as np
import pytest

from flashfmt.manifest import InputTap
from reference_engine.calibration.choosing import RECALLS, choose_low_rank, gate_encodings
from reference_engine.calibration.options import CalibrationOptions, Target
from reference_engine.fitted_predictor import logit, sigmoid
from reference_engine.neuron_weights import NeuronWeights
from reference_engine.predictor_training import CutCurve, LowRankFit


@pytest.fixture
def fitted():
    """A fit of one layer whose logits tell active from inactive neurons fairly well."""
    rng = np.random.default_rng(0)
    active = rng.random((400, 50)) < 0.2
    curve = CutCurve()
    curve.add(rng.normal(np.where(active, 1.5, -1.5), 1.5).astype(np.float32), active)
    shapes = ((2, 8), (50, 2), (50,))
    fit = LowRankFit(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))
    return NeuronWeights.alike(50).apply(fit), curve


def recall_of(predictors, curve):
    return curve.at(logit(predictors[0].description.threshold) - 1e-6)[0]


def options(metric, value):
    return CalibrationOptions(kind="low_rank", target=Target(metric, value))


def test_a_recall_target_costs_no_run(fitted):
    def cost(name, predictors):
        raise AssertionError("no perplexity is needed")

    choice = choose_low_rank([fitted], [InputTap(layer=0)], options("recall", 0.9), cost)
    assert choice.target_met
    assert 0.9 <= recall_of(choice.predictors, fitted[1]) < 0.91


@pytest.mark.parametrize(("allowed", "expected"), [(0.2, 0.8), (0.05, 0.95), (0.02, 0.98), (0.9, 0.5)])
def test_the_least_recall_that_keeps_the_perplexity_is_chosen(fitted, allowed, expected):
    tried = []

    def cost(name, predictors):
        tried.append(name)
        return 1 - recall_of(predictors, fitted[1])

    choice = choose_low_rank([fitted], [InputTap(layer=0)], options("perplexity", allowed), cost)
    assert choice.target_met
    recall = recall_of(choice.predictors, fitted[1])
    assert expected - 1e-6 <= recall <= expected + 0.25 * (1 - expected) + 0.003
    assert len(tried) <= 6


def test_a_target_out_of_reach_gives_the_most_cautious_cut_and_says_so(fitted):
    choice = choose_low_rank([fitted], [InputTap(layer=0)], options("perplexity", 1e-6), lambda *_: 0.5)
    assert not choice.target_met
    assert recall_of(choice.predictors, fitted[1]) >= RECALLS[-1]


def test_widths_that_cannot_be_quantised_get_plain_gates():
    assert gate_encodings(128) == ("q4", "q8", "f16")
    assert gate_encodings(100) == ("f16",)


@pytest.mark.parametrize("x", [-700.0, -3.0, 0.0, 2.5, 30.0])
def test_sigmoid_and_logit(x):
    assert 0 <= sigmoid(x) <= 1
    if abs(x) < 20:
        assert logit(sigmoid(x)) == pytest.approx(x)
    assert (logit(0), logit(1)) == (-np.inf, np.inf)
