"""Writes synthetic weights as a Hugging Face checkpoint: config.json and one model.safetensors, float16."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Final

import numpy as np

from comparison.weights import Weights, tensors
from reference_engine.synthetic import Shape

_BLOCK_ROWS: Final = 4096


def write_checkpoint(folder: Path, shape: Shape) -> None:
    """Write a checkpoint to the new directory `folder`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_config(shape)))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors(shape):
        nbytes = 2 * math.prod(tensor.shape)
        header[tensor.name] = {
            "dtype": "F16",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    weights = Weights()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors(shape):
            if len(tensor.shape) == 1:
                file.write(weights.vector(tensor).astype(np.float16).tobytes())
                continue
            for first in range(0, tensor.shape[0], _BLOCK_ROWS):
                ids = np.arange(first, min(first + _BLOCK_ROWS, tensor.shape[0]))
                file.write(weights.rows(tensor, ids).data)
        file.flush()
        os.fsync(file.fileno())


def _config(shape: Shape) -> dict[str, Any]:
    shared = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "max_position_embeddings": shape.context_tokens,
        "tie_word_embeddings": shape.tied,
        "dtype": "float16",
    }
    if shape.plain:
        return shared | {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "word_embed_proj_dim": shape.d_model,
            "ffn_dim": shape.d_ff,
            "activation_function": "relu",
            "do_layer_norm_before": True,
        }
    return shared | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": shape.d_ff,
        "num_key_value_heads": shape.n_kv_heads,
        "hidden_act": "relu" if shape.relu else "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
