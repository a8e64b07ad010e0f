"""A GGUF file as a checkpoint: Llama-family tensors under their Hugging Face names, dequantised row block by row block.

The file carries no config.json and no tokenizer.json: both are recreated from its metadata, so that a flash file has
the same roles whatever it was made from. llama.cpp stores the query and key rows of some architectures with rotary
pairs interleaved; they are put back in halves here.

Knows: llama.cpp's tensor names, metadata keys and row order. Does not know: the flash format. The only file that
imports `gguf`, and only for its dequantisation.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flashfmt.convert.bpe import json_bytes
from flashfmt.convert.checkpoint import (
    Array,
    SourceFile,
    SourceFormat,
    SourceInfo,
    SourceTensor,
    identity,
    read_exactly,
)
from flashfmt.convert.gguf_config import config_from_metadata, generation_config
from flashfmt.convert.gguf_header import GgufHeader, GgufTensor, read_header
from flashfmt.convert.gguf_tokenizer import tokenizer_files
from flashfmt.encodings import Encoding
from flashfmt.errors import CheckpointError, MissingExtraError
from flashfmt.layout import round_up

PERMUTED_ARCHITECTURES = ("llama", "smollm3")

_PLAIN = {"F32": Encoding.F32, "F16": Encoding.F16, "BF16": Encoding.BF16}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(\d{1,5})\.)?(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"
_BLOCK_BYTES = 16 << 20


class GgufCheckpoint:
    """An opened GGUF file; see `flashfmt.convert.checkpoint.Checkpoint`.

    Raises
    ------
    MissingExtraError
        If the `gguf` package is not installed.
    CheckpointError
        If the file is damaged, or of an architecture or with a tokenizer that is not supported.
    """

    source_format: SourceFormat = "gguf"

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise MissingExtraError("reading GGUF needs the gguf package: pip install 'flashfmt[gguf]'") from error
        self._gguf = gguf
        self.path = path
        self.source = path.name
        self._file = path.open("rb")
        try:
            header = read_header(self._file, path, _readable_blocks(gguf))
            self._tensors = {
                _our_name(name): tensor for name, tensor in header.tensors.items() if name != _ROPE_FACTORS
            }
            factors = self._rope_factors(header)
            self.config: Mapping[str, Any] = config_from_metadata(
                header.metadata, {name: tensor.shape for name, tensor in self._tensors.items()}, factors, path
            )
            self.tensors: Mapping[str, SourceInfo] = {
                name: self._info(tensor) for name, tensor in self._tensors.items()
            }
            self._head_rows = self._find_permuted(header)
            self.files: Mapping[str, SourceFile] = {
                "config": SourceFile("config.json", json_bytes(self.config)),
                "generation_config": SourceFile("generation_config.json", json_bytes(generation_config(self.config))),
                **tokenizer_files(header.metadata, path),
            }
            licence = header.metadata.get("general.license")
            self.licence = licence if isinstance(licence, str) else None
            self.sha256, self.fingerprint = self._identities(header)
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str, start: int = 0, stop: int | None = None) -> SourceTensor:
        """Rows [start, stop) of a tensor along its first axis, dequantised to float32 where needed; a new array."""
        tensor, encoding = self._tensors[name], self.tensors[name].encoding
        n_rows = tensor.shape[0]
        stop = n_rows if stop is None else min(stop, n_rows)
        head_rows = self._head_rows.get(name)
        if head_rows is None:
            return SourceTensor(encoding, self._read_rows(name, tensor, start, stop))
        first, last = start // head_rows * head_rows, round_up(stop, head_rows)
        whole_heads = _rotary_halves(self._read_rows(name, tensor, first, last), head_rows)
        return SourceTensor(encoding, whole_heads[start - first : stop - first])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read_rows(self, name: str, tensor: GgufTensor, start: int, stop: int) -> Array:
        """Rows [start, stop) as the file orders them, in steps that keep the dequantiser's temporaries small."""
        data = np.empty((stop - start, *tensor.shape[1:]), self.tensors[name].encoding.storage_dtype)
        step = max(1, _BLOCK_BYTES * len(data) // data.nbytes)
        for row in range(start, stop, step):
            end = min(row + step, stop)
            data[row - start : end - start] = self._dequantise_rows(name, tensor, row, end)
        return data

    def _dequantise_rows(self, name: str, tensor: GgufTensor, start: int, stop: int) -> Array:
        row_nbytes = tensor.nbytes // tensor.shape[0]
        raw = np.empty((stop - start) * row_nbytes, np.uint8)
        read_exactly(self._file.fileno(), raw.data, tensor.offset + start * row_nbytes, self.path)
        shape = (stop - start, *tensor.shape[1:])
        if not self.tensors[name].quantised:
            return raw.view(self.tensors[name].encoding.storage_dtype).reshape(shape)
        packed = raw.reshape(*shape[:-1], -1)
        weights: Array = self._gguf.dequantize(packed, self._gguf.GGMLQuantizationType(tensor.type_id))
        return weights.reshape(shape)

    def _info(self, tensor: GgufTensor) -> SourceInfo:
        plain = _PLAIN.get(self._gguf.GGMLQuantizationType(tensor.type_id).name)
        return SourceInfo(tensor.shape, plain or Encoding.F32, quantised=plain is None)

    def _find_permuted(self, header: GgufHeader) -> dict[str, int]:
        """Tensors whose rows llama.cpp permuted within each head -> rows a head."""
        if header.metadata["general.architecture"] not in PERMUTED_ARCHITECTURES:
            return {}
        heads = {"q_proj": self.config["num_attention_heads"], "k_proj": self.config["num_key_value_heads"]}
        permuted = {name: heads[part] for name in self.tensors for part in heads if f".{part}." in name}
        for name, n_heads in permuted.items():
            if self.tensors[name].shape[0] % (2 * n_heads):
                raise CheckpointError(
                    "rows do not divide into heads",
                    path=self.path,
                    where=name,
                    expected=f"a multiple of {2 * n_heads} rows",
                    actual=self.tensors[name].shape[0],
                )
        return {name: self.tensors[name].shape[0] // n_heads for name, n_heads in permuted.items()}

    def _rope_factors(self, header: GgufHeader) -> list[float] | None:
        """Divisors of the rotary frequencies, which llama.cpp precomputes for Llama 3.1 and later."""
        tensor = header.tensors.get(_ROPE_FACTORS)
        if tensor is None:
            return None
        if self._gguf.GGMLQuantizationType(tensor.type_id).name != "F32" or len(tensor.shape) != 1:
            raise CheckpointError("not a float32 vector", path=self.path, where=_ROPE_FACTORS)
        raw = bytearray(tensor.nbytes)
        read_exactly(self._file.fileno(), memoryview(raw), tensor.offset, self.path)
        return [float(value) for value in np.frombuffer(raw, "<f4")]

    def _identities(self, header: GgufHeader) -> tuple[str, str]:
        raw = bytearray(header.nbytes)
        read_exactly(self._file.fileno(), memoryview(raw), 0, self.path)
        status = os.fstat(self._file.fileno())
        content: dict[str, object] = {self.source: [status.st_size, hashlib.sha256(raw).hexdigest()]}
        return identity(content), identity({"content": content, "times": status.st_mtime_ns})


def _readable_blocks(gguf: Any) -> dict[int, tuple[int, int]]:
    """Weights and bytes a block of every type that is plain or can be dequantised."""
    readable = {kind for kind in gguf.GGMLQuantizationType if kind.name in _PLAIN} | set(gguf.quants._type_traits)
    return {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items() if kind in readable}


def _our_name(name: str) -> str:
    """Hugging Face name of a GGUF tensor; unknown names stay, and are refused as unexpected later."""
    match = _NAME.fullmatch(name)
    if match is None:
        return name
    block, part, kind = match.groups()
    if block is None:
        return f"{_TOP[part]}.{kind}" if part in _TOP else name
    return f"model.layers.{int(block)}.{_BLOCK[part]}.{kind}" if part in _BLOCK else name


def _rotary_halves(rows: Array, head_rows: int) -> Array:
    """Undo llama.cpp's interleaving of rotary pairs in whole heads: rows (head, pair, half) -> (head, half, pair)."""
    pairs = rows.reshape(-1, head_rows // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
