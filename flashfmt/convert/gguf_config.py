"""config.json and generation_config.json recreated from GGUF metadata, for Llama-family architectures.

Knows: llama.cpp's metadata keys and what they mean in Hugging Face terms. Does not know: bytes, tokenizers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from flashfmt.errors import CheckpointError

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}

_HANDLED = frozenset(
    {
        "attention.causal",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "expert_count",
        "expert_used_count",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.attn_factor",
        "rope.scaling.factor",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "tensor_data_layout",
        "vocab_size",
    }
)


class _Metadata:
    """Lookups under the architecture's prefix, refused by key."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self.values = metadata
        self.path = path
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
            raise CheckpointError(
                "unsupported GGUF architecture",
                path=path,
                where="general.architecture",
                expected="one of " + ", ".join(_ARCHITECTURES),
                actual=architecture,
            )
        self.architecture = architecture

    def refuse(self, key: str, reason: str, expected: object) -> NoReturn:
        name = f"{self.architecture}.{key}"
        raise CheckpointError(
            reason, path=self.path, where=name, expected=expected, actual=self.values.get(name, "no such key")
        )

    def find(self, key: str, default: Any = None) -> Any:
        return self.values.get(f"{self.architecture}.{key}", default)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.find(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.refuse(key, "missing, or not a positive integer", "an integer >= 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.find(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            self.refuse(key, "missing, or not a number", "a number")
        return float(value)


def config_from_metadata(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: list[float] | None,
    path: Path,
) -> dict[str, Any]:
    """The config.json that transformers would need for this file.

    Parameters
    ----------
    shapes : tensor shapes under Hugging Face names: they tell the vocabulary's size, tied embeddings and biases.
    rope_factors : divisors of the rotary frequencies, if the file has them; expressed as `longrope` with one list.

    Raises
    ------
    CheckpointError
        For an unsupported architecture, a missing key, or an option whose meaning is not known here.
    """
    m = _Metadata(metadata, path)
    for key in metadata:
        if key.startswith(f"{m.architecture}.") and key.split(".", 1)[1] not in _HANDLED:
            m.refuse(key.split(".", 1)[1], "this option is not supported", "no such key")
    if m.find("expert_count"):
        m.refuse("expert_count", "mixtures of experts are not supported", 0)
    n_heads, d_model = m.count("attention.head_count"), m.count("embedding_length")
    head_dim = m.count("attention.key_length", d_model // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if m.count(key, head_dim) != head_dim:
            m.refuse(key, "differs from the head's dimension", head_dim)
    if m.find("attention.causal", True) is not True:
        m.refuse("attention.causal", "only causal models are supported", True)
    embedding = shapes.get("model.embed_tokens.weight")
    if embedding is None:
        raise CheckpointError("no token embedding", path=path, where="token_embd.weight")
    config = {
        "architectures": [_ARCHITECTURES[m.architecture]],
        "model_type": m.architecture,
        "vocab_size": embedding[0],
        "hidden_size": d_model,
        "intermediate_size": m.count("feed_forward_length"),
        "num_hidden_layers": m.count("block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": m.count("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": m.count("context_length"),
        "rms_norm_eps": m.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": m.number("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(m, rope_factors),
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "attention_bias": m.architecture != "qwen2" and "model.layers.0.self_attn.q_proj.bias" in shapes,
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token, int):
            config[f"{role}_token_id"] = token
    return config


def generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The generation_config.json that goes with a recreated config: its special tokens."""
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}


def _rope_scaling(m: _Metadata, rope_factors: list[float] | None) -> dict[str, Any] | None:
    kind = m.find("rope.scaling.type", "linear" if m.find("rope.scale_linear") else "none")
    if m.find("rope.scaling.attn_factor", 1.0) != 1.0:
        m.refuse("rope.scaling.attn_factor", "this option is not supported", 1.0)
    if rope_factors is not None:
        if kind != "none":
            m.refuse("rope.scaling.type", "rope_freqs.weight beside a scaling type is not supported", "none")
        return {
            "rope_type": "longrope",
            "short_factor": rope_factors,
            "long_factor": rope_factors,
            "original_max_position_embeddings": m.count("context_length"),
            "attention_factor": 1.0,
        }
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        m.refuse("rope.scaling.type", "unknown kind of scaling", "none, linear or yarn")
    factor = m.number("rope.scaling.factor", m.find("rope.scale_linear"))
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    original = m.count("rope.scaling.original_context_length", m.count("context_length"))
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
