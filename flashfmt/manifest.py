"""The manifest: a complete description of the decoder, as typed objects (SPEC.md section "Manifest").

An engine runs a file from these objects alone, never from a model name. Every choice that a decoder family makes is
an explicit field here; converters fill them in, engines read them. `required_arrays` derives from them which arrays
a file must hold and in which shape.

Knows: names, numbers and their meaning. Does not know: bytes, containers, arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

FORMAT_MAJOR = 1
FORMAT_MINOR = 0
FORMAT_VERSION = f"{FORMAT_MAJOR}.{FORMAT_MINOR}"

KNOWN_FEATURES: frozenset[str] = frozenset()

# In the patterns, (?!\n) is for Python, whose $ also matches before a final line feed.
Count = Annotated[int, Meta(ge=1, le=1 << 31)]
Positive = Annotated[float, Meta(gt=0)]
Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[a-z][a-z0-9_]*(?!\n)$")]
Text = Annotated[str, Meta(max_length=4096)]
Version = Annotated[str, Meta(pattern=r"^(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})(?!\n)$")]
Hex32 = Annotated[str, Meta(pattern=r"^[0-9a-f]{8}(?!\n)$")]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}(?!\n)$")]

ActivationKind = Literal["identity", "relu", "relu2", "fatrelu", "silu", "gelu", "gelu_tanh", "quick_gelu"]
NormKind = Literal["layer_norm", "rms_norm"]


class _Description(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the manifest's objects: immutable; unknown fields are ignored, as SPEC.md asks of readers."""


class Activation(_Description, frozen=True, kw_only=True):
    """Elementwise function of the FFN.

    `fatrelu` is x where x > `threshold`, else 0; `relu2` is relu(x) squared; `gelu` uses erf; `gelu_tanh` the tanh
    approximation; `quick_gelu` is x * sigmoid(1.702 x).
    """

    kind: ActivationKind
    threshold: float = 0.0


class Norm(_Description, frozen=True, kw_only=True):
    """Normalisation over the last axis: y = normalised(x) * (weight + `weight_offset`) [+ bias].

    `weight` false means the scale is constantly 1 and no array is stored.
    """

    kind: NormKind
    eps: Positive
    weight: bool = True
    weight_offset: float = 0.0
    bias: bool = False


class Embedding(_Description, frozen=True, kw_only=True):
    """Token embedding of width `d_embed`, multiplied by `scale`.

    `projection` adds `embedding/projection_in` and `embedding/projection_out` where `d_embed` differs from d_model.
    """

    d_embed: Count
    scale: float = 1.0
    projection: bool = False


class LearnedPositions(_Description, frozen=True, kw_only=True):
    """Learned absolute positions: row ``position + offset`` of `embedding/positions` is added to the embedding."""

    n_rows: Count
    offset: Annotated[int, Meta(ge=0, le=1 << 16)] = 0


class Rotary(_Description, frozen=True, kw_only=True):
    """A rotary table: dimension pair i of the first `n_dims` of a head turns by position * frequency[i].

    The frequencies are the array ``rotary/{name}`` float32 [n_dims / 2], with every scaling rule already applied.
    Sine and cosine are multiplied by `attention_factor`. `pairing` says which dimensions form pair i:
    ``half`` (i, i + n_dims/2) or ``interleaved`` (2i, 2i + 1).
    """

    name: Name
    n_dims: Annotated[int, Meta(ge=2, le=1 << 16, multiple_of=2)]
    pairing: Literal["half", "interleaved"] = "half"
    attention_factor: float = 1.0


class Attention(_Description, frozen=True, kw_only=True):
    """Causal self-attention: `scale` multiplies the scores; query head h reads head h * n_kv_heads // n_heads of k, v.

    `qk_norm` normalises queries and keys before rotation, over each head or over the whole projection.
    """

    n_heads: Count
    n_kv_heads: Count
    head_dim: Count
    scale: Positive
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Norm | None = None
    qk_norm_over: Literal["head", "projection"] = "head"


class FeedForward(_Description, frozen=True, kw_only=True):
    """The FFN, stored as bundles.

    ``plain``: down(act(up x)); ``gated``: down(act(gate x) * up_activation(up x)).
    """

    kind: Literal["plain", "gated"]
    d_ff: Count
    activation: Activation
    up_activation: Activation = Activation(kind="identity")
    gate_bias: bool = False
    up_bias: bool = False
    down_bias: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """Rows of one bundle, in order."""
        return ("up", "down") if self.kind == "plain" else ("gate", "up", "down")


class Block(_Description, frozen=True, kw_only=True):
    """Order of a layer's steps.

    ``pre_norm``: x += attention(norm(x)); x += ffn(norm(x)). ``post_norm``: x = norm(x + attention(x));
    x = norm(x + ffn(x)). ``parallel``: x += attention(norm(x)) + ffn(norm(x)), with one norm when `shared_norm`.
    """

    order: Literal["pre_norm", "post_norm", "parallel"] = "pre_norm"
    shared_norm: bool = False


class Layer(_Description, frozen=True, kw_only=True):
    """What may differ from layer to layer.

    `rotary` names a table of the decoder, or is null for a layer without positions. `attention_window_tokens`
    limits attention to that many last tokens, the current one included.
    """

    rotary: Name | None = None
    attention_window_tokens: Count | None = None


class Logits(_Description, frozen=True, kw_only=True):
    """Output: logits = matrix @ x [+ bias], times `scale`, then softcap * tanh(logits / softcap).

    `tied` uses `embedding/tokens` as the matrix, otherwise `logits/weight`.
    """

    tied: bool
    bias: bool = False
    scale: float = 1.0
    softcap: Positive | None = None


class Decoder(_Description, frozen=True, kw_only=True):
    """Everything an engine needs to compute logits from token ids."""

    vocab_size: Count
    d_model: Count
    context_tokens: Count
    embedding: Embedding
    positions: LearnedPositions | None = None
    rotary: Annotated[tuple[Rotary, ...], Meta(max_length=16)] = ()
    norm: Norm
    embedding_norm: bool = False
    final_norm: bool = True
    block: Block = Block()
    attention: Attention
    ffn: FeedForward
    logits: Logits
    layers: Annotated[tuple[Layer, ...], Meta(min_length=1, max_length=10_000)]

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    def rotary_of(self, layer: int) -> Rotary | None:
        """Rotary table of a layer, or None."""
        name = self.layers[layer].rotary
        return next((table for table in self.rotary if table.name == name), None)


class InputTap(_Description, frozen=True, kw_only=True):
    """Which activation a predictor reads: `point` of layer `layer` (an earlier layer allows look-ahead)."""

    layer: Annotated[int, Meta(ge=0)]
    point: Literal["ffn_input", "attention_input", "attention_output"] = "ffn_input"


class Measured(_Description, frozen=True, kw_only=True):
    """Quality of a predictor on held-out text: shares of 1; `text` says which text.

    `perplexity_ratio` is of the whole model, with the predictors of all layers over every neuron computed.
    """

    recall: Annotated[float, Meta(ge=0, le=1)]
    precision: Annotated[float, Meta(ge=0, le=1)]
    predicted_fraction: Annotated[float, Meta(ge=0, le=1)]
    n_tokens: Count
    text: Text
    perplexity_ratio: Positive | None = None


class Predictor(_Description, frozen=True, kw_only=True):
    """Tells from an activation which neurons of a layer will be active (SPEC.md section "Predictors").

    ``low_rank``: neuron i is active when sigmoid(up[i] . (down . h) + bias[i]) > threshold.
    ``low_bit_gate``: neuron i is active when s > threshold if `signed`, else |s| > threshold, with
    s = gate[i] . h + b[i] and b the layer's own `gate_bias` where gated, else `up_bias`.
    """

    layer: Annotated[int, Meta(ge=0)]
    kind: Literal["low_rank", "low_bit_gate"]
    tap: InputTap
    threshold: float
    rank: Count | None = None
    bias: bool = False
    signed: bool = True
    measured: Measured | None = None


class Statistics(_Description, frozen=True, kw_only=True):
    """Activity recorded on a text; a hint for placement, never needed for correctness."""

    n_tokens: Count
    text: Text
    window_tokens: Count


class SpecialTokens(_Description, frozen=True, kw_only=True):
    """Token ids with a role: any of `eos` ends a text; with `add_bos` a prompt without template starts with `bos`."""

    bos: Annotated[int, Meta(ge=0)] | None = None
    eos: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=64)] = ()
    add_bos: bool = False


class Provenance(_Description, frozen=True, kw_only=True):
    """Where the weights come from."""

    writer: Text
    source: Text
    source_format: Literal["safetensors", "gguf", "synthetic", "flash"]
    source_sha256: Sha256 | None = None
    architecture: Text = ""
    licence: Text | None = None


class Manifest(_Description, frozen=True, kw_only=True):
    """Attribute ``flashfmt`` of the root group."""

    version: Version
    metadata_crc32c: Hex32
    name: Text
    decoder: Decoder
    provenance: Provenance
    tokens: SpecialTokens = SpecialTokens()
    required_features: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()
    optional_features: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()
    predictors: Annotated[tuple[Predictor, ...], Meta(max_length=10_000)] = ()
    statistics: Statistics | None = None


class ArrayRule(msgspec.Struct, frozen=True):
    """Shape that an array must have; `encodable` marks weight matrices, which may use any weight encoding.

    Other float arrays (vectors) are f32. `integers` arrays are u32.
    """

    shape: tuple[int, ...]
    encodable: bool = False
    integers: bool = False


def _norm_arrays(prefix: str, norm: Norm, width: int) -> Iterator[tuple[str, ArrayRule]]:
    if norm.weight:
        yield f"{prefix}/weight", ArrayRule((width,))
    if norm.bias:
        yield f"{prefix}/bias", ArrayRule((width,))


def _embedding_arrays(d: Decoder) -> Iterator[tuple[str, ArrayRule]]:
    yield "embedding/tokens", ArrayRule((d.vocab_size, d.embedding.d_embed), encodable=True)
    if d.positions is not None:
        yield "embedding/positions", ArrayRule((d.positions.n_rows, d.d_model), encodable=True)
    if d.embedding.projection:
        yield "embedding/projection_in", ArrayRule((d.d_model, d.embedding.d_embed), encodable=True)
        yield "embedding/projection_out", ArrayRule((d.embedding.d_embed, d.d_model), encodable=True)
    if d.embedding_norm:
        yield from _norm_arrays("embedding/norm", d.norm, d.d_model)


def _attention_arrays(d: Decoder, prefix: str) -> Iterator[tuple[str, ArrayRule]]:
    a = d.attention
    q_width, kv_width = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
    yield from _norm_arrays(f"{prefix}/norm", d.norm, d.d_model)
    for name, width in (("q", q_width), ("k", kv_width), ("v", kv_width)):
        yield f"{prefix}/{name}/weight", ArrayRule((width, d.d_model), encodable=True)
        if a.qkv_bias:
            yield f"{prefix}/{name}/bias", ArrayRule((width,))
    yield f"{prefix}/output/weight", ArrayRule((d.d_model, q_width), encodable=True)
    if a.output_bias:
        yield f"{prefix}/output/bias", ArrayRule((d.d_model,))
    if a.qk_norm is not None:
        per_head = a.qk_norm_over == "head"
        yield from _norm_arrays(f"{prefix}/q_norm", a.qk_norm, a.head_dim if per_head else q_width)
        yield from _norm_arrays(f"{prefix}/k_norm", a.qk_norm, a.head_dim if per_head else kv_width)


def _ffn_arrays(d: Decoder, prefix: str) -> Iterator[tuple[str, ArrayRule]]:
    f = d.ffn
    if not (d.block.order == "parallel" and d.block.shared_norm):
        yield from _norm_arrays(f"{prefix}/norm", d.norm, d.d_model)
    if f.kind == "gated" and f.gate_bias:
        yield f"{prefix}/gate_bias", ArrayRule((f.d_ff,))
    if f.up_bias:
        yield f"{prefix}/up_bias", ArrayRule((f.d_ff,))
    if f.down_bias:
        yield f"{prefix}/down_bias", ArrayRule((d.d_model,))
    yield f"{prefix}/bundle_crc32c", ArrayRule((f.d_ff,), integers=True)


def _predictor_arrays(m: Manifest) -> Iterator[tuple[str, ArrayRule]]:
    d = m.decoder
    for p in m.predictors:
        prefix = f"layers/{p.layer}/predictor"
        if p.kind == "low_rank":
            rank = p.rank or 0
            yield f"{prefix}/down", ArrayRule((rank, d.d_model), encodable=True)
            yield f"{prefix}/up", ArrayRule((d.ffn.d_ff, rank), encodable=True)
            if p.bias:
                yield f"{prefix}/bias", ArrayRule((d.ffn.d_ff,))
        else:
            yield f"{prefix}/gate", ArrayRule((d.ffn.d_ff, d.d_model), encodable=True)
    if m.statistics is not None:
        for layer in range(d.n_layers):
            yield f"layers/{layer}/statistics/firing_frequency", ArrayRule((d.ffn.d_ff,))
            yield f"layers/{layer}/statistics/aggregated_window", ArrayRule((m.statistics.window_tokens,))


def bundles_name(layer: int) -> str:
    """Name of the bundles array of a layer."""
    return f"layers/{layer}/ffn/bundles"


def bundle_checksums_name(layer: int) -> str:
    """Name of the array with the CRC-32C of each bundle of a layer."""
    return f"layers/{layer}/ffn/bundle_crc32c"


def required_arrays(manifest: Manifest) -> Mapping[str, ArrayRule]:
    """Every array the manifest calls for, bundles and embedded files excepted, in the order of a forward pass."""
    d = manifest.decoder
    rules = dict(_embedding_arrays(d))
    for table in d.rotary:
        rules[f"rotary/{table.name}"] = ArrayRule((table.n_dims // 2,))
    for layer in range(d.n_layers):
        rules.update(_attention_arrays(d, f"layers/{layer}/attention"))
        rules.update(_ffn_arrays(d, f"layers/{layer}/ffn"))
    if d.final_norm:
        rules.update(_norm_arrays("final_norm", d.norm, d.d_model))
    if not d.logits.tied:
        rules["logits/weight"] = ArrayRule((d.vocab_size, d.embedding.d_embed), encodable=True)
    if d.logits.bias:
        rules["logits/bias"] = ArrayRule((d.vocab_size,))
    rules.update(_predictor_arrays(manifest))
    return rules
