"""OPT configs: what they describe, and what is refused by name."""

import pytest

from flashfmt.convert import opt
from flashfmt.convert.config import Config
from flashfmt.convert.families import family_of
from flashfmt.errors import CheckpointError
from flashfmt.manifest import LearnedPositions, Norm


def test_a_plain_opt(config_of):
    decoder = opt.describe(config_of("opt"))
    assert decoder.positions == LearnedPositions(n_rows=130, offset=2)
    assert decoder.ffn.kind == "plain"
    assert decoder.ffn.activation.kind == "relu"
    assert decoder.norm == Norm(kind="layer_norm", eps=1e-5, weight=True, bias=True)
    assert decoder.block.order == "pre_norm"
    assert decoder.final_norm
    assert decoder.logits.tied
    assert not decoder.embedding.projection


def test_the_350m_form(config_of):
    decoder = opt.describe(config_of("opt", do_layer_norm_before=False, word_embed_proj_dim=32))
    assert decoder.block.order == "post_norm"
    assert not decoder.final_norm
    assert decoder.embedding.projection
    assert decoder.embedding.d_embed == 32


def test_switches(config_of):
    no_bias = opt.describe(config_of("opt", enable_bias=False))
    assert not (no_bias.attention.qkv_bias)
    assert not (no_bias.attention.output_bias)
    assert not (no_bias.ffn.up_bias)
    assert no_bias.norm.bias
    plain = opt.describe(config_of("opt", layer_norm_elementwise_affine=False))
    assert not plain.norm.weight
    assert not plain.norm.bias
    assert not opt.describe(config_of("opt", _remove_final_layer_norm=True)).final_norm
    assert opt.describe(config_of("opt", activation_function="gelu")).ffn.activation.kind == "gelu"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"activation_function": "tanh"}, "activation_function"),
        ({"ffn_dim": ...}, "ffn_dim"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"enable_bias": "yes"}, "enable_bias"),
        ({"logit_scale": 2.0}, "logit_scale"),
    ],
)
def test_refusals(config_of, changes, named):
    with pytest.raises(CheckpointError) as caught:
        opt.describe(config_of("opt", **changes))
    assert caught.value.where == named


def test_unknown_architectures_are_refused_naming_the_known_ones(config_of):
    with pytest.raises(CheckpointError, match=r"one of .*llama.*opt.*, got gemma2 \['Gemma2ForCausalLM'\]"):
        family_of(config_of("gemma2", architectures=["Gemma2ForCausalLM"]))
    with pytest.raises(CheckpointError, match="model_type"):
        family_of(Config({}, "config.json"))
