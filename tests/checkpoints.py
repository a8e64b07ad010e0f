"""Tiny random checkpoints of every supported architecture, saved by transformers, with the model as the oracle.

Every parameter is random, norms and biases included, so that no array can be mistaken for another. Import through the
fixtures `tiny_checkpoint` and `checkpoints` of conftest.py.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

REMOVED = object()
VOCAB_SIZE = 320
TEXT = "The quick brown fox jumps over the lazy dog; 12 boxing wizards. Eight words make a sentence, don't they? " * 4
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_LLAMA = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OPT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 64,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}


@dataclass(frozen=True)
class Variant:
    """A transformers config class with its values, and what is changed after saving.

    `rewrite` edits config.json; `patch` makes the oracle compute what the rewritten config says.
    """

    config_class: str
    values: dict[str, Any]
    rewrite: dict[str, Any] | None = None
    patch: Callable[[torch.nn.Module], None] | None = None


def _patch_activation(activation: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.nn.Module], None]:
    class Activation(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return activation(x)

    def patch(model: torch.nn.Module) -> None:
        for layer in model.model.layers:
            layer.mlp.act_fn = Activation()

    return patch


def _patch_drelu(model: torch.nn.Module) -> None:
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.forward = lambda x, m=mlp: m.down_proj(torch.relu(m.gate_proj(x)) * torch.relu(m.up_proj(x)))


def _fatrelu(threshold: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: torch.nn.functional.threshold(x, threshold, 0.0)


VARIANTS: dict[str, Variant] = {
    "opt": Variant("OPTConfig", _OPT),
    "opt_post_norm_projected": Variant("OPTConfig", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt_no_bias": Variant("OPTConfig", {**_OPT, "enable_bias": False, "activation_function": "gelu"}),
    "opt_plain_norm": Variant("OPTConfig", {**_OPT, "layer_norm_elementwise_affine": False}),
    "opt_no_final_norm": Variant("OPTConfig", {**_OPT, "_remove_final_layer_norm": True}),
    "opt_untied": Variant("OPTConfig", {**_OPT, "tie_word_embeddings": False}),
    "llama": Variant("LlamaConfig", _LLAMA),
    "llama_tied": Variant("LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "llama_biases": Variant("LlamaConfig", {**_LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama_head_dim": Variant("LlamaConfig", {**_LLAMA, "head_dim": 24}),
    "llama_rope_llama3": Variant("LlamaConfig", {**_LLAMA, "rope_parameters": _LLAMA3_ROPE}),
    "llama_rope_yarn": Variant("LlamaConfig", {**_LLAMA, "rope_parameters": _YARN_ROPE}),
    "llama_rope_linear": Variant(
        "LlamaConfig", {**_LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}
    ),
    "llama_relu": Variant("LlamaConfig", {**_LLAMA, "hidden_act": "relu"}),
    "prosparse": Variant(
        "LlamaConfig",
        {**_LLAMA, "hidden_act": "relu"},
        rewrite={
            "architectures": ["SparseLlamaForCausalLM"],
            "auto_map": {"AutoModelForCausalLM": "modeling_sparsellama.SparseLlamaForCausalLM"},
            "hidden_act": "fatrelu",
            "hidden_act_param": 0.01,
        },
        patch=_patch_activation(_fatrelu(0.01)),
    ),
    "drelu": Variant("LlamaConfig", _LLAMA, rewrite={"hidden_act": "drelu"}, patch=_patch_drelu),
    "bamboo": Variant(
        "MistralConfig",
        {**_LLAMA, "hidden_act": "relu", "sliding_window": None},
        rewrite={"model_type": "bamboo", "architectures": ["BambooForCausalLM"]},
        patch=_patch_drelu,
    ),
    "mistral": Variant("MistralConfig", {**_LLAMA, "sliding_window": 7}),
    "mistral_no_window": Variant("MistralConfig", {**_LLAMA, "sliding_window": None}),
    "qwen2": Variant("Qwen2Config", _LLAMA),
    "qwen2_sliding": Variant(
        "Qwen2Config", {**_LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    ),
    "qwen3": Variant("Qwen3Config", {**_LLAMA, "head_dim": 32}),
    "qwen3_biases": Variant("Qwen3Config", {**_LLAMA, "head_dim": 16, "attention_bias": True}),
    "smollm3": Variant("SmolLM3Config", {**_LLAMA, "num_hidden_layers": 4}),
    "smollm3_no_rope": Variant(
        "SmolLM3Config",
        {**_LLAMA, "no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 6},
    ),
}


def build(path: Path, variant: str, dtype: str = "float32", seed: int = 0, **save_options: Any) -> torch.nn.Module:
    """Save a tiny random checkpoint and return its oracle: the same weights, rounded to `dtype`, computing in float32.

    `save_options` go to `save_pretrained` (`max_shard_size` for shards).
    """
    spec = VARIANTS[variant]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.utils.logging.disable_progress_bar()
        config = getattr(transformers, spec.config_class)(**spec.values)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            rounded = (centre + 0.1 * noise).to(getattr(torch, dtype))
            parameter.data = rounded.float()
        # parameters alone take the type: casting the model would round the rotary buffers, too
        state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in model.state_dict().items()}
        model.save_pretrained(path, state_dict=state, **save_options)
    edit_json(path / "config.json", dtype=dtype, **(spec.rewrite or {}))
    if spec.patch is not None:
        spec.patch(model)
    return model


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object in a file; `REMOVED` removes a key."""
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not REMOVED}, indent=2))


def write_tokenizer(path: Path, *, add_bos: bool = False) -> Tokenizer:
    """Save a byte-level BPE tokenizer of at most `VOCAB_SIZE` tokens, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    options = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": add_bos, "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(options))
    return tokenizer
