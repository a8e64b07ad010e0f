"""Rotary tables against transformers, in both forms of the config."""

import copy
import math
import warnings

import numpy as np
import pytest

from flashfmt.convert.rotary import rotary_table
from flashfmt.errors import CheckpointError

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {"original_max_position_embeddings": 32, "long_factor": [1.5] * 8}
OPTIONS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": LLAMA3,
    "llama3_no_original": {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "yarn_mscale": {"factor": 4.0, "original_max_position_embeddings": 32, "mscale": 0.7, "mscale_all_dim": 0.9},
    "yarn_attention": {"factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 0.8},
    "yarn_untruncated": {"factor": 2.0, "original_max_position_embeddings": 64, "truncate": False, "beta_fast": 16},
    "longrope": {**LONG, "short_factor": [1.5] * 8},
}


def oracle(values, head_dim):
    """Inverse frequencies and attention factor of transformers for a Llama config."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.LlamaConfig(**copy.deepcopy(values), head_dim=head_dim)
        rotary = LlamaRotaryEmbedding(config)
    return rotary.inv_freq.numpy(), rotary.attention_scaling


@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling", "rope_scaling_type"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_tables_equal_those_of_transformers(config_of, kind, form):
    options = dict(OPTIONS[kind])
    name = kind.split("_")[0]
    if form == "rope_parameters":
        changes = {"rope_parameters": {"rope_type": name, "rope_theta": 5000.0, **options}}
    else:
        key = "rope_type" if form == "rope_scaling" else "type"
        changes = {"rope_theta": 5000.0, "rope_scaling": {key: name, **options}}
    config = config_of(**changes)
    table = rotary_table(config, 16)
    frequencies, attention_factor = oracle(config.values, 16)
    np.testing.assert_allclose(table.frequencies, frequencies, rtol=5e-7)
    assert table.frequencies.dtype == np.float32
    assert table.description.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    assert table.description.n_dims == 16


def test_the_base_alone(config_of):
    plain = rotary_table(config_of(), 8).frequencies
    np.testing.assert_allclose(plain, 10_000.0 ** (-np.arange(4) / 4), rtol=1e-6)
    assert rotary_table(config_of(rope_theta=100.0), 8).frequencies[1] == pytest.approx(100**-0.25)
    assert rotary_table(config_of(), 8, 2e6).frequencies[1] == pytest.approx(2e6**-0.25)


def test_a_longrope_that_never_leaves_the_short_factors_is_exact(config_of):
    scaling = {**LONG, "rope_type": "longrope", "short_factor": [1.0] * 8, "original_max_position_embeddings": 128}
    table = rotary_table(config_of(rope_scaling=scaling), 16)
    np.testing.assert_allclose(table.frequencies, rotary_table(config_of(), 16).frequencies)
    assert table.description.attention_factor == 1.0


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "longrope", **LONG, "short_factor": [1.0] * 8},
        {"rope_type": "longrope", **LONG},
        {"rope_type": "longrope", **LONG, "short_factor": [1.5] * 7},
        {"rope_type": "proportional"},
        {"type": "su"},
        {"rope_type": "linear"},
        {"rope_type": "linear", "factor": 0},
        {"rope_type": "linear", "factor": math.inf},
        {"rope_type": "llama3", "factor": 2.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"rope_type": "default", "mrope_section": [2, 3, 3]},
        {"full_attention": {"rope_type": "default"}},
        "linear",
    ],
    ids=str,
)
def test_what_cannot_be_a_table_is_refused(config_of, scaling):
    with pytest.raises(CheckpointError) as caught:
        rotary_table(config_of(rope_scaling=scaling), 16)
    assert caught.value.where == "rope_scaling"
