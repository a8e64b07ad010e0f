"""A token's pass on a device: the bits of its functions one by one, first launched, then captured and replayed."""

import contextlib
import dataclasses

import numpy as np
import pytest

import reference_engine.engine as engine_module
from flashfmt.convert import convert
from reference_engine.backends import Step
from reference_engine.device_placement import CONTEXT_NBYTES
from reference_engine.engine import Engine, EngineOptions
from reference_engine.neuron_window import parse_window
from reference_engine.selectors import parse_selector
from reference_engine.sparse_mode import SparseOptions

ROOM = 2 * CONTEXT_NBYTES
TOKENS = (3, 1, 2, 3, 5)


@contextlib.contextmanager
def loaded(device, monkeypatch, path, **options):
    if device.name == "emulated":
        monkeypatch.setattr(device, "most", device.most)
        monkeypatch.setattr(engine_module, "open_cuda_device", lambda: device)
    options = {"context_tokens": 140, "vram": ROOM} | options
    with Engine(path, EngineOptions(device="cuda", **options)) as engine:
        engine.load()
        yield engine


def logits(engine, ids, n_before=0):
    """Of tokens one by one, behind positions whose keys and values are zero, and a prompt."""
    session = engine.start()
    engine._kv_cache.advance(n_before)
    session.feed(ids)
    return np.stack([session.feed([token]) for token in TOKENS])


def require_same_bits(engine, ids, n_before=0):
    token_pass = engine.stack._token_pass
    assert token_pass is not None
    with_pass = [logits(engine, ids, n_before) for _ in range(2)]
    assert token_pass._graphs
    engine.stack._token_pass = None
    expected = logits(engine, ids, n_before)
    for values in with_pass:
        assert np.array_equal(values, expected)


@pytest.mark.parametrize("kind", ["plain", "gated"])
@pytest.mark.parametrize(("encoding", "kv_type"), [("f32", "f32"), ("f16", "f16"), ("q8", "f32"), ("q4", "f16")])
def test_same_bits(device, monkeypatch, synthetic, kind, encoding, kv_type):
    with loaded(device, monkeypatch, synthetic(kind, encoding, encoding), kv_type=kv_type) as engine:
        token_pass = engine.stack._token_pass
        require_same_bits(engine, [5, 6, 7], n_before=122)  # positions come to need a second stretch
        assert len(token_pass._graphs) == 1  # all layers at once


@pytest.mark.parametrize("variant", ["opt_post_norm_projected", "qwen3", "smollm3"])
def test_architectures(device, monkeypatch, tiny_checkpoint, tmp_path, variant):
    source, oracle = tiny_checkpoint(variant)
    convert(source, tmp_path / "m.flash", encoding="f16", residents="f16")
    ids = np.random.default_rng(8).integers(3, oracle.config.vocab_size, 9).tolist()
    with loaded(device, monkeypatch, tmp_path / "m.flash", context_tokens=32) as engine:
        require_same_bits(engine, ids)


@pytest.mark.parametrize("order", ["pre_norm", "post_norm", "parallel"])
@pytest.mark.parametrize("shares_norm", [True, False])
def test_orders(device, monkeypatch, synthetic, order, shares_norm):
    with loaded(device, monkeypatch, synthetic("plain", "f32")) as engine:
        changes = {"order": order} | ({"ffn_norm": None} if shares_norm else {})
        engine.stack._layers = [dataclasses.replace(w, **changes) for w in engine.stack._layers]
        engine.stack._token_pass = engine.stack._backend.bind_layers(engine.stack._layers)
        require_same_bits(engine, [5, 6, 7])


def test_layers_whose_bundles_come_and_go(device, monkeypatch, synthetic, relative_error):
    monkeypatch.setattr("reference_engine.bundle_blocks.BLOCK_BYTES", 1 << 15)
    path = synthetic("plain", "f32")
    with loaded(device, monkeypatch, path) as engine:
        floor = engine.plan.floor
    with loaded(device, monkeypatch, path, vram=floor + (250 << 10)) as engine:
        require_same_bits(engine, [5, 6, 7])
    sparse = SparseOptions(parse_selector("lowbit:q8:0.001@attention_output"), window=parse_window("lru"))
    with loaded(device, monkeypatch, path, sparse=sparse) as engine:
        token_pass = engine.stack._token_pass
        actual = logits(engine, [5, 6, 7])
        assert len(token_pass._graphs) == engine.model.decoder.n_layers + 1
        engine.stack._token_pass = None
        # bundles are added in the order in which they come
        assert relative_error(actual, logits(engine, [5, 6, 7])) <= 1e-5


def test_graphs_can_be_left_out(device, monkeypatch, synthetic):
    with loaded(device, monkeypatch, synthetic("plain", "f16")) as engine:
        expected = logits(engine, [5, 6])
        token_pass = engine.stack._token_pass
        token_pass._graphs.clear()
        engine.stack._backend.uses_graphs = False
        assert np.array_equal(logits(engine, [5, 6]), expected)
        assert not token_pass._graphs


def test_what_does_not_go_together_is_refused(device, monkeypatch, synthetic):
    with loaded(device, monkeypatch, synthetic("plain", "f16")) as engine:
        engine.start().feed([1])
        token, cache = engine.stack._token_pass, engine._kv_cache
        x = device.zeros((1, 64), np.float32)
        for n_past in (-1, 140):
            with pytest.raises(ValueError, match="positions"):
                token.begin(x, [], *cache.layers(), n_past=n_past)
        with pytest.raises(ValueError, match="expected"):
            token.begin(device.zeros((2, 64), np.float32), [], *cache.layers(), n_past=0)
        with pytest.raises(ValueError, match="go with"):
            token.begin(x, [], *(part[:1] for part in cache.layers()), n_past=0)
        token.begin(x, [], *cache.layers(), n_past=0)
        token.advance(0, Step.FFN_INPUT)
        with pytest.raises(ValueError, match="cannot follow"):
            token.advance(0, Step.ATTENTION_INPUT)
