"""The valid models: together they use every field of the manifest, every encoding and both containers.

Knows: which models there are. Does not know: how they become bytes.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from generator.encodings import pack_q4, pack_q8, uniform
from generator.hierarchy import BLOSC, ZSTD, Hierarchy
from generator.model import Model, Recipe, random_bytes

Json = dict[str, Any]

NORM = {"kind": "layer_norm", "eps": 1e-5, "bias": True}
RMS = {"kind": "rms_norm", "eps": 1e-6}
RELU = {"kind": "relu"}
SILU = {"kind": "silu"}

# float32 [64, 8], value k being k % 37 / 8: a Zstandard frame with compressed blocks, and a Blosc buffer (lz4, shuffle).
RAMP = (np.arange(512) % 37 / 8).astype("<f4").reshape(64, 8)
RAMP_ZSTD = base64.b64decode(
    "KLUv/WAAB+0CAALJExuwaRkDTG1Ax14ID5JwGYpYHcQoZCMOVWUSkafnPMdrPMZr3uIpXuIxD/EOz/D2Co/wBk95ghd4gHdNlmRF1rMg67Gc1SxmbSnry/PSvBwDAGJfzAcOgLIFWA=="
)
RAMP_BLOSC = base64.b64decode(
    "AgEhBAAIAAAACAAAiQAAABQAAAAMAAAAHwABAP/oUAAAAAAADAAAAB8AAQD/6FAAAAAAADEAAAD/FgAAgMAAIEBggJCgsMDQ4PAACBAYICgwOEBIUFhgaHB4gISIjJAlAP/EUFBYYGhwHAAAAJMAPj4+Pz8/Pz8FAB9AAQABDyUA/8RQQEBAQEA="
)


def manifest(name: str, decoder: Json, **rest: Any) -> Json:
    """A manifest with the fields that differ from their defaults."""
    provenance = {"writer": "conformance", "source": name, "source_format": "synthetic"}
    return {
        "version": "1.0",
        "metadata_crc32c": "00000000",
        "name": name,
        "decoder": decoder,
        "provenance": provenance,
    } | rest


def decoder(d_model: int = 16, d_ff: int = 12, n_layers: int = 2, **fields: Any) -> Json:
    """A decoder: Llama's shape unless `fields` say otherwise."""
    heads = fields.pop("heads", (2, 2, d_model // 2))
    attention = {"n_heads": heads[0], "n_kv_heads": heads[1], "head_dim": heads[2], "scale": heads[2] ** -0.5}
    ffn = {"kind": "gated", "d_ff": d_ff, "activation": SILU} | fields.pop("ffn", {})
    return {
        "vocab_size": 24,
        "d_model": d_model,
        "context_tokens": 32,
        "embedding": {"d_embed": d_model},
        "norm": RMS,
        "attention": attention | fields.pop("attention", {}),
        "ffn": ffn,
        "logits": {"tied": False},
        "layers": [{}] * n_layers,
    } | fields


def rotary(n_dims: int, **fields: Any) -> Json:
    """The rotary table `main`."""
    return {"name": "main", "n_dims": n_dims} | fields


def minimal(container: str = "file", alignment: int = 128) -> Recipe:
    """The least a model can hold: one layer, no norms, tied embeddings."""
    bare = {"kind": "rms_norm", "eps": 1e-6, "weight": False}
    description = decoder(
        d_ff=6, n_layers=1, norm=bare, ffn={"kind": "plain", "activation": RELU}, logits={"tied": True}, vocab_size=8
    )
    name = "minimal" if container == "file" else "minimal-directory"
    return Recipe(name, manifest("minimal", description), "f16", "f16", alignment, container)


def recipes() -> list[Recipe]:
    """Every valid model."""
    return [
        minimal(),
        minimal("directory"),
        _plain_learned(),
        _post_norm_projection(),
        _parallel_shared(),
        _parallel_interleaved(),
        _gated_q8(),
        _gated_q4(),
        _windows_softcap(),
        _qk_norm_projection(),
        _compressed(),
        rich(),
        _every_encoding(),
        _wide_alignment(),
        _liberties(),
    ]


def _plain_learned() -> Recipe:
    d = decoder(
        positions={"n_rows": 34, "offset": 2},
        norm=NORM,
        attention={"qkv_bias": True, "output_bias": True},
        ffn={"kind": "plain", "activation": RELU, "up_bias": True, "down_bias": True},
        logits={"tied": True},
    )
    return Recipe("pre-norm-plain-f16", manifest("OPT's shape", d), "f16", "f16", 512)


def _post_norm_projection() -> Recipe:
    d = decoder(
        embedding={"d_embed": 8, "projection": True},
        positions={"n_rows": 32},
        norm=NORM,
        final_norm=False,
        block={"order": "post_norm"},
        attention={"qkv_bias": True, "output_bias": True},
        ffn={"kind": "plain", "activation": {"kind": "relu2"}, "up_bias": True, "down_bias": True},
        logits={"tied": True},
    )
    return Recipe("post-norm-projection-bf16", manifest("OPT-350m's shape", d), "bf16", "bf16")


def _parallel_shared() -> Recipe:
    d = decoder(
        heads=(4, 1, 8),
        norm=NORM,
        rotary=[rotary(8)],
        block={"order": "parallel", "shared_norm": True},
        ffn={"kind": "plain", "activation": {"kind": "gelu"}},
        logits={"tied": True},
        layers=[{"rotary": "main"}] * 2,
    )
    return Recipe("parallel-shared-norm-f16", manifest("Falcon's shape", d), "f16", "f16", 64, "directory")


def _parallel_interleaved() -> Recipe:
    d = decoder(
        norm=NORM,
        rotary=[rotary(4, pairing="interleaved", attention_factor=1.25)],
        block={"order": "parallel"},
        ffn={"kind": "plain", "activation": {"kind": "gelu_tanh"}, "up_bias": True, "down_bias": True},
        logits={"tied": False, "bias": True, "scale": 0.5},
        layers=[{"rotary": "main"}] * 2,
    )
    return Recipe("parallel-two-norms-f32", manifest("GPT-J's shape", d), "f32", "f32")


def _gated_q8() -> Recipe:
    d = decoder(
        64, 16, heads=(8, 2, 8), rotary=[rotary(8)], layers=[{"rotary": "main"}, {}], attention={"qkv_bias": True}
    )
    return Recipe("gated-grouped-q8", manifest("Llama's shape, q8", d), "q8", "q8", 256)


def _gated_q4() -> Recipe:
    d = decoder(
        128,
        10,
        heads=(4, 2, 32),
        rotary=[rotary(32)],
        layers=[{"rotary": "main"}],
        ffn={"gate_bias": True, "up_bias": True, "activation": {"kind": "fatrelu", "threshold": 0.05}},
    )
    return Recipe("gated-fatrelu-q4", manifest("Llama's shape, q4", d), "q4", "q4", 512)


def _windows_softcap() -> Recipe:
    head_norm = {"kind": "rms_norm", "eps": 1e-6, "weight_offset": 1}
    d = decoder(
        embedding={"d_embed": 16, "scale": 4},
        heads=(4, 2, 6),
        norm={"kind": "rms_norm", "eps": 1e-6, "weight_offset": 1},
        rotary=[rotary(6), {"name": "local", "n_dims": 4}],
        attention={"qk_norm": head_norm, "scale": 0.3},
        ffn={"activation": {"kind": "gelu_tanh"}},
        logits={"tied": True, "softcap": 2.5},
        layers=[{"rotary": "local", "attention_window_tokens": 3}, {"rotary": "main"}, {"attention_window_tokens": 1}],
    )
    return Recipe("windows-softcap-f16", manifest("Gemma's shape", d), "f16", "f32")


def _qk_norm_projection() -> Recipe:
    d = decoder(
        rotary=[rotary(8)],
        attention={"qk_norm": {"kind": "layer_norm", "eps": 1e-5, "bias": True}, "qk_norm_over": "projection"},
        ffn={"activation": {"kind": "quick_gelu"}, "up_activation": RELU, "down_bias": True},
        embedding_norm=True,
        layers=[{"rotary": "main"}] * 2,
    )
    return Recipe("qk-norm-projection-f32", manifest("qk_norm over projections", d), "f32", "bf16", 64, "directory")


def _compressed() -> Recipe:
    d = decoder(8, 64, n_layers=1, vocab_size=64, heads=(2, 2, 4), ffn={"kind": "plain", "activation": RELU})
    compressed = {
        "embedding/tokens": (ZSTD, RAMP, RAMP_ZSTD),
        "logits/weight": (BLOSC, RAMP, RAMP_BLOSC),
        "extensions/raw_blocks": (ZSTD, RAMP, raw_zstd_frame(RAMP.tobytes())),
    }
    return Recipe("compressed-tensors", manifest("compressed", d), "f32", "f32", compressed=compressed)


def rich(container: str = "file") -> Recipe:
    """Predictors, statistics, embedded files, extensions, fields and features that a reader does not know."""
    measured = {"recall": 0.99, "precision": 0.5, "predicted_fraction": 0.25, "n_tokens": 1000, "text": "a text"}
    predictors = [
        {
            "layer": 0,
            "kind": "low_rank",
            "tap": {"layer": 0},
            "threshold": 0.5,
            "rank": 4,
            "bias": True,
            "measured": measured,
        },
        {
            "layer": 2,
            "kind": "low_bit_gate",
            "tap": {"layer": 2},
            "threshold": 0.25,
            "measured": measured | {"perplexity_ratio": 1.0078125},
        },
        {
            "layer": 1,
            "kind": "low_rank",
            "tap": {"layer": 0, "point": "attention_output"},
            "threshold": 0.625,
            "rank": 3,
        },
        {"layer": 3, "kind": "low_bit_gate", "tap": {"layer": 2}, "threshold": 1, "signed": False},
    ]
    d = decoder(
        64, 16, 4, heads=(4, 2, 16), ffn={"kind": "plain", "activation": RELU, "up_bias": True}, logits={"tied": True}
    )
    m = manifest(
        'everything \u00e9\U0001f4be"\\/\b\f\n\r\t',
        d,
        predictors=predictors,
        statistics={"n_tokens": 4096, "text": "a text", "window_tokens": 5},
        tokens={"bos": 1, "eos": [2, 23], "add_bos": True},
        required_features=[],
        optional_features=["of_the_future"],
        field_of_a_later_minor_version={"metadata": [None, True, False, 1e300, -0.0, 1e-7, ""]},
    )
    m["version"] = "1.7"
    m["provenance"] |= {"source_sha256": "0123456789abcdef" * 4, "architecture": "OPT", "licence": "Apache-2.0"}
    files = {
        "tokenizer": ("tokenizer.json", b'{"not":"parsed","at":"all"}'),
        "chat_template": ("chat template.jinja", "{{ messages }}\u00e9\n".encode()),
        "config": ("config.json", b"{}"),
    }
    extensions = {"extensions/vendor/notes": ("u8", (3,), np.array([1, 2, 255], np.uint8))}
    encodings = {"layers/2/predictor/gate": "q4", "layers/3/predictor/gate": "q8", "layers/0/predictor/up": "f32"}
    return Recipe("predictors-files-extensions", m, "q8", "f16", 64, container, files, extensions, encodings=encodings)


def _every_encoding() -> Recipe:
    base = minimal()
    specials = np.array([0.0, -0.0, 1.0, -1.5, 6.1e-5, 5.96e-8, 65504.0, -65504.0], np.float16)
    tiny = np.array([0.0, -0.0, 1e-45, -1.17e-38, 3.4028235e38, -3.4028235e38, 1.0, 0.1], np.float32)
    bits = np.array([0x0000, 0x8000, 0x0001, 0x3F80, 0x7F7F, 0xFF7F, 0x0080, 0x3DCD], "<u2")
    q8 = b"".join(
        pack_q8(scale, random_bytes(f"q8 {scale}", 128).view(np.int8)) for scale in (0.013, -3.0, 1e-40, 0.0, 2.0**120)
    )
    halves = [uniform(f"q4 scales {row}", (4,), 8.0).astype(np.float16) for row in range(3)]
    halves.append(np.array([6e-8, -0.0, 65504.0, -65504.0], np.float16))
    q4 = b"".join(pack_q4(half, random_bytes(f"q4 {row}", 128) & 15) for row, half in enumerate(halves))
    base.name = "every-encoding"
    base.extensions = {
        "extensions/f32": ("f32", (2, 2, 2), tiny.reshape(2, 2, 2)),
        "extensions/f16": ("f16", (8,), specials),
        "extensions/bf16": ("bf16", (4, 2), bits.reshape(4, 2)),
        "extensions/q8": ("q8", (5, 128), np.frombuffer(q8, np.uint8).reshape(5, -1)),
        "extensions/q4": ("q4", (4, 128), np.frombuffer(q4, np.uint8).reshape(4, -1)),
        "extensions/u32": ("u32", (3,), np.array([0, 1, 0xFFFFFFFF], "<u4")),
        "extensions/u8": (
            "u8",
            (1, 1, 1, 1, 1, 1, 2, 2),
            np.array([0, 7, 128, 255], np.uint8).reshape(1, 1, 1, 1, 1, 1, 2, 2),
        ),
    }
    return base


def _wide_alignment() -> Recipe:
    recipe = minimal(alignment=32768)
    recipe.name = "alignment-32768"
    recipe.manifest["decoder"]["ffn"]["d_ff"] = 2
    return recipe


def _liberties() -> Recipe:
    recipe = small_rich()
    recipe.name = "unusual-documents"
    recipe.manifest["provenance"]["a_field_of_a_later_version"] = 1
    recipe.manifest["decoder"]["norm"]["eps"] = 1
    recipe.liberties = True
    return recipe


def raw_zstd_frame(data: bytes, stated: int | None = None) -> bytes:
    """A Zstandard frame with one raw block that states its content size (RFC 8878)."""
    size = len(data) if stated is None else stated
    header = bytes.fromhex("28b52ffd") + bytes([0b1010_0000]) + size.to_bytes(4, "little")
    return header + (len(data) << 3 | 1).to_bytes(3, "little") + data


def base_hierarchy(recipe: Recipe) -> Hierarchy:
    """The hierarchy of a recipe, for planting a fault."""
    return Model(recipe).hierarchy.copy()


def small_rich() -> Recipe:
    """Two small layers with a predictor, statistics, an embedded file, rotary tables and learned positions."""
    d = decoder(
        d_ff=6,
        heads=(2, 1, 4),
        norm={"kind": "layer_norm", "eps": 1e-5},
        positions={"n_rows": 34, "offset": 2},
        rotary=[rotary(4)],
        ffn={"kind": "plain", "activation": RELU},
        logits={"tied": True},
        layers=[{"rotary": "main"}, {}],
    )
    predictor = {"layer": 0, "kind": "low_rank", "tap": {"layer": 0}, "threshold": 0.5, "rank": 2}
    statistics = {"n_tokens": 16, "text": "a text", "window_tokens": 3}
    m = manifest("small rich", d, predictors=[predictor], statistics=statistics, tokens={"bos": 1, "eos": [2]})
    files = {"tokenizer": ("tokenizer.json", b'{"version":"1.0"}')}
    extensions = {"extensions/note": ("u8", (3,), np.array([1, 2, 3], np.uint8))}
    return Recipe("small-rich", m, "f32", "f32", 64, "file", files, extensions)


def small_quantised(encoding: str) -> Recipe:
    """One layer of quantised bundles, and a quantised tensor."""
    d = decoder(64, 3, 1, heads=(1, 1, 4), norm={"kind": "rms_norm", "eps": 1e-6, "weight": False}, vocab_size=4)
    return Recipe(
        f"small-{encoding}", manifest("small", d), encoding, "f16", 512, encodings={"embedding/tokens": encoding}
    )
