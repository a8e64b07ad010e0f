"""Llama-like configs: what they describe, and what is refused by name."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfmt.convert import llama
from flashfmt.convert.config import Config
from flashfmt.convert.families import family_of
from flashfmt.errors import CheckpointError
from flashfmt.manifest import Activation, Decoder

LLAMA = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def windows(config):
    return [layer.attention_window_tokens for layer in llama.describe(config).layers]


def test_defaults_follow_transformers(config_of):
    decoder = llama.describe(config_of(num_key_value_heads=..., rms_norm_eps=...))
    assert decoder.attention.n_kv_heads == 4
    assert decoder.norm.eps == 1e-6
    assert decoder.attention.head_dim == 16
    assert not decoder.logits.tied
    assert decoder.ffn.activation.kind == "silu"
    assert not decoder.attention.qkv_bias
    assert windows(config_of()) == [None, None]


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
     "max_position_embeddings"],
)  # fmt: skip
def test_a_missing_key_is_named(config_of, key):
    with pytest.raises(CheckpointError, match=f"{key}: config.json lacks a required key"):
        llama.describe(config_of(**{key: ...}))


ODD_VALUES = [None, True, 0, -1, 1, 2, 2.5, 1e300, 10**400, "", "relu", [], [1], {}, {"rope_type": "yarn", "factor": 1}]
KEYS = [
    "architectures", "attention_bias", "auto_map", "head_dim", "hidden_act", "hidden_act_param", "hidden_size",
    "intermediate_size", "layer_types", "max_position_embeddings", "max_window_layers", "mlp_bias", "model_type",
    "no_rope_layers", "no_rope_layer_interval", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "original_max_position_embeddings", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "sliding_window", "tie_word_embeddings", "use_sliding_window", "vocab_size",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(llama.MODEL_TYPES), st.dictionaries(st.sampled_from(KEYS), st.sampled_from(ODD_VALUES), max_size=3)
)
def test_any_config_is_described_or_refused(base, changes):
    config = Config({**LLAMA, "model_type": base, "use_sliding_window": True, **changes}, Path("config.json"))
    try:
        decoder = family_of(config).describe(config)
        family_of(config).tensor_map(config, decoder, [])
    except CheckpointError:
        return
    msgspec.json.decode(msgspec.json.encode(decoder), type=Decoder)  # within the manifest's limits


@pytest.mark.parametrize("value", [0, -1, 2.5, "64", True])
def test_a_count_must_be_a_positive_integer(config_of, value):
    with pytest.raises(CheckpointError, match="hidden_size"):
        llama.describe(config_of(hidden_size=value))


def test_biases(config_of):
    both = llama.describe(config_of(attention_bias=True, mlp_bias=True))
    assert both.attention.qkv_bias
    assert both.attention.output_bias
    assert both.ffn.gate_bias
    assert both.ffn.up_bias
    assert both.ffn.down_bias
    qwen2 = llama.describe(config_of("qwen2"))
    assert qwen2.attention.qkv_bias
    assert not qwen2.attention.output_bias


def test_activations(config_of):
    def ffn(**changes):
        return llama.describe(config_of(**changes)).ffn

    relu = Activation(kind="relu")
    assert ffn(hidden_act="relu").activation == relu
    assert ffn(hidden_act="relu").up_activation == Activation(kind="identity")
    assert ffn(hidden_act="fatrelu", hidden_act_param=0.25).activation == Activation(kind="fatrelu", threshold=0.25)
    assert (ffn(hidden_act="drelu").activation, ffn(hidden_act="drelu").up_activation) == (relu, relu)
    bamboo = llama.describe(config_of("bamboo", hidden_act="relu")).ffn
    assert (bamboo.activation, bamboo.up_activation) == (relu, relu)


def test_prosparse_is_known_by_its_architecture(config_of):
    options = {"architectures": ["SparseLlamaForCausalLM"], "auto_map": {"AutoModelForCausalLM": "x.Y"}}
    decoder = llama.describe(config_of(hidden_act="fatrelu", hidden_act_param=0.01, **options))
    assert decoder.ffn.activation == Activation(kind="fatrelu", threshold=0.01)
    with pytest.raises(CheckpointError, match="hidden_act"):
        llama.describe(config_of(hidden_act="silu", **options))


@pytest.mark.parametrize(
    ("base", "changes", "named"),
    [
        ("llama", {"hidden_act": "gelu_10"}, "hidden_act"),
        ("llama", {"hidden_act": "fatrelu"}, "hidden_act_param"),
        ("bamboo", {"hidden_act": "silu"}, "hidden_act"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling.Custom"}}, "auto_map"),
        ("llama", {"logit_scale": 0.5}, "logit_scale"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"residual_multiplier": 0.2}, "residual_multiplier"),
        ("llama", {"num_local_experts": 8}, "num_local_experts"),
        ("llama", {"qk_layernorm": True}, "qk_layernorm"),
        ("llama", {"sliding_window": 64}, "sliding_window"),
        ("llama", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("llama", {"hidden_size": 66, "num_attention_heads": 4}, "num_attention_heads"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("llama", {"head_dim": 15}, "head_dim"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"mlp_bias": True}, "mlp_bias"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("mistral", {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers"),
        ("llama", {"attention_bias": "no"}, "attention_bias"),
    ],
)
def test_what_would_change_the_maths_is_refused_by_name(config_of, base, changes, named):
    with pytest.raises(CheckpointError) as caught:
        llama.describe(config_of(base, **changes))
    assert caught.value.where == named
    assert named in str(caught.value)


@pytest.mark.parametrize("changes", [{"logit_scale": None}, {"logit_scale": 1.0}, {"num_experts": 0}])
def test_neutral_values_pass(config_of, changes):
    assert llama.describe(config_of(**changes)) == llama.describe(config_of())


def test_sliding_windows_are_decided_per_layer(config_of):
    assert windows(config_of("mistral", sliding_window=9)) == [9, 9]
    assert windows(config_of("mistral", sliding_window=None)) == [None, None]
    assert windows(config_of("mistral")) == [4096, 4096]
    assert windows(config_of("qwen2", sliding_window=9)) == [None, None]
    sliding = {"use_sliding_window": True, "sliding_window": 9}
    assert windows(config_of("qwen2", max_window_layers=1, **sliding)) == [None, 9]
    assert windows(config_of("qwen3", **sliding)) == [None, None]
    assert windows(config_of("qwen3", layer_types=["sliding_attention", "full_attention"], **sliding)) == [9, None]
    assert windows(config_of("smollm3", no_rope_layers=[0, 1], **sliding)) == [9, None]


def test_smollm3_layers_without_positions(config_of):
    def rotated(**changes):
        return [layer.rotary for layer in llama.describe(config_of("smollm3", **changes)).layers]

    assert rotated(num_hidden_layers=5) == ["main", "main", "main", None, "main"]
    assert rotated(no_rope_layer_interval=2) == ["main", None]
    assert rotated(no_rope_layers=[0, 1, 1]) == [None, "main"]


def test_qwen3_normalises_heads(config_of):
    decoder = llama.describe(config_of("qwen3", head_dim=32))
    assert decoder.attention.qk_norm == decoder.norm
    assert decoder.attention.qk_norm_over == "head"
    assert llama.describe(config_of("qwen3")).attention.head_dim == 128
    assert llama.describe(config_of("qwen3", head_dim=None)).attention.head_dim == 16
