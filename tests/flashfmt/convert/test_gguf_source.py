"""GGUF checkpoints: weights, recreated configs and refusals, against transformers' own reading of the same files."""

import json
import re
import warnings

import numpy as np
import pytest

from flashfmt.convert import llama, open_checkpoint
from flashfmt.convert.config import Config
from flashfmt.convert.gguf_header import read_header
from flashfmt.encodings import Encoding, decode
from flashfmt.errors import CheckpointError

gguf = pytest.importorskip("gguf")

D, FF, HEADS, KV, HEAD_DIM, VOCAB = 64, 96, 4, 2, 16, 40
LLAMA_FIELDS = {
    "context_length": 128,
    "embedding_length": D,
    "feed_forward_length": FF,
    "block_count": 2,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 5000.0,
    "rope.dimension_count": HEAD_DIM,
    "vocab_size": VOCAB,
}
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [chr(ord("A") + i) for i in range(VOCAB - 1)] + ["<end>"],
    "tokenizer.ggml.token_type": [1] * (VOCAB - 1) + [3],
    "tokenizer.ggml.merges": [],
    "tokenizer.ggml.eos_token_id": VOCAB - 1,
    "tokenizer.ggml.bos_token_id": VOCAB - 1,
}


def metadata(architecture="llama", **changes):
    fields = {f"{architecture}.{key}": value for key, value in LLAMA_FIELDS.items()}
    if architecture != "llama":
        del fields[f"{architecture}.rope.dimension_count"]
    merged = {**fields, **{key: value for key, value in TOKENIZER.items() if value != []}}
    merged["tokenizer.ggml.merges"] = ["A B"]
    merged["tokenizer.ggml.tokens"] = [*TOKENIZER["tokenizer.ggml.tokens"][:-2], "AB", "<end>"]
    merged |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in merged.items() if value is not ...}


def tensors(architecture="llama", seed=0, tied=False):
    rng = np.random.default_rng(seed)

    def matrix(n_rows, n_columns):
        return rng.standard_normal((n_rows, n_columns)).astype(np.float32)

    made = {"token_embd.weight": matrix(VOCAB, D), "output_norm.weight": matrix(1, D)[0]}
    if not tied:
        made["output.weight"] = matrix(VOCAB, D)
    for layer in range(2):
        block = {
            "attn_norm": matrix(1, D)[0],
            "ffn_norm": matrix(1, D)[0],
            "attn_q": matrix(HEADS * HEAD_DIM, D),
            "attn_k": matrix(KV * HEAD_DIM, D),
            "attn_v": matrix(KV * HEAD_DIM, D),
            "attn_output": matrix(D, HEADS * HEAD_DIM),
            "ffn_gate": matrix(FF, D),
            "ffn_up": matrix(FF, D),
            "ffn_down": matrix(D, FF),
        }
        made |= {f"blk.{layer}.{name}.weight": value for name, value in block.items()}
        if architecture == "qwen2":
            for name, width in (("attn_q", HEADS), ("attn_k", KV), ("attn_v", KV)):
                made[f"blk.{layer}.{name}.bias"] = matrix(1, width * HEAD_DIM)[0]
        if architecture == "qwen3":
            for name in ("attn_q_norm", "attn_k_norm"):
                made[f"blk.{layer}.{name}.weight"] = matrix(1, HEAD_DIM)[0]
    return made


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path).close()
    return str(caught.value)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_weights_and_config_equal_those_that_transformers_reads(write_gguf, architecture):
    transformers = pytest.importorskip("transformers")
    path = write_gguf(architecture, metadata(architecture), tensors(architecture))
    checkpoint = open_checkpoint(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.utils.logging.disable_progress_bar()
        oracle = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    state = oracle.state_dict()
    assert set(checkpoint.tensors) == set(state)
    for name in checkpoint.tensors:
        np.testing.assert_array_equal(checkpoint.read(name).data, state[name].float().numpy(), err_msg=name)
    for key in ("hidden_size", "intermediate_size", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"):
        assert checkpoint.config[key] == pytest.approx(getattr(oracle.config, key)), key
    assert checkpoint.config["rope_theta"] == oracle.config.rope_parameters["rope_theta"]
    assert oracle.config.model_type == checkpoint.config["model_type"]
    checkpoint.close()


def test_qwen3_keeps_its_rows_and_head_norms(write_gguf):
    plain = tensors("qwen3")
    fields = metadata("qwen3", **{"qwen3.attention.key_length": HEAD_DIM, "qwen3.attention.value_length": HEAD_DIM})
    checkpoint = open_checkpoint(write_gguf("qwen3", fields, plain))
    for ours, theirs in (
        ("q_proj", "attn_q"),
        ("k_proj", "attn_k"),
        ("q_norm", "attn_q_norm"),
        ("o_proj", "attn_output"),
    ):
        read = checkpoint.read(f"model.layers.1.self_attn.{ours}.weight").data
        np.testing.assert_array_equal(read, plain[f"blk.1.{theirs}.weight"])
    assert checkpoint.config["head_dim"] == HEAD_DIM
    checkpoint.close()


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0", "F16", "BF16"])
def test_types_are_dequantised_row_by_row(write_gguf, name):
    kind = gguf.GGMLQuantizationType[name]
    plain = tensors()
    stored = {tensor: (value, kind) if value.ndim == 2 else value for tensor, value in plain.items()}
    checkpoint = open_checkpoint(write_gguf("llama", metadata(), stored))
    up = "model.layers.1.mlp.up_proj.weight"
    expected = gguf.dequantize(gguf.quantize(plain["blk.1.ffn_up.weight"], kind), kind)
    info, whole = checkpoint.tensors[up], checkpoint.read(up)
    np.testing.assert_array_equal(decode(whole.data, whole.encoding), expected)
    np.testing.assert_array_equal(checkpoint.read(up, 5, 9).data, whole.data[5:9])
    own = {"F16": Encoding.F16, "BF16": Encoding.BF16}
    assert info.quantised == (name not in own)
    assert info.lossless_encoding is own.get(name, Encoding.F16)
    assert info.encoding is own.get(name, Encoding.F32)
    checkpoint.close()


@pytest.mark.parametrize("architecture", ["llama", "smollm3", "qwen2"])
def test_rotary_rows_are_put_back_in_halves(write_gguf, architecture):
    plain = tensors(architecture)
    checkpoint = open_checkpoint(write_gguf(architecture, metadata(architecture), plain))
    stored = plain["blk.0.attn_k.weight"].reshape(KV, HEAD_DIM // 2, 2, D)
    name = "model.layers.0.self_attn.k_proj.weight"
    expected = np.concatenate([stored[:, :, 0], stored[:, :, 1]], axis=1).reshape(KV * HEAD_DIM, D)
    if architecture == "qwen2":
        expected = plain["blk.0.attn_k.weight"]
    np.testing.assert_array_equal(checkpoint.read(name).data, expected)
    np.testing.assert_array_equal(checkpoint.read(name, 3, 21).data, expected[3:21])
    checkpoint.close()


def test_rope_factors_become_frequencies(write_gguf):
    factors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    checkpoint = open_checkpoint(write_gguf("llama", metadata(), {**tensors(), "rope_freqs.weight": factors}))
    config = Config(checkpoint.config, checkpoint.path)
    decoder = llama.describe(config)
    table = llama.tensor_map(config, decoder, checkpoint.tensors).computed["rotary/main"]
    np.testing.assert_allclose(table, 5000.0 ** (-np.arange(8) / 8) / factors, rtol=1e-6)
    assert decoder.rotary[0].attention_factor == 1.0
    checkpoint.close()


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({}, None),
        ({"llama.rope.scaling.type": "none"}, None),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 32,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rope_scaling(write_gguf, changes, scaling):
    checkpoint = open_checkpoint(write_gguf("llama", metadata(**changes), tensors(tied=True)))
    assert checkpoint.config["rope_scaling"] == scaling
    assert checkpoint.config["tie_word_embeddings"]
    checkpoint.close()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"llama.expert_count": 8}, "expert_count"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type"),
        ({"llama.rope.scaling.attn_factor": 2.0}, "attn_factor"),
        ({"llama.attention.sliding_window": 64}, "sliding_window"),
        ({"llama.logit_scale": 0.5}, "logit_scale"),
        ({"llama.block_count": ...}, "block_count"),
        ({"llama.embedding_length": "64"}, "embedding_length"),
        ({"llama.attention.head_count": [4, 4]}, "head_count"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model"),
        ({"tokenizer.ggml.pre": "viking"}, "tokenizer.ggml.pre.*one of .*llama-bpe.*got viking"),
        ({"tokenizer.ggml.tokens": ...}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": ["A Z9"]}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.token_type": [1, 3]}, "tokenizer.ggml.token_type"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(write_gguf, changes, named):
    assert re.search(named, refusal(write_gguf("llama", metadata(**changes), tensors())))


def test_unknown_architectures_and_heads(write_gguf):
    assert "one of llama, qwen2, qwen3, smollm3, got gemma2" in refusal(write_gguf("gemma2", {}, {}))
    odd = {**tensors(), "blk.0.attn_k.weight": np.zeros((KV * HEAD_DIM + 2, D), np.float32)}
    assert "rows do not divide into heads" in refusal(write_gguf("llama", metadata(), odd))
    del odd["token_embd.weight"]
    assert "no token embedding" in refusal(write_gguf("llama", metadata(), odd))


def test_without_the_gguf_package(write_gguf, monkeypatch):
    from flashfmt.errors import MissingExtraError

    path = write_gguf("llama", metadata(), tensors())
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'flashfmt\[gguf\]'"):
        open_checkpoint(path)


STORED_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.29.self_attn.k_proj.weight": "blk.29.attn_k.weight",
    "model.layers.29.mlp.down_proj.weight": "blk.29.ffn_down.weight",
    "model.layers.7.post_attention_layernorm.weight": "blk.7.ffn_norm.weight",
}


def test_smollm2_is_dequantised_as_transformers_does(smollm2):
    torch = pytest.importorskip("torch")
    dequantize = pytest.importorskip("transformers.integrations.gguf.dequant").dequantize
    with smollm2.open("rb") as file:
        sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
        header = read_header(file, smollm2, sizes)
    checkpoint = open_checkpoint(smollm2)
    assert checkpoint.licence == "apache-2.0"
    assert json.loads(checkpoint.files["config"].content)["num_key_value_heads"] == 3
    for ours, theirs in STORED_NAMES.items():
        tensor = header.tensors[theirs]
        packed = np.fromfile(smollm2, np.uint8, tensor.nbytes, offset=tensor.offset).reshape(tensor.shape[0], -1)
        if len(tensor.shape) == 1:
            expected = packed.reshape(-1).view("<f4")
        else:
            flat = dequantize(torch.from_numpy(packed), tensor.type_id)
            expected = flat.numpy().reshape(tensor.shape)
        if "q_proj" in ours or "k_proj" in ours:
            expected = expected.reshape(-1, 32, 2, 576).swapaxes(1, 2).reshape(expected.shape)
        np.testing.assert_array_equal(checkpoint.read(ours).data, expected, err_msg=ours)
    checkpoint.close()


@pytest.mark.slow
def test_smollm2_equals_what_transformers_reads(smollm2):
    transformers = pytest.importorskip("transformers")
    checkpoint = open_checkpoint(smollm2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.utils.logging.disable_progress_bar()
        oracle = transformers.AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    state = oracle.state_dict()
    for name in checkpoint.tensors:
        np.testing.assert_array_equal(checkpoint.read(name).data, state[name].float().numpy(), err_msg=name)
    checkpoint.close()
