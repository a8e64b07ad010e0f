"""A small OPT-style ReLU decoder in PyTorch, and its export as a transformers checkpoint.

Knows the shape of the model and how its parameters are called in an `OPTForCausalLM` checkpoint. Knows nothing of
training. The arithmetic is OPT's (pre-norm, biases, learned positions with an offset of two, tied embeddings); the
query, key and value projections are one matrix here, which is faster to train.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

HEAD_DIM = 64
POSITION_OFFSET = 2


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; `d_model` is a multiple of 64, the width of a head and of a quantised block."""

    vocab_size: int
    d_model: int
    n_layers: int
    d_ff: int
    n_context: int

    @property
    def n_heads(self) -> int:
        """Attention heads, each 64 wide."""
        return self.d_model // HEAD_DIM


class Block(nn.Module):
    """Attention and a ReLU feed-forward network, each behind its own layer norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d_model = shape.d_model
        self.n_heads = shape.n_heads
        self.attention_norm = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.ffn_norm = nn.LayerNorm(d_model)
        self.up = nn.Linear(d_model, shape.d_ff)
        self.down = nn.Linear(shape.d_ff, d_model)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map `[n_batch, n_tokens, d_model]` to the same shape; also the activations `[n_batch, n_tokens, d_ff]`."""
        n_batch, n_tokens, d_model = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(n_batch, n_tokens, 3, self.n_heads, HEAD_DIM)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (n_batch, n_heads, n_tokens, head_dim)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n_batch, n_tokens, d_model))
        active = F.relu(self.up(self.ffn_norm(x)))
        return x + self.down(active), active


class Decoder(nn.Module):
    """The whole decoder, float32 parameters; run it under autocast for bfloat16 arithmetic."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.tokens = nn.Embedding(shape.vocab_size, shape.d_model)
        self.positions = nn.Embedding(shape.n_context + POSITION_OFFSET, shape.d_model)
        self.blocks = nn.ModuleList([Block(shape) for _ in range(shape.n_layers)])
        self.norm = nn.LayerNorm(shape.d_model)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.n_layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits `[n_batch, n_tokens, vocab_size]` of int64 `[n_batch, n_tokens]`, and each layer's activations."""
        n_tokens = ids.shape[1]
        x = self.tokens(ids) + self.positions.weight[POSITION_OFFSET : POSITION_OFFSET + n_tokens]
        activations = []
        for block in self.blocks:
            x, active = block(x)
            activations.append(active)
        return F.linear(self.norm(x), self.tokens.weight), activations

    @property
    def n_parameters(self) -> int:
        """Parameters, the tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


def opt_state(model: Decoder) -> dict[str, Tensor]:
    """The parameters under their names in an `OPTForCausalLM` checkpoint; views, float32."""
    state = {
        "model.decoder.embed_tokens.weight": model.tokens.weight,
        "model.decoder.embed_positions.weight": model.positions.weight,
        "model.decoder.final_layer_norm.weight": model.norm.weight,
        "model.decoder.final_layer_norm.bias": model.norm.bias,
    }
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        prefix = f"model.decoder.layers.{i}."
        for kind in ("weight", "bias"):
            for letter, part in zip("qkv", getattr(block.qkv, kind).chunk(3), strict=True):
                state[f"{prefix}self_attn.{letter}_proj.{kind}"] = part
            for name, module in (
                ("self_attn.out_proj", block.out),
                ("self_attn_layer_norm", block.attention_norm),
                ("fc1", block.up),
                ("fc2", block.down),
                ("final_layer_norm", block.ffn_norm),
            ):
                state[f"{prefix}{name}.{kind}"] = getattr(module, kind)
    return {name: tensor.detach() for name, tensor in state.items()}


def export(model: Decoder, tokenizer: Path, target: Path, end_of_text: str) -> None:
    """Save the model and its tokenizer to the folder `target` as transformers does, in float16.

    Raises
    ------
    ValueError
        When the float32 checkpoint's logits differ from this model's by more than rounding.
    """
    import transformers as hf

    shape = model.shape
    fast = hf.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(tokenizer), bos_token=end_of_text, eos_token=end_of_text, model_max_length=shape.n_context
    )
    end_id = fast.eos_token_id
    config = hf.OPTConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        word_embed_proj_dim=shape.d_model,
        num_hidden_layers=shape.n_layers,
        ffn_dim=shape.d_ff,
        num_attention_heads=shape.n_heads,
        max_position_embeddings=shape.n_context,
        activation_function="relu",
        do_layer_norm_before=True,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=None,
        bos_token_id=end_id,
        eos_token_id=end_id,
        tie_word_embeddings=True,
    )
    checkpoint: Any = hf.OPTForCausalLM(config)
    checkpoint.eval()
    checkpoint.load_state_dict(opt_state(model) | {"lm_head.weight": model.tokens.weight.detach()})
    ids = torch.arange(2 * shape.n_context).view(2, -1) % shape.vocab_size
    with torch.no_grad():
        difference = (checkpoint(ids).logits - model(ids)[0]).abs().max().item()
    if difference > 1e-3:
        raise ValueError(f"the exported checkpoint's logits differ by {difference}")
    generation = hf.GenerationConfig(bos_token_id=end_id, eos_token_id=end_id)  # type: ignore[no-untyped-call]
    checkpoint.generation_config = generation
    target.mkdir(parents=True, exist_ok=True)
    checkpoint.half().save_pretrained(target)
    fast.save_pretrained(target)
    shutil.copyfile(tokenizer, target / "tokenizer.json")
