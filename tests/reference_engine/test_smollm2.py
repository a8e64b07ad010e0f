"""The real SmolLM2-135M-Instruct: perplexity against transformers running the same weights, and its own answers."""

from pathlib import Path

import numpy as np
import pytest

import flashfmt
from flashfmt.convert import convert
from reference_engine.chat_template import load_chat_template
from reference_engine.engine import Engine, EngineOptions
from reference_engine.generate import generate
from reference_engine.sampler import SamplingOptions
from reference_engine.tokenizer import load_tokenizer

PAGE = Path(__file__).parents[1] / "data" / "page.txt"


@pytest.fixture(scope="module")
def converted(smollm2, tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2") / "smollm2.flash"
    convert(smollm2, path)
    yield path
    path.unlink()


def nats_per_token(logits, ids):
    logits = logits[:-1].astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    return float((log_sum - logits[np.arange(len(ids) - 1), ids[1:]]).mean())


def oracle(model):
    """transformers' Llama with the weights of a converted file."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    d = model.decoder
    config = transformers.LlamaConfig(
        vocab_size=d.vocab_size,
        hidden_size=d.d_model,
        intermediate_size=d.ffn.d_ff,
        num_hidden_layers=d.n_layers,
        num_attention_heads=d.attention.n_heads,
        num_key_value_heads=d.attention.n_kv_heads,
        rms_norm_eps=d.norm.eps,
        max_position_embeddings=d.context_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(config)

    def tensor(name):
        return torch.from_numpy(model.tensor(name).decode().copy())

    state = {"model.embed_tokens.weight": tensor("embedding/tokens"), "model.norm.weight": tensor("final_norm/weight")}
    for layer in range(d.n_layers):
        theirs, ours = f"model.layers.{layer}", f"layers/{layer}"
        for name, own in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output")):
            state[f"{theirs}.self_attn.{name}_proj.weight"] = tensor(f"{ours}/attention/{own}/weight")
        state[f"{theirs}.input_layernorm.weight"] = tensor(f"{ours}/attention/norm/weight")
        state[f"{theirs}.post_attention_layernorm.weight"] = tensor(f"{ours}/ffn/norm/weight")
        gate, up, down = model.bundles(layer).decode(range(d.ffn.d_ff)).swapaxes(0, 1)
        state[f"{theirs}.mlp.gate_proj.weight"] = torch.from_numpy(gate.copy())
        state[f"{theirs}.mlp.up_proj.weight"] = torch.from_numpy(up.copy())
        state[f"{theirs}.mlp.down_proj.weight"] = torch.from_numpy(down.T.copy())
    llama.load_state_dict(state, strict=False, assign=True)
    llama.tie_weights()
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config)
    return llama.eval()


def test_perplexity_is_that_of_transformers(converted):
    torch = pytest.importorskip("torch")
    with flashfmt.open(converted) as model:
        ids = load_tokenizer(model).encode(PAGE.read_text(), add_special_tokens=False)
        assert len(ids) > 400
        with torch.no_grad():
            expected = oracle(model)(torch.tensor([ids])).logits[0].numpy()
    with Engine(converted, EngineOptions(memory=8 << 30)) as engine:
        engine.load()
        actual = engine.start().feed_all(ids)
    theirs, ours = np.exp(nats_per_token(expected, ids)), np.exp(nats_per_token(actual, ids))
    assert 5 < theirs < 30
    assert abs(ours - theirs) <= 0.001 * theirs


def answer(path, question, memory):
    """Greedy answer, and the bytes it streamed for each token."""
    with Engine(path, EngineOptions(memory=memory, context_tokens=128)) as engine:
        tokenizer = load_tokenizer(engine.model)
        prompt = load_chat_template(engine.model, tokenizer).render([{"role": "user", "content": question}])
        engine.load()
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        generation = generate(engine, tokenizer, ids, sampling=SamplingOptions(temperature=0), max_tokens=24)
        for _ in generation:
            pass
        return generation.text, engine.plan.streamed


def test_it_answers_the_same_with_half_of_its_bundles_on_flash(converted):
    question = "What is the capital of France?"
    with Engine(converted, EngineOptions(memory=8 << 30, context_tokens=128)) as engine:
        enough, half = engine.plan.planned, engine.plan.planned - engine.plan.pinned // 2
    whole, nothing = answer(converted, question, enough + (64 << 20))
    streamed, something = answer(converted, question, half)
    assert "Paris" in whole
    assert streamed == whole
    assert nothing == 0 < something
