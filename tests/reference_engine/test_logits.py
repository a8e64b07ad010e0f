"""The engine against transformers: tiny random checkpoints of every supported architecture."""

import copy

import numpy as np
import pytest

import flashfmt
from flashfmt.convert import convert
from flashfmt.manifest import bundles_name
from reference_engine.engine import Engine, EngineOptions

torch = pytest.importorskip("torch")

VARIANTS = [
    "opt",
    "opt_post_norm_projected",
    "opt_no_bias",
    "opt_plain_norm",
    "opt_no_final_norm",
    "opt_untied",
    "llama",
    "llama_tied",
    "llama_biases",
    "llama_head_dim",
    "llama_rope_llama3",
    "llama_rope_yarn",
    "llama_rope_linear",
    "llama_relu",
    "prosparse",
    "drelu",
    "bamboo",
    "mistral",
    "mistral_no_window",
    "qwen2",
    "qwen2_sliding",
    "qwen3",
    "qwen3_biases",
    "smollm3",
    "smollm3_no_rope",
]
N_PROMPT = 24
N_NEW = 12


def test_every_variant_is_compared(checkpoints):
    assert set(checkpoints.VARIANTS) == set(VARIANTS)


def prompt_of(oracle):
    return np.random.default_rng(11).integers(3, oracle.config.vocab_size, N_PROMPT).tolist()


def oracle_logits(oracle, ids):
    with torch.no_grad():
        return oracle(torch.tensor([ids])).logits[0].double().numpy()


def greedy(oracle, ids):
    ids = list(ids)
    for _ in range(N_NEW):
        ids.append(int(oracle_logits(oracle, ids)[-1].argmax()))
    return ids[N_PROMPT:]


def engine_greedy(session, ids):
    token = int(session.feed(ids).argmax())
    new = [token]
    while len(new) < N_NEW:
        token = int(session.feed([token]).argmax())
        new.append(token)
    return new


def loaded(path, backend="numba"):
    engine = Engine(path, EngineOptions(memory=8 << 30, backend=backend))
    engine.load()
    return engine


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_greedy_text_are_those_of_transformers(tiny_checkpoint, tmp_path, variant):
    source, oracle = tiny_checkpoint(variant)
    convert(source, tmp_path / "m.flash", encoding="f32", residents="f32")
    ids = prompt_of(oracle)
    expected = oracle_logits(oracle, ids)
    for backend in ("numba", "numpy"):
        with loaded(tmp_path / "m.flash", backend) as engine:
            actual = engine.start().feed_all(ids)
            assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()
            assert engine_greedy(engine.start(), ids) == greedy(oracle, ids)


def dequantised(oracle, model):
    """The oracle with the weights that the file holds."""
    oracle = copy.deepcopy(oracle)
    decoder = getattr(oracle.model, "decoder", oracle.model)
    with torch.no_grad():
        for layer, block in enumerate(decoder.layers):
            parts = torch.from_numpy(model.bundles(layer).decode(range(model.decoder.ffn.d_ff)))
            modules = block.mlp if hasattr(block, "mlp") else block
            if model.decoder.ffn.kind == "gated":
                modules.gate_proj.weight.copy_(parts[:, 0])
                modules.up_proj.weight.copy_(parts[:, 1])
                modules.down_proj.weight.copy_(parts[:, 2].T)
            else:
                modules.fc1.weight.copy_(parts[:, 0])
                modules.fc2.weight.copy_(parts[:, 1].T)
            attention = block.self_attn
            output = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
            for name, module in (
                ("q", attention.q_proj),
                ("k", attention.k_proj),
                ("v", attention.v_proj),
                ("output", output),
            ):
                stored = model.tensor(f"layers/{layer}/attention/{name}/weight")
                module.weight.copy_(torch.from_numpy(stored.decode()))
        decoder.embed_tokens.weight.copy_(torch.from_numpy(model.tensor("embedding/tokens").decode().copy()))
        if not model.decoder.logits.tied:
            oracle.lm_head.weight.copy_(torch.from_numpy(model.tensor("logits/weight").decode().copy()))
        if model.decoder.positions is not None:
            stored = model.tensor("embedding/positions").decode().copy()
            decoder.embed_positions.weight.copy_(torch.from_numpy(stored))
    return oracle


@pytest.mark.parametrize("variant", ["opt", "llama", "qwen3"])
@pytest.mark.parametrize("encoding", ["f16", "bf16", "q8", "q4"])
def test_every_encoding_computes_with_the_weights_it_stores(tiny_checkpoint, tmp_path, variant, encoding):
    source, oracle = tiny_checkpoint(variant)
    convert(source, tmp_path / "m.flash", encoding=encoding, residents=encoding)
    with flashfmt.open(tmp_path / "m.flash") as model:
        assert bundles_name(0) == model.layers[0].name
        oracle = dequantised(oracle, model)
    ids = prompt_of(oracle)
    expected = oracle_logits(oracle, ids)
    with loaded(tmp_path / "m.flash") as engine:
        actual = engine.start().feed_all(ids)
        assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()
        assert engine_greedy(engine.start(), ids) == greedy(oracle, ids)
