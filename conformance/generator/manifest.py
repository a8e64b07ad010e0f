"""A manifest with every default filled in, and the arrays it calls for (SPEC.md section "Manifest").

Knows: `manifest_fields.json`. Does not know: bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Json = dict[str, Any]

_FIELDS: dict[str, dict[str, list[Any]]] = json.loads(
    (Path(__file__).parents[1] / "manifest_fields.json").read_text(encoding="ascii")
)
_FLOATS = ("float", "positive", "share")


def completed(value: Any, kind: str = "Manifest") -> Any:
    """The value with all fields of its kind, unknown ones left out."""
    if kind.endswith("?"):
        return None if value is None else completed(value, kind[:-1])
    if kind.startswith("list:"):
        item = kind.split(":", 3)[3]
        return [completed(member, item) for member in value]
    if kind in _FIELDS:
        fields = _FIELDS[kind]
        return {
            name: completed(value[name] if name in value else rest[0], type_) for name, (type_, *rest) in fields.items()
        }
    return float(value) if kind in _FLOATS else value


def with_exact_floats(value: Any) -> Any:
    """The completed manifest with its binary64 numbers as 16 hex digits."""
    if isinstance(value, dict):
        return {key: with_exact_floats(member) for key, member in value.items()}
    if isinstance(value, list):
        return [with_exact_floats(member) for member in value]
    return struct.pack(">d", value).hex() if isinstance(value, float) else value


def parts(decoder: Json) -> tuple[str, ...]:
    """Rows of one bundle."""
    return ("up", "down") if decoder["ffn"]["kind"] == "plain" else ("gate", "up", "down")


def called_for(manifest: Json) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of the float arrays that a completed manifest calls for, bundles excepted."""
    d = manifest["decoder"]
    width, embed = d["d_model"], d["embedding"]["d_embed"]
    yield "embedding/tokens", (d["vocab_size"], embed)
    if d["positions"] is not None:
        yield "embedding/positions", (d["positions"]["n_rows"], width)
    if d["embedding"]["projection"]:
        yield "embedding/projection_in", (width, embed)
        yield "embedding/projection_out", (embed, width)
    if d["embedding_norm"]:
        yield from _norm("embedding/norm", d["norm"], width)
    for table in d["rotary"]:
        yield f"rotary/{table['name']}", (table["n_dims"] // 2,)
    for layer in range(len(d["layers"])):
        yield from _attention(d, f"layers/{layer}/attention")
        yield from _ffn(d, f"layers/{layer}/ffn")
    if d["final_norm"]:
        yield from _norm("final_norm", d["norm"], width)
    if not d["logits"]["tied"]:
        yield "logits/weight", (d["vocab_size"], embed)
    if d["logits"]["bias"]:
        yield "logits/bias", (d["vocab_size"],)
    for predictor in manifest["predictors"]:
        yield from _predictor(d, predictor, f"layers/{predictor['layer']}/predictor")
    if manifest["statistics"] is not None:
        for layer in range(len(d["layers"])):
            yield f"layers/{layer}/statistics/firing_frequency", (d["ffn"]["d_ff"],)
            yield f"layers/{layer}/statistics/aggregated_window", (manifest["statistics"]["window_tokens"],)


def _norm(prefix: str, norm: Json, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    if norm["weight"]:
        yield f"{prefix}/weight", (width,)
    if norm["bias"]:
        yield f"{prefix}/bias", (width,)


def _attention(d: Json, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    a = d["attention"]
    q, kv = a["n_heads"] * a["head_dim"], a["n_kv_heads"] * a["head_dim"]
    yield from _norm(f"{prefix}/norm", d["norm"], d["d_model"])
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        yield f"{prefix}/{name}/weight", (rows, d["d_model"])
        if a["qkv_bias"]:
            yield f"{prefix}/{name}/bias", (rows,)
    yield f"{prefix}/output/weight", (d["d_model"], q)
    if a["output_bias"]:
        yield f"{prefix}/output/bias", (d["d_model"],)
    if a["qk_norm"] is not None:
        for name, rows in (("q_norm", q), ("k_norm", kv)):
            yield from _norm(f"{prefix}/{name}", a["qk_norm"], a["head_dim"] if a["qk_norm_over"] == "head" else rows)


def _ffn(d: Json, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    f = d["ffn"]
    if not (d["block"]["order"] == "parallel" and d["block"]["shared_norm"]):
        yield from _norm(f"{prefix}/norm", d["norm"], d["d_model"])
    for name, width in (("gate_bias", f["d_ff"]), ("up_bias", f["d_ff"]), ("down_bias", d["d_model"])):
        if f[name]:
            yield f"{prefix}/{name}", (width,)


def _predictor(d: Json, predictor: Json, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    if predictor["kind"] == "low_bit_gate":
        yield f"{prefix}/gate", (d["ffn"]["d_ff"], d["d_model"])
        return
    yield f"{prefix}/down", (predictor["rank"], d["d_model"])
    yield f"{prefix}/up", (d["ffn"]["d_ff"], predictor["rank"])
    if predictor["bias"]:
        yield f"{prefix}/bias", (d["ffn"]["d_ff"],)
