"""Writes synthetic weights as GGUF, for llama.cpp.

A Llama shape becomes architecture ``llama`` with the weights of the checkpoint, value for value. llama.cpp has no OPT;
an OPT shape becomes ``gpt2``, which differs in the activation (GELU for ReLU) alone: the same matrices, biases, norms
and positions, so the same bytes and the same arithmetic. Every matrix is stored in the one type that is asked for,
without the finer types that llama.cpp's own quantiser gives some tensors; that makes the file smaller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize

from comparison.weights import Tensor, Weights, tensors
from reference_engine.synthetic import Shape

GgufType = Literal["f16", "q8_0", "q4_0"]
_TYPES: Final = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
_POSITION_OFFSET: Final = 2  # rows of OPT's table before that of the first position
_GPT2_LAYER: Final = {
    "self_attn_layer_norm": "attn_norm",
    "self_attn.out_proj": "attn_output",
    "final_layer_norm": "ffn_norm",
    "fc1": "ffn_up",
    "fc2": "ffn_down",
}
_LLAMA_LAYER: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of the file: rows `ids` of each of `sources`, one after the other; vectors have no ids."""

    name: str
    sources: tuple[Tensor, ...]
    ids: npt.NDArray[np.int64] | None = None
    is_float: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.sources[0].shape
        if self.ids is None:
            return (sum(source.shape[0] for source in self.sources),)
        return (len(self.ids) * len(self.sources), first[1])


def write_gguf(path: Path, shape: Shape, gguf_type: GgufType) -> None:
    """Write a GGUF file whose matrices are of one type."""
    stored_type, file_type = _TYPES[gguf_type]
    arch = "gpt2" if shape.plain else "llama"
    writer = GGUFWriter(path, arch)
    _add_metadata(writer, shape, file_type)
    plain, stored = Weights(), Weights(None if gguf_type == "f16" else lambda rows: quantize(rows, stored_type))
    entries = list(_gpt2(shape) if shape.plain else _llama(shape))
    for entry in entries:
        is_vector = entry.ids is None or entry.is_float
        kind = GGMLQuantizationType.F32 if is_vector else stored_type
        shown = _data(entry, plain, stored, limit=1)
        stored_shape = (entry.shape[0], *shown.shape[1:]) if shown.ndim > 1 else entry.shape
        nbytes = int(np.prod(stored_shape)) * shown.itemsize
        writer.add_tensor_info(entry.name, stored_shape, shown.dtype, nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(_data(entry, plain, stored))
    writer.close()


def _data(entry: _Entry, plain: Weights, stored: Weights, limit: int | None = None) -> npt.NDArray[Any]:
    if entry.ids is None:
        return np.concatenate([plain.vector(source) for source in entry.sources])
    ids = entry.ids[:limit]
    if entry.is_float:
        return plain.rows(entry.sources[0], ids).astype(np.float32)
    return np.concatenate([stored.rows(source, ids) for source in entry.sources])


def _add_metadata(writer: GGUFWriter, shape: Shape, file_type: LlamaFileType) -> None:
    writer.add_file_type(file_type)
    writer.add_context_length(shape.context_tokens)
    writer.add_embedding_length(shape.d_model)
    writer.add_block_count(shape.n_layers)
    writer.add_feed_forward_length(shape.d_ff)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    if shape.plain:
        writer.add_layer_norm_eps(1e-5)
        return
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.d_model // shape.n_heads)
    writer.add_rope_freq_base(10000.0)


def _gpt2(shape: Shape) -> Iterator[_Entry]:
    by_name = {tensor.name: tensor for tensor in tensors(shape)}
    embedding = by_name["model.decoder.embed_tokens.weight"]
    positions = by_name["model.decoder.embed_positions.weight"]
    yield _Entry("token_embd.weight", (embedding,), np.arange(shape.vocab_size))
    yield _Entry(
        "position_embd.weight", (positions,), np.arange(shape.context_tokens) + _POSITION_OFFSET, is_float=True
    )
    for layer in range(shape.n_layers):
        prefix = f"model.decoder.layers.{layer}"
        for kind in ("weight", "bias"):
            qkv = [by_name[f"{prefix}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            yield _entry(f"blk.{layer}.attn_qkv.{kind}", qkv)
            for ours, theirs in _GPT2_LAYER.items():
                yield _entry(f"blk.{layer}.{theirs}.{kind}", [by_name[f"{prefix}.{ours}.{kind}"]])
    for kind in ("weight", "bias"):
        yield _entry(f"output_norm.{kind}", [by_name[f"model.decoder.final_layer_norm.{kind}"]])


def _llama(shape: Shape) -> Iterator[_Entry]:
    by_name = {tensor.name: tensor for tensor in tensors(shape)}
    yield _entry("token_embd.weight", [by_name["model.embed_tokens.weight"]])
    for layer in range(shape.n_layers):
        for ours, theirs in _LLAMA_LAYER.items():
            tensor = by_name[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                ids = _interleaved(tensor.shape[0], shape.d_model // shape.n_heads)
                yield _Entry(f"blk.{layer}.{theirs}.weight", (tensor,), ids)
            else:
                yield _entry(f"blk.{layer}.{theirs}.weight", [tensor])
    yield _entry("output_norm.weight", [by_name["model.norm.weight"]])
    if not shape.tied:
        yield _entry("output.weight", [by_name["lm_head.weight"]])


def _entry(name: str, sources: Sequence[Tensor]) -> _Entry:
    is_matrix = len(sources[0].shape) > 1
    return _Entry(name, tuple(sources), np.arange(sources[0].shape[0]) if is_matrix else None)


def _interleaved(n_rows: int, head_dim: int) -> npt.NDArray[np.int64]:
    """Rows in GGUF's order: llama.cpp rotates neighbours where the checkpoint pairs halves of a head."""
    rows = np.arange(n_rows).reshape(-1, 2, head_dim // 2)
    return rows.swapaxes(1, 2).reshape(-1)
