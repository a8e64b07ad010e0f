"""The decoder of SPEC.md in float64, one position at a time: the source of expected logits.

Written for reading, not for speed. Knows: a completed manifest and decoded weights. Does not know: files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from generator.encodings import F64

Json = Mapping[str, Any]

ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
}


def activate(activation: Json, x: F64) -> F64:
    """Elementwise function of the FFN."""
    if activation["kind"] == "fatrelu":
        return np.where(x > activation["threshold"], x, 0.0)
    function = ACTIVATIONS[activation["kind"]]
    return np.array([function(float(value)) for value in x])


class Decoder:
    """One sequence. `manifest` has every field; `weights` are float64 by array name, bundles as [n, parts, d]."""

    def __init__(self, manifest: Json, weights: Mapping[str, F64]) -> None:
        self.d = manifest["decoder"]
        self.w = weights
        self.keys: list[list[F64]] = [[] for _ in self.d["layers"]]
        self.values: list[list[F64]] = [[] for _ in self.d["layers"]]
        self.taps: dict[tuple[int, str], list[F64]] = {}

    def logits(self, tokens: list[int]) -> F64:
        """Logits behind every token, [n_tokens, vocab_size]."""
        return np.stack([self._step(position, token) for position, token in enumerate(tokens)])

    def _step(self, position: int, token: int) -> F64:
        d, w = self.d, self.w
        x = w["embedding/tokens"][token] * d["embedding"]["scale"]
        if d["embedding"]["projection"]:
            x = w["embedding/projection_in"] @ x
        if d["positions"] is not None:
            x = x + w["embedding/positions"][position + d["positions"]["offset"]]
        if d["embedding_norm"]:
            x = self._norm(d["norm"], "embedding/norm", x)
        for layer in range(len(d["layers"])):
            x = self._layer(layer, position, x)
        if d["final_norm"]:
            x = self._norm(d["norm"], "final_norm", x)
        if d["embedding"]["projection"]:
            x = w["embedding/projection_out"] @ x
        y = w["embedding/tokens" if d["logits"]["tied"] else "logits/weight"] @ x
        if d["logits"]["bias"]:
            y = y + w["logits/bias"]
        y = y * d["logits"]["scale"]
        cap = d["logits"]["softcap"]
        return y if cap is None else cap * np.tanh(y / cap)

    def _layer(self, layer: int, position: int, x: F64) -> F64:
        norm, order = self.d["norm"], self.d["block"]["order"]
        attention, ffn = f"layers/{layer}/attention/norm", f"layers/{layer}/ffn/norm"
        if order == "pre_norm":
            x = x + self._attention(layer, position, self._norm(norm, attention, x))
            return x + self._ffn(layer, self._norm(norm, ffn, x))
        if order == "post_norm":
            x = self._norm(norm, attention, x + self._attention(layer, position, x))
            return self._norm(norm, ffn, x + self._ffn(layer, x))
        h = self._norm(norm, attention, x)
        g = h if self.d["block"]["shared_norm"] else self._norm(norm, ffn, x)
        return x + self._attention(layer, position, h) + self._ffn(layer, g)

    def _attention(self, layer: int, position: int, x: F64) -> F64:
        a, prefix = self.d["attention"], f"layers/{layer}/attention"
        q, k, v = (self._linear(f"{prefix}/{name}", x) for name in "qkv")
        q, k = self._qk_norm(f"{prefix}/q_norm", q), self._qk_norm(f"{prefix}/k_norm", k)
        q, k, v = (y.reshape(-1, a["head_dim"]) for y in (q, k, v))  # (heads, head_dim)
        q, k = self._rotate(layer, position, q), self._rotate(layer, position, k)
        self.keys[layer].append(k)
        self.values[layer].append(v)
        window = self.d["layers"][layer]["attention_window_tokens"]
        first = 0 if window is None else max(0, position + 1 - window)
        heads = []
        for head in range(a["n_heads"]):
            shared = head * a["n_kv_heads"] // a["n_heads"]
            scores = np.array([q[head] @ key[shared] for key in self.keys[layer][first:]]) * a["scale"]
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            heads.append(sum(p * value[shared] for p, value in zip(weights, self.values[layer][first:], strict=True)))
        return self._linear(f"{prefix}/output", np.concatenate(heads))

    def _rotate(self, layer: int, position: int, x: F64) -> F64:
        name = self.d["layers"][layer]["rotary"]
        if name is None:
            return x
        table = next(table for table in self.d["rotary"] if table["name"] == name)
        n_pairs = table["n_dims"] // 2
        out = x.copy()
        for i, frequency in enumerate(self.w[f"rotary/{name}"]):
            a, b = (i, i + n_pairs) if table["pairing"] == "half" else (2 * i, 2 * i + 1)
            cos = math.cos(position * frequency) * table["attention_factor"]
            sin = math.sin(position * frequency) * table["attention_factor"]
            out[:, a] = x[:, a] * cos - x[:, b] * sin
            out[:, b] = x[:, b] * cos + x[:, a] * sin
        return out

    def _ffn(self, layer: int, x: F64) -> F64:
        f, prefix = self.d["ffn"], f"layers/{layer}/ffn"
        self.taps.setdefault((layer, "ffn_input"), []).append(x)
        bundles = self.w[f"{prefix}/bundles"]
        up = bundles[:, -2] @ x
        if f["up_bias"]:
            up = up + self.w[f"{prefix}/up_bias"]
        if f["kind"] == "plain":
            h = activate(f["activation"], up)
        else:
            gate = bundles[:, 0] @ x
            if f["gate_bias"]:
                gate = gate + self.w[f"{prefix}/gate_bias"]
            h = activate(f["activation"], gate) * activate(f["up_activation"], up)
        y = h @ bundles[:, -1]
        return y + self.w[f"{prefix}/down_bias"] if f["down_bias"] else y

    def _linear(self, name: str, x: F64) -> F64:
        y = self.w[f"{name}/weight"] @ x
        bias = self.w.get(f"{name}/bias")
        return y if bias is None else y + bias

    def _qk_norm(self, name: str, x: F64) -> F64:
        a = self.d["attention"]
        if a["qk_norm"] is None:
            return x
        if a["qk_norm_over"] == "projection":
            return self._norm(a["qk_norm"], name, x)
        return np.concatenate([self._norm(a["qk_norm"], name, head) for head in x.reshape(-1, a["head_dim"])])

    def _norm(self, norm: Json, name: str, x: F64) -> F64:
        if norm["kind"] == "layer_norm":
            x = x - x.mean()
        y = x / np.sqrt(np.mean(x * x) + norm["eps"])
        if norm["weight"]:
            y = y * (self.w[f"{name}/weight"] + norm["weight_offset"])
        return y + self.w[f"{name}/bias"] if norm["bias"] else y
