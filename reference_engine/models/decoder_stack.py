"""A decoder built from the manifest's description alone (SPEC.md section "The decoder").

Knows the order of the arithmetic. Does not know where weights come from, how fast, or what computes them: tensors
are handed in by a `TensorSource`, bundles block by block by a `BundleSource`, arithmetic by a `Backend`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from flashfmt import BundlesInfo
from flashfmt.manifest import Decoder, Layer, Norm
from reference_engine.backends import AttentionWeights, Backend, FfnShape, HeadNorm, Matrix
from reference_engine.kv_cache import KvCache
from reference_engine.models.weights import BundleSource, Table, TensorSource

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _NormWeights:
    weight: F32 | None
    bias: F32 | None


@dataclass(frozen=True, slots=True)
class _LayerWeights:
    attention_norm: _NormWeights
    q: Matrix
    k: Matrix
    v: Matrix
    output: Matrix
    q_bias: F32 | None
    k_bias: F32 | None
    v_bias: F32 | None
    output_bias: F32 | None
    q_norm: _NormWeights
    k_norm: _NormWeights
    ffn_norm: _NormWeights
    ffn_shape: FfnShape
    gate_bias: F32 | None
    up_bias: F32 | None
    down_bias: F32 | None


@dataclass(frozen=True, slots=True)
class Rotation:
    """Sines and cosines of the positions of one forward pass, [n_tokens, n_dims / 2]."""

    cos: F32
    sin: F32
    pairing: Literal["half", "interleaved"]


class DecoderStack:
    """All layers of a model, with the embedding before and the logits behind them.

    Parameters
    ----------
    tokens : the token embedding.
    bundles : source of the FFN's weights.
    """

    def __init__(
        self,
        *,
        decoder: Decoder,
        residents: TensorSource,
        layers: tuple[BundlesInfo, ...],
        tokens: Table,
        bundles: BundleSource,
        backend: Backend,
    ) -> None:
        self.decoder = decoder
        self._residents = residents
        self._tokens = tokens
        self._bundles = bundles
        self._backend = backend
        self._layers = [self._layer_weights(info) for info in layers]
        self._attention_steps = [
            backend.bind_attention(self._attention_weights(layer, weights))
            for layer, weights in zip(decoder.layers, self._layers, strict=True)
        ]
        self._final_norm = self._norm_weights("final_norm", decoder.norm)
        self._embedding_norm = self._norm_weights("embedding/norm", decoder.norm)
        self._frequencies = {table.name: self._vector(f"rotary/{table.name}") for table in decoder.rotary}

    def forward(self, token_ids: npt.NDArray[np.int64], kv_cache: KvCache) -> F32:
        """Hidden states [n_tokens, d_model] of new tokens behind those in `kv_cache`, which takes them up."""
        n_past = kv_cache.n_tokens
        positions = np.arange(n_past, n_past + len(token_ids))
        x = self._embed(token_ids, positions)  # (n_tokens, d_model)
        rotations = self._rotations(positions)
        for index, layer in enumerate(self.decoder.layers):
            x = self._layer(index, layer, x, kv_cache, rotations)
        kv_cache.advance(len(token_ids))
        return x

    def logits(self, hidden: F32) -> F32:
        """float32 [n_tokens, vocab_size] from hidden states [n_tokens, d_model]."""
        d, r = self.decoder, self._residents
        x = self._norm(d.norm, self._final_norm, hidden) if d.final_norm else hidden
        if d.embedding.projection:
            x = self._backend.matmul(r.matrix("embedding/projection_out"), x)
        matrix = r.matrix("embedding/tokens" if d.logits.tied else "logits/weight")
        y = self._backend.matmul(matrix, x, bias=r.vector("logits/bias"))
        if d.logits.scale != 1.0:
            y *= np.float32(d.logits.scale)
        if d.logits.softcap is not None:
            cap = np.float32(d.logits.softcap)
            y = cap * np.tanh(y / cap)
        return y

    def _embed(self, token_ids: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> F32:
        d = self.decoder
        x = self._tokens.rows(token_ids)
        if d.embedding.scale != 1.0:
            x *= np.float32(d.embedding.scale)
        if d.embedding.projection:
            x = self._backend.matmul(self._residents.matrix("embedding/projection_in"), x)
        if d.positions is not None:
            table = self._residents.matrix("embedding/positions")
            x = x + self._backend.rows(table, positions + d.positions.offset)
        if d.embedding_norm:
            x = self._norm(d.norm, self._embedding_norm, x)
        return x

    def _rotations(self, positions: npt.NDArray[np.int64]) -> dict[str, Rotation]:
        rotations = {}
        for table in self.decoder.rotary:
            angles = positions.astype(np.float32)[:, None] * self._frequencies[table.name]
            factor = np.float32(table.attention_factor)
            rotations[table.name] = Rotation(np.cos(angles) * factor, np.sin(angles) * factor, table.pairing)
        return rotations

    def _layer(self, index: int, layer: Layer, x: F32, kv_cache: KvCache, rotations: dict[str, Rotation]) -> F32:
        norm, w = self.decoder.norm, self._layers[index]
        rotation = rotations[layer.rotary] if layer.rotary is not None else None
        match self.decoder.block.order:
            case "pre_norm":
                x = x + self._attention(index, layer, self._norm(norm, w.attention_norm, x), kv_cache, rotation)
                return x + self._feed_forward(index, self._norm(norm, w.ffn_norm, x))
            case "post_norm":
                x = self._norm(norm, w.attention_norm, x + self._attention(index, layer, x, kv_cache, rotation))
                return self._norm(norm, w.ffn_norm, x + self._feed_forward(index, x))
            case "parallel":
                h = self._norm(norm, w.attention_norm, x)
                g = h if self.decoder.block.shared_norm else self._norm(norm, w.ffn_norm, x)
                return x + self._attention(index, layer, h, kv_cache, rotation) + self._feed_forward(index, g)

    def _attention(self, index: int, layer: Layer, x: F32, kv_cache: KvCache, rotation: Rotation | None) -> F32:
        a, w, b = self.decoder.attention, self._layers[index], self._backend
        n_tokens = len(x)
        self._bundles.tap(index, "attention_input", x)
        step = self._attention_steps[index]
        if n_tokens == 1 and step is not None:
            cos, sin = (None, None) if rotation is None else (rotation.cos, rotation.sin)
            out = step(x, cos, sin, *kv_cache.layer(index), n_past=kv_cache.n_tokens)
            self._bundles.tap(index, "attention_output", out)
            return out
        q = b.matmul(w.q, x, bias=w.q_bias)  # (n_tokens, n_heads * head_dim)
        k = b.matmul(w.k, x, bias=w.k_bias)
        v = b.matmul(w.v, x, bias=w.v_bias)
        q, k = self._qk_norm(w.q_norm, q), self._qk_norm(w.k_norm, k)
        q = q.reshape(n_tokens, a.n_heads, a.head_dim)
        k = k.reshape(n_tokens, a.n_kv_heads, a.head_dim)
        if rotation is not None:
            b.rotate(q, rotation.cos, rotation.sin, rotation.pairing)
            b.rotate(k, rotation.cos, rotation.sin, rotation.pairing)
        kv_cache.append(index, k, v.reshape(n_tokens, a.n_kv_heads, a.head_dim))
        keys, values = kv_cache.layer(index)
        mixed = b.attend(
            q, keys, values, n_past=kv_cache.n_tokens, scale=a.scale, window=layer.attention_window_tokens
        )  # (n_tokens, n_heads, head_dim)
        out = b.matmul(w.output, mixed.reshape(n_tokens, a.n_heads * a.head_dim), bias=w.output_bias)
        self._bundles.tap(index, "attention_output", out)
        return out

    def _feed_forward(self, index: int, x: F32) -> F32:
        w = self._layers[index]
        out = np.zeros_like(x) if w.down_bias is None else np.tile(w.down_bias, (len(x), 1))
        self._bundles.tap(index, "ffn_input", x)
        for block in self._bundles.blocks(index, x):
            up_bias = None if w.up_bias is None else w.up_bias[block.neurons]
            gate_bias = None if w.gate_bias is None else w.gate_bias[block.neurons]
            self._backend.ffn(w.ffn_shape, block.rows, block.slots, x, out, up_bias=up_bias, gate_bias=gate_bias)
        return out

    def _norm(self, norm: Norm, weights: _NormWeights, x: F32) -> F32:
        if norm.kind == "rms_norm":
            y = self._backend.rms_norm(x, weights.weight, norm.eps)
            return y if weights.bias is None else y + weights.bias
        return self._backend.layer_norm(x, weights.weight, weights.bias, norm.eps)

    def _qk_norm(self, weights: _NormWeights, x: F32) -> F32:
        a = self.decoder.attention
        if a.qk_norm is None:
            return x
        if a.qk_norm_over == "projection":
            return self._norm(a.qk_norm, weights, x)
        return self._norm(a.qk_norm, weights, x.reshape(-1, a.head_dim)).reshape(x.shape)

    def _layer_weights(self, info: BundlesInfo) -> _LayerWeights:
        d, r = self.decoder, self._residents
        attention, ffn = f"layers/{info.layer}/attention", f"layers/{info.layer}/ffn"
        return _LayerWeights(
            attention_norm=self._norm_weights(f"{attention}/norm", d.norm),
            q=r.matrix(f"{attention}/q/weight"),
            k=r.matrix(f"{attention}/k/weight"),
            v=r.matrix(f"{attention}/v/weight"),
            output=r.matrix(f"{attention}/output/weight"),
            q_bias=r.vector(f"{attention}/q/bias"),
            k_bias=r.vector(f"{attention}/k/bias"),
            v_bias=r.vector(f"{attention}/v/bias"),
            output_bias=r.vector(f"{attention}/output/bias"),
            q_norm=self._norm_weights(f"{attention}/q_norm", d.attention.qk_norm or d.norm),
            k_norm=self._norm_weights(f"{attention}/k_norm", d.attention.qk_norm or d.norm),
            ffn_norm=self._norm_weights(f"{ffn}/norm", d.norm),
            ffn_shape=FfnShape(
                encoding=info.encoding,
                parts=info.parts,
                d_model=info.d_model,
                part=info.part,
                stride=info.geometry.stride,
                activation=d.ffn.activation,
                up_activation=d.ffn.up_activation,
            ),
            gate_bias=r.vector(f"{ffn}/gate_bias"),
            up_bias=r.vector(f"{ffn}/up_bias"),
            down_bias=r.vector(f"{ffn}/down_bias"),
        )

    def _attention_weights(self, layer: Layer, w: _LayerWeights) -> AttentionWeights:
        d = self.decoder
        a = d.attention
        pairings = {table.name: table.pairing for table in d.rotary}
        return AttentionWeights(
            q=w.q,
            k=w.k,
            v=w.v,
            output=w.output,
            q_bias=w.q_bias,
            k_bias=w.k_bias,
            v_bias=w.v_bias,
            output_bias=w.output_bias,
            q_norm=self._head_norm(w.q_norm, a.n_heads),
            k_norm=self._head_norm(w.k_norm, a.n_kv_heads),
            n_heads=a.n_heads,
            n_kv_heads=a.n_kv_heads,
            head_dim=a.head_dim,
            scale=a.scale,
            window=layer.attention_window_tokens,
            pairing="half" if layer.rotary is None else pairings[layer.rotary],
        )

    def _head_norm(self, weights: _NormWeights, n_heads: int) -> HeadNorm | None:
        a = self.decoder.attention
        if a.qk_norm is None:
            return None
        n_vectors = 1 if a.qk_norm_over == "projection" else n_heads
        return HeadNorm(n_vectors, a.qk_norm.kind == "layer_norm", a.qk_norm.eps, weights.weight, weights.bias)

    def _vector(self, name: str) -> F32:
        vector = self._residents.vector(name)
        if vector is None:
            raise KeyError(name)
        return vector

    def _norm_weights(self, prefix: str, norm: Norm) -> _NormWeights:
        weight = self._residents.vector(f"{prefix}/weight")
        if weight is not None and norm.weight_offset:
            weight = weight + np.float32(norm.weight_offset)
        return _NormWeights(weight, self._residents.vector(f"{prefix}/bias"))
