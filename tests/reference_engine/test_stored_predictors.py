"""Predictors and statistics that a file carries, as sparse mode uses them."""

import numpy as np
import pytest

import flashfmt
from flashfmt import BundlesSpec, FlashWriter, TensorSpec
from flashfmt.encodings import Encoding, encode
from flashfmt.manifest import InputTap, Predictor, Statistics, bundle_checksums_name
from reference_engine.backends import load_backend
from reference_engine.engine import Engine, EngineOptions
from reference_engine.plan import FixedParts
from reference_engine.selectors import load_selectors, parse_selector
from reference_engine.sparse_mode import SparseOptions, plan_sparse_mode

OPTIONS = SparseOptions(parse_selector("file"))

PROMPT = [5, 17, 3, 96, 0, 42, 8]
WINDOW_TOKENS = 4


@pytest.fixture(scope="module")
def with_predictors(synthetic, tmp_path_factory):
    """The tiny plain model with a full-rank predictor in layer 0, a gate in layer 1, none in layer 2; statistics."""
    path = tmp_path_factory.mktemp("predictors") / "m.flash"
    with flashfmt.open(synthetic("plain", "f32", "f32")) as model:
        d = model.decoder
        up = [model.bundles(layer).decode(range(d.ffn.d_ff))[:, 0] for layer in range(3)]
        arrays = {
            "layers/0/predictor/down": np.eye(64, dtype=np.float32),
            "layers/0/predictor/up": up[0],
            "layers/0/predictor/bias": model.tensor("layers/0/ffn/up_bias").decode(),
            "layers/1/predictor/gate": up[1],
        }
        for layer in range(3):
            arrays[f"layers/{layer}/statistics/firing_frequency"] = np.full(d.ffn.d_ff, 0.5, np.float32)
            window = np.linspace(0.1, 0.1 + 0.2 * layer, WINDOW_TOKENS, dtype=np.float32)
            arrays[f"layers/{layer}/statistics/aggregated_window"] = window
        predictors = (
            Predictor(layer=0, kind="low_rank", tap=InputTap(layer=0), threshold=0.5, rank=64, bias=True),
            Predictor(layer=1, kind="low_bit_gate", tap=InputTap(layer=1), threshold=0.0),
        )
        changes = {
            "predictors": predictors,
            "statistics": Statistics(n_tokens=100, text="none", window_tokens=WINDOW_TOKENS),
        }
        old = model.manifest
        manifest = type(old)(**{name: getattr(old, name) for name in old.__struct_fields__} | changes)
        kept = {name: t for name, t in model.tensors.items() if name not in map(bundle_checksums_name, range(3))}
        tensors = [TensorSpec(t.name, t.encoding, t.shape) for t in kept.values()]
        tensors += [TensorSpec(name, Encoding.F32, array.shape) for name, array in arrays.items()]
        bundles = [BundlesSpec(layer, Encoding.F32, d.ffn.parts, d.ffn.d_ff, d.d_model) for layer in range(3)]
        with FlashWriter(path, manifest, tensors=tensors, bundles=bundles, files=[], fingerprint="test") as writer:
            for name in kept:
                writer.write_tensor(name, model.tensor(name).data)
            for name, array in arrays.items():
                writer.write_tensor(name, encode(array, Encoding.F32))
            for layer in range(3):
                with writer.bundles(layer) as sink:
                    sink.append(encode(model.bundles(layer).decode(range(d.ffn.d_ff)), Encoding.F32))
    return path


def logits(path, options):
    with Engine(path, options) as engine:
        engine.load()
        return engine.start().feed_all(PROMPT), engine


def test_perfect_predictors_lose_nothing_and_save_reads(with_predictors):
    dense, _ = logits(with_predictors, EngineOptions(memory=8 << 30))
    sparse, engine = logits(with_predictors, EngineOptions(memory=8 << 30, sparse=OPTIONS))
    assert np.abs(sparse - dense).max() <= 1e-4 * np.abs(dense).max()
    assert engine.plan.fixed.selectors > 4 * 64 * (64 + 2 * 448)


def test_layers_without_a_predictor_use_every_neuron(with_predictors):
    with flashfmt.open(with_predictors) as model:
        selectors = load_selectors(model, parse_selector("file"), load_backend("numpy"))
        x = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
        n_selected = [len(tapped.selector.select(x)) for tapped in selectors]
    assert 0 < n_selected[0] < 448
    assert 0 < n_selected[1] < 448
    assert n_selected[2] == 448


def test_statistics_share_out_the_slots(with_predictors):
    fixed = FixedParts(process=0, residents=0, kv_cache=0, scratch=0)
    with flashfmt.open(with_predictors) as model:
        everything = plan_sparse_mode(model, OPTIONS, fixed, 1 << 30, 64)
        plan = plan_sparse_mode(model, OPTIONS, fixed, everything.floor + everything.slots // 3, 64)
    assert everything.expected_read == 0
    assert plan.expected_read > 0
    assert plan.capacities[0] <= plan.capacities[1] < plan.capacities[2]
