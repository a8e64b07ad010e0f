"""Random weights of real shapes, the same in every file format: a matrix is rows of a small pool, over and over.

Which row comes first depends on the tensor's name. Quantising the pool quantises every matrix, so writing a file takes
what the disk takes. Nothing on the way compresses or shares pages, so that rows repeat changes no timing.

Knows: names and shapes of Hugging Face checkpoints. Does not know: file formats.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from reference_engine.synthetic import Shape

Array = npt.NDArray[Any]
_POOL_ROWS: Final = 509  # a prime: no tensor's rows fall into step with it
_SCALE: Final = 0.02


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a checkpoint; vectors have one dimension."""

    name: str
    shape: tuple[int, ...]


class Weights:
    """Values of every tensor, float16. `encode` turns float32 rows [n, width] into stored ones [n, nbytes or width]."""

    def __init__(self, encode: Callable[[npt.NDArray[np.float32]], Array] | None = None) -> None:
        self._encode = encode
        self._pools: dict[int, Array] = {}

    def rows(self, tensor: Tensor, ids: npt.NDArray[np.int64]) -> Array:
        """Stored rows of a matrix."""
        width = tensor.shape[1]
        if width not in self._pools:
            values = np.random.default_rng(width).standard_normal((_POOL_ROWS, width), np.float32) * np.float32(_SCALE)
            halves = values.astype(np.float16)
            self._pools[width] = halves if self._encode is None else self._encode(halves.astype(np.float32))
        return self._pools[width][(zlib.crc32(tensor.name.encode()) + ids) % _POOL_ROWS]

    def vector(self, tensor: Tensor) -> npt.NDArray[np.float32]:
        """Values of a vector: weights of norms are 1, biases 0."""
        is_weight = tensor.name.endswith(".weight")
        return np.full(tensor.shape, 1.0 if is_weight else 0.0, np.float32)


def tensors(shape: Shape) -> Iterator[Tensor]:
    """All tensors of a checkpoint, in the order of a forward pass.

    Raises
    ------
    ValueError
        For shapes that are neither OPT's nor Llama's.
    """
    if shape.parallel:
        raise ValueError(f"no checkpoint is written for {shape.name}")
    yield from _opt(shape) if shape.plain else _llama(shape)


def _opt(shape: Shape) -> Iterator[Tensor]:
    d, ff = shape.d_model, shape.d_ff
    yield Tensor("model.decoder.embed_tokens.weight", (shape.vocab_size, d))
    yield Tensor("model.decoder.embed_positions.weight", (shape.context_tokens + 2, d))
    for layer in range(shape.n_layers):
        prefix = f"model.decoder.layers.{layer}"
        yield from _with_bias(f"{prefix}.self_attn_layer_norm", (d,))
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _with_bias(f"{prefix}.self_attn.{part}", (d, d))
        yield from _with_bias(f"{prefix}.final_layer_norm", (d,))
        yield from _with_bias(f"{prefix}.fc1", (ff, d))
        yield from _with_bias(f"{prefix}.fc2", (d, ff))
    yield from _with_bias("model.decoder.final_layer_norm", (d,))


def _with_bias(name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", shape)
    yield Tensor(f"{name}.bias", shape[:1])


def _llama(shape: Shape) -> Iterator[Tensor]:
    d, ff = shape.d_model, shape.d_ff
    d_kv = d // shape.n_heads * shape.n_kv_heads
    yield Tensor("model.embed_tokens.weight", (shape.vocab_size, d))
    for layer in range(shape.n_layers):
        prefix = f"model.layers.{layer}"
        yield Tensor(f"{prefix}.input_layernorm.weight", (d,))
        for part, rows in (("q_proj", d), ("k_proj", d_kv), ("v_proj", d_kv), ("o_proj", d)):
            yield Tensor(f"{prefix}.self_attn.{part}.weight", (rows, d))
        yield Tensor(f"{prefix}.post_attention_layernorm.weight", (d,))
        yield Tensor(f"{prefix}.mlp.gate_proj.weight", (ff, d))
        yield Tensor(f"{prefix}.mlp.up_proj.weight", (ff, d))
        yield Tensor(f"{prefix}.mlp.down_proj.weight", (d, ff))
    yield Tensor("model.norm.weight", (d,))
    if not shape.tied:
        yield Tensor("lm_head.weight", (shape.vocab_size, d))
