"""Damage to bytes, numbers and parsed JSON, and the values that hurt: what knows nothing of the format's structure.

Knows: limits of integers and floats, odd JSON, names and words that the format uses. Does not know: containers.
"""

from __future__ import annotations

import copy
import random
from typing import Any

INTEGERS = [0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 512, 4096, 16384, 32768, 65535, 65536]
INTEGERS += [(1 << n) + k for n in (20, 24, 28, 30, 31, 32, 33, 40, 48, 53, 62, 63, 64) for k in (-1, 0, 1)]
VALUES: list[Any] = [
    None, True, False, -1, -(1 << 63), 0.0, -0.0, 1.0, 0.5, -1.5, 1e308, 5e-324, 1e39, 3.0, "", "0", "1.0", "2.0",
    "zarr.json", "..", "/", "\x00", "\x1b[2J", "é", "\U0001f600", "x" * 300, [], {}, [[]], [{}], {"": None}, [0] * 9,
    "f32", "f16", "bf16", "q8", "q4", "u8", "u32", "float32", "uint8", "bytes", "zstd", "blosc", "sharding_indexed",
    "crc32c", "start", "end", "big", "little", "tensor", "file", "bundles", "group", "array", "00000000", "f" * 64,
    "low_rank", "low_bit_gate", "gated", "plain", "parallel", "layer_norm", "moe", ["gate", "up", "down"], ["moe"],
]  # fmt: skip
PLAUSIBLE: dict[str, list[Any]] = {
    "version": ["1.1", "1.9999", "2.0", "0.9", "01.0"],
    "required_features": [[], ["moe"], [None]],
    "kind": ["plain", "gated", "relu", "layer_norm", "rms_norm", "low_rank", "low_bit_gate", "tensor", "file"],
    "activation": [{"kind": "fatrelu", "threshold": 0.1}, {"kind": "relu"}],
    "layers": [[{}], [{}] * 3, [{}] * 10_000, [{"rotary": "main", "attention_window_tokens": 1}]],
    "layer": [0, 1, 2],
    "rank": [None, 1, 4, 8],
    "threshold": [0, 1, -1, 2],
    "bias": [True, False],
    "up_bias": [True, False],
    "tied": [True, False],
    "embedding": [{"d_embed": 32, "projection": True}, {"d_embed": 32}, {"d_embed": 64, "projection": True}],
    "norm": [{"kind": "layer_norm", "eps": 1e-5, "bias": True}, {"kind": "rms_norm", "eps": 1, "weight": False}],
    "ffn": [{"kind": "plain", "d_ff": 6, "activation": {"kind": "relu"}, "gate_bias": True}],
    "logits": [{"tied": True, "bias": True}, {"tied": False}],
    "context_tokens": [1, 1 << 31],
    "provenance": [{"writer": "", "source": "", "source_format": "gguf"}],
    "encoding": ["f32", "f16", "bf16", "q8", "q4", "u8", "u32"],
    "alignment": [64, 128, 512, 4096, 32768, 96],
    "stride": [384, 512, 1024, 448, 1 << 25],
    "filename": ["..", "a/b", "a\\b", "x.json", "\x7f"],
    "data_type": ["uint8", "uint16", "uint32", "float16", "float32", "float64", "r8"],
    "codecs": [[{"name": "bytes"}], [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd"}]],
    "dimension_names": [["a"], [None, None], None],
    "fill_value": [0.0, -0.0, 1, "NaN"],
    "optional_features": [["a"] * 64],
    "positions": [{"n_rows": 4}],
    "statistics": [None, {"n_tokens": 1, "text": "", "window_tokens": 5}],
    "predictors": [[], [{"layer": 0, "kind": "low_bit_gate", "tap": {"layer": 0}, "threshold": 0.5}]],
    "block": [{"order": "parallel", "shared_norm": True}, {"shared_norm": True}],
}
SNIPPETS = [
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 400, "1" * 21, "18446744073709551616", "1.0", "1e0", "-0",
    "0x10", "01", "+1", ".5", "1.", "null", "true", "[]", "{}", '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\n"',
    '"', "\\", "[" * 40 + "]" * 40, '{"a":' * 40 + "1" + "}" * 40, "/**/", ",", ":", "\ufeff", "\x00", "'a'", "\u2028",
    '{"a":1,"a":2}', '{"a":1,"\\u0061":2}', '"metadata_crc32c":"00000000"',
]  # fmt: skip


def damage(rng: random.Random, raw: bytes) -> bytes:
    """A copy with bytes changed, cut, repeated or inserted."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(out) + 1)
        change = rng.randrange(7)
        if change == 0:
            del out[at : at + rng.choice((1, 2, 16, 1 << 20))]
        elif change == 1:
            out[at:at] = rng.randbytes(rng.choice((1, 2, 16)))
        elif change == 2:
            out[at:at] = out[at : at + rng.choice((1, 16, 64))]
        elif at < len(out):
            out[at] = rng.choice((out[at] ^ 1 << rng.randrange(8), 0, 255, rng.randrange(256)))
    return bytes(out)


def change_tree(rng: random.Random, document: dict[str, Any]) -> None:
    """Change one place of parsed JSON."""
    places = [(holder, key) for holder in _containers(document) for key in _keys(holder)]
    if not places:
        return
    holder, key = rng.choice(places)
    old = holder[key]
    change = rng.randrange(10)
    if rng.random() < 0.1 and isinstance(holder, dict):
        absent = rng.choice(sorted(PLAUSIBLE))
        holder[absent] = copy.deepcopy(rng.choice(PLAUSIBLE[absent]))
    elif key in PLAUSIBLE and rng.random() < 0.4:
        holder[key] = copy.deepcopy(rng.choice(PLAUSIBLE[key]))
    elif change <= 2 and isinstance(old, int):
        holder[key] = integer(rng, old)
    elif change <= 4:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    elif change == 5:
        other, other_key = rng.choice(places)
        holder[key] = copy.deepcopy(other[other_key])
    elif change == 6:
        del holder[key]
    elif change == 7 and isinstance(holder, list):
        holder[key:key] = [copy.deepcopy(old)] * rng.choice((1, 2, 9, 100))
    elif change == 8 and isinstance(holder, dict):
        holder[rng.choice(("", "x", "flashfmt", "shape", "é", str(key) + "_"))] = copy.deepcopy(old)
    else:
        holder[key] = rng.choice(INTEGERS)


def integer(rng: random.Random, old: int) -> int:
    """A number near another one, or at a limit."""
    near = (old - 1, old + 1, 2 * old, old // 2, old + 64, -old, old ^ (1 << rng.randrange(63)))
    return rng.choice(near) if rng.random() < 0.5 else rng.choice(INTEGERS)


def _containers(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [value, *(c for member in value.values() for c in _containers(member))]
    if isinstance(value, list):
        return [value, *(c for member in value for c in _containers(member))]
    return []


def _keys(holder: Any) -> list[Any]:
    return list(holder) if isinstance(holder, dict) else list(range(len(holder)))
