"""A decoder built from the manifest's description alone (SPEC.md section "The decoder").

Knows the order of the arithmetic. Does not know where weights come from, how fast, or what computes them: tensors
are handed in by a `TensorSource`, bundles block by block by a `BundleSource`, arithmetic by a `Backend`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashfmt import BundlesInfo
from flashfmt.manifest import Decoder, Norm
from reference_engine.backends import (
    AttentionWeights,
    Backend,
    FfnShape,
    LayerRotation,
    LayerWeights,
    NormWeights,
    Step,
    TokenPass,
)
from reference_engine.kv_cache import KvCache
from reference_engine.models.weights import BundleSource, Table, TapPoint, TensorSource

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines of the positions of one forward pass, [n_tokens, n_dims / 2]."""

    cos: F32
    sin: F32


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
        self._frequencies = {table.name: self._vector(f"rotary/{table.name}") for table in decoder.rotary}
        self._layers = [self._layer_weights(info) for info in layers]
        self._token_pass = backend.bind_layers(self._layers)
        self._final_norm = self._norm_weights("final_norm", decoder.norm)
        self._embedding_norm = self._norm_weights("embedding/norm", decoder.norm)

    def forward(self, token_ids: npt.NDArray[np.int64], kv_cache: KvCache) -> F32:
        """Hidden states [n_tokens, d_model] of new tokens behind those in `kv_cache`, which takes them up."""
        n_past = kv_cache.n_tokens
        positions = np.arange(n_past, n_past + len(token_ids))
        x = self._embed(token_ids, positions)  # (n_tokens, d_model)
        rotations = self._rotations(positions)
        if len(token_ids) == 1 and self._token_pass is not None:
            x = self._pass_token(self._token_pass, x, kv_cache, rotations)
        else:
            for index in range(len(self._layers)):
                x = self._layer(index, x, kv_cache, rotations)
        kv_cache.advance(len(token_ids))
        return x

    def logits(self, hidden: F32) -> F32:
        """float32 [n_tokens, vocab_size] from hidden states [n_tokens, d_model]."""
        d, r = self.decoder, self._residents
        x = self._norm(self._final_norm, hidden) if d.final_norm else hidden
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
            x = self._norm(self._embedding_norm, x)
        return x

    def _rotations(self, positions: npt.NDArray[np.int64]) -> list[Rotation]:
        """Of each table of the decoder."""
        rotations = []
        for table in self.decoder.rotary:
            angles = positions.astype(np.float32)[:, None] * self._frequencies[table.name]
            factor = np.float32(table.attention_factor)
            rotations.append(Rotation(np.cos(angles) * factor, np.sin(angles) * factor))
        return rotations

    def _pass_token(self, token: TokenPass, x: F32, kv_cache: KvCache, rotations: list[Rotation]) -> F32:
        """What `_layer` does, for one token and all layers, in as few calls as the source of bundles allows."""
        bundles = self._bundles
        token.begin(x, [(r.cos, r.sin) for r in rotations], *kv_cache.layers(), n_past=kv_cache.n_tokens)
        for index in range(len(self._layers)):
            taps = bundles.taps(index)
            if "attention_input" in taps:
                token.advance(index, Step.ATTENTION_INPUT)
                bundles.tap(index, "attention_input", token.attention_input)
            if token.computes_ffn(index) and not taps:
                continue
            if bundles.reads_ahead:
                token.advance(index, Step.PROJECTIONS)
                bundles.carry_on()
            token.advance(index, Step.FFN_INPUT)
            if "attention_output" in taps:
                bundles.tap(index, "attention_output", token.attention_output)
            if "ffn_input" in taps:
                bundles.tap(index, "ffn_input", token.ffn_input)
            if not token.computes_ffn(index):
                self._add_ffn(index, token.ffn_input, token.ffn_output)
        token.advance(len(self._layers) - 1, Step.LAYER_OUTPUT)
        return token.hidden.copy()

    def _layer(self, index: int, x: F32, kv_cache: KvCache, rotations: list[Rotation]) -> F32:
        w = self._layers[index]
        match w.order:
            case "pre_norm":
                x = x + self._attention(index, self._norm(w.attention_norm, x), kv_cache, rotations)
                return x + self._feed_forward(index, self._norm(w.ffn_norm or w.attention_norm, x))
            case "post_norm":
                x = self._norm(w.attention_norm, x + self._attention(index, x, kv_cache, rotations))
                return self._norm(w.ffn_norm or w.attention_norm, x + self._feed_forward(index, x))
            case "parallel":
                h = self._norm(w.attention_norm, x)
                g = h if w.ffn_norm is None else self._norm(w.ffn_norm, x)
                return x + self._attention(index, h, kv_cache, rotations) + self._feed_forward(index, g)

    def _attention(self, index: int, x: F32, kv_cache: KvCache, rotations: list[Rotation]) -> F32:
        w, b = self._layers[index].attention, self._backend
        n_tokens = len(x)
        self._tap(index, "attention_input", x)
        q = b.matmul(w.q, x, bias=w.q_bias)  # (n_tokens, n_heads * head_dim)
        k = b.matmul(w.k, x, bias=w.k_bias)
        v = b.matmul(w.v, x, bias=w.v_bias)
        q, k = self._qk_norm(w, w.q_norm, q), self._qk_norm(w, w.k_norm, k)
        q = q.reshape(n_tokens, w.n_heads, w.head_dim)
        k = k.reshape(n_tokens, w.n_kv_heads, w.head_dim)
        if w.rotation is not None:
            rotation = rotations[w.rotation.table]
            b.rotate(q, rotation.cos, rotation.sin, w.rotation.pairing)
            b.rotate(k, rotation.cos, rotation.sin, w.rotation.pairing)
        kv_cache.append(index, k, v.reshape(n_tokens, w.n_kv_heads, w.head_dim))
        keys, values = kv_cache.layer(index)
        mixed = b.attend(
            q, keys, values, n_past=kv_cache.n_tokens, scale=w.scale, window=w.window
        )  # (n_tokens, n_heads, head_dim)
        out = b.matmul(w.output, mixed.reshape(n_tokens, w.n_heads * w.head_dim), bias=w.output_bias)
        self._tap(index, "attention_output", out)
        return out

    def _feed_forward(self, index: int, x: F32) -> F32:
        down_bias = self._layers[index].down_bias
        out = np.zeros_like(x) if down_bias is None else np.tile(down_bias, (len(x), 1))
        self._tap(index, "ffn_input", x)
        self._add_ffn(index, x, out)
        return out

    def _add_ffn(self, index: int, x: F32, out: F32) -> None:
        w = self._layers[index]
        for block in self._bundles.blocks(index, x):
            up_bias = None if w.up_bias is None else w.up_bias[block.neurons]
            gate_bias = None if w.gate_bias is None else w.gate_bias[block.neurons]
            self._backend.ffn(w.ffn, block.rows, block.slots, x, out, up_bias=up_bias, gate_bias=gate_bias)

    def _tap(self, index: int, point: TapPoint, x: F32) -> None:
        if point in self._bundles.taps(index):
            self._bundles.tap(index, point, x)

    def _norm(self, w: NormWeights, x: F32) -> F32:
        if w.centred:
            return self._backend.layer_norm(x, w.weight, w.bias, w.eps)
        y = self._backend.rms_norm(x, w.weight, w.eps)
        return y if w.bias is None else y + w.bias

    def _qk_norm(self, w: AttentionWeights, norm: NormWeights | None, x: F32) -> F32:
        if norm is None:
            return x
        return self._norm(norm, x.reshape(-1, w.head_dim)).reshape(x.shape) if w.norm_each_head else self._norm(norm, x)

    def _layer_weights(self, info: BundlesInfo) -> LayerWeights:
        d, r = self.decoder, self._residents
        ffn = f"layers/{info.layer}/ffn"
        is_shared = d.block.order == "parallel" and d.block.shared_norm
        return LayerWeights(
            order=d.block.order,
            attention_norm=self._norm_weights(f"layers/{info.layer}/attention/norm", d.norm),
            attention=self._attention_weights(info.layer),
            ffn_norm=None if is_shared else self._norm_weights(f"{ffn}/norm", d.norm),
            ffn=FfnShape(
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
            bundles=self._bundles.whole(info.layer),
        )

    def _attention_weights(self, layer: int) -> AttentionWeights:
        a, r, prefix = self.decoder.attention, self._residents, f"layers/{layer}/attention"
        norms = {}
        for name in ("q", "k"):
            norms[name] = None if a.qk_norm is None else self._norm_weights(f"{prefix}/{name}_norm", a.qk_norm)
        return AttentionWeights(
            q=r.matrix(f"{prefix}/q/weight"),
            k=r.matrix(f"{prefix}/k/weight"),
            v=r.matrix(f"{prefix}/v/weight"),
            output=r.matrix(f"{prefix}/output/weight"),
            q_bias=r.vector(f"{prefix}/q/bias"),
            k_bias=r.vector(f"{prefix}/k/bias"),
            v_bias=r.vector(f"{prefix}/v/bias"),
            output_bias=r.vector(f"{prefix}/output/bias"),
            q_norm=norms["q"],
            k_norm=norms["k"],
            norm_each_head=a.qk_norm_over != "projection",
            n_heads=a.n_heads,
            n_kv_heads=a.n_kv_heads,
            head_dim=a.head_dim,
            scale=a.scale,
            window=self.decoder.layers[layer].attention_window_tokens,
            rotation=self._rotation_of(self.decoder.layers[layer].rotary),
        )

    def _rotation_of(self, name: str | None) -> LayerRotation | None:
        for place, table in enumerate(self.decoder.rotary):
            if table.name == name:
                return LayerRotation(place, len(self._frequencies[table.name]), table.pairing)
        return None

    def _vector(self, name: str) -> F32:
        vector = self._residents.vector(name)
        if vector is None:
            raise KeyError(name)
        return vector

    def _norm_weights(self, prefix: str, norm: Norm) -> NormWeights:
        weight = self._residents.vector(f"{prefix}/weight")
        if weight is not None and norm.weight_offset:
            weight = weight + np.float32(norm.weight_offset)
        return NormWeights(norm.kind == "layer_norm", norm.eps, weight, self._residents.vector(f"{prefix}/bias"))
