"""Watching and masking FFNs, against the engine and transformers."""

import numpy as np
import pytest

from flashfmt.manifest import Activation, InputTap
from reference_engine.engine import Engine, EngineOptions
from reference_engine.observation import NONZERO, Cut, ObservedModel
from reference_engine.operating_points import ActiveSets, LayerRule, Masking, OperatingPoint, Tally, total

IDS = np.random.default_rng(7).integers(3, 300, 100).tolist()
VARIANTS = ["opt", "llama", "llama_biases", "prosparse", "opt_post_norm_projected"]
BACKENDS = ["numpy", "numba"]


def options(backend="numpy"):
    return EngineOptions(memory=4 << 30, backend=backend, context_tokens=100)


def logits(model, observer=None):
    hidden = np.concatenate([part.copy() for _, part in model.hidden_states(IDS, observer)])
    return model.logits(hidden)


def masking(model, *rules):
    d = model.model.decoder
    return Masking(OperatingPoint("test", "", rules), d.ffn.d_ff, d.ffn.activation)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_neurons_and_the_active_ones_give_the_engines_logits(tiny_flash, variant, backend):
    with Engine(tiny_flash(variant), options(backend)) as engine:
        engine.load()
        expected = engine.start().feed_all(IDS)
    scale = np.abs(expected).max()
    with ObservedModel(tiny_flash(variant), options(backend)) as model:
        np.testing.assert_array_equal(logits(model), expected)
        n_layers = model.model.decoder.n_layers
        everything = masking(model, *[LayerRule()] * n_layers)
        assert np.abs(logits(model, everything) - expected).max() <= 1e-5 * scale
        active = masking(model, *[LayerRule(keep=NONZERO)] * n_layers)
        assert np.abs(logits(model, active) - expected).max() <= 1e-5 * scale
    assert total(everything.tallies).computed_share == 1
    for tally in active.tallies:
        assert (tally.recall, tally.precision, tally.n_tokens) == (1, 1, len(IDS))
        assert tally.computed == tally.active
    sparse = variant not in ("llama", "llama_biases")
    assert (total(active.tallies).computed_share < 0.9) == sparse


@pytest.mark.parametrize("encoding", ["f16", "bf16", "q8", "q4"])
@pytest.mark.parametrize("variant", ["opt", "llama"])
def test_every_encoding_is_watched(tiny_flash, variant, encoding):
    with ObservedModel(tiny_flash(variant, encoding), options("numba")) as model:
        expected = logits(model)
        watched = logits(model, masking(model, LayerRule(), LayerRule()))
    assert np.abs(watched - expected).max() <= 1e-4 * np.abs(expected).max()


def test_leaving_out_neurons_is_leaving_them_out(tiny_checkpoint, tiny_flash):
    """Cut h at 0.2 here and in transformers, by the same hook in its activation."""
    torch = pytest.importorskip("torch")
    oracle = tiny_checkpoint("opt")[1]
    cut = 0.2
    hooks = [
        layer.activation_fn.register_forward_hook(lambda m, i, out: torch.where(out.abs() > cut, out, 0.0))
        for layer in oracle.model.decoder.layers
    ]
    with torch.no_grad():
        expected = oracle(torch.tensor([IDS])).logits[0].numpy()
    for hook in hooks:
        hook.remove()
    with ObservedModel(tiny_flash("opt"), options()) as model:
        rule = LayerRule(keep=Cut("h", cut, magnitude=True))
        actual = logits(model, masking(model, rule, rule))
        dense = logits(model)
    scale = np.abs(expected).max()
    assert np.abs(actual - expected).max() <= 1e-4 * scale
    assert np.abs(dense - expected).max() > 1e-3 * scale


class EvenWhenFirstIsPositive:
    """A selector that looks at what it is given: even neurons, or odd ones."""

    def __init__(self, n_neurons):
        self.n_neurons = n_neurons
        self.shapes = []

    def select(self, x):
        self.shapes.append(x.shape)
        return np.arange(0 if x[0, 0] > 0 else 1, self.n_neurons, 2, dtype=np.int32)


def test_a_selector_is_asked_for_each_token_with_the_activation_it_taps(tiny_flash):
    with ObservedModel(tiny_flash("opt"), options()) as model:
        selector = EvenWhenFirstIsPositive(128)
        seen = {}

        class Watch(Masking):
            def tap(self, layer, point, x):
                super().tap(layer, point, x)
                seen[layer, point] = x.copy()

        rules = (LayerRule(), LayerRule(selector=selector, tap=InputTap(layer=0, point="attention_input")))
        sets = ActiveSets(2, 128, 60)
        watch = Watch(OperatingPoint("test", "", rules), 128, model.model.decoder.ffn.activation, sets)
        model.run(IDS, watch)
    assert selector.shapes == [(1, 64)] * len(IDS)
    positive = seen[0, "attention_input"][:60, 0] > 0
    assert 0 < positive.sum() < 60
    computed = sets.layer(1)
    np.testing.assert_array_equal(computed[:, 0::2], np.repeat(positive[:, None], 64, axis=1))
    np.testing.assert_array_equal(computed[:, 1::2], np.repeat(~positive[:, None], 64, axis=1))
    assert sets.layer(0).all()


def test_counts():
    tally = Tally(n_neurons=4, n_tokens=1)
    tally.add(np.array([[True, True, True, False]]), np.array([[True, False, True, True]]))
    assert (tally.recall, tally.precision) == (2 / 3, 2 / 3)
    assert (tally.computed_share, tally.active_share) == (3 / 4, 3 / 4)
    idle = Tally(n_neurons=4, n_tokens=1)
    assert (idle.recall, idle.precision) == (1, 1)
    both = total([tally, idle])
    assert (both.n_tokens, both.computed_share) == (1, 3 / 8)


def test_cuts_compare_what_they_name():
    tested, h = np.array([-3.0, 0.5, 2.0], np.float32), np.array([0.0, -0.1, 4.0], np.float32)
    relu = Activation(kind="relu")
    assert Cut("tested", 0.5, magnitude=False).passes(tested, h, relu).tolist() == [False, False, True]
    assert Cut("tested", 0.5, magnitude=True).passes(tested, h, relu).tolist() == [True, False, True]
    assert Cut("activated", 0.4, magnitude=True).passes(tested, h, relu).tolist() == [False, True, True]
    assert NONZERO.passes(tested, h, relu).tolist() == [False, True, True]
