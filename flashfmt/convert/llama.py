"""Llama and its relatives (transformers 5.23): Llama, Mistral, Qwen2, Qwen3, SmolLM3, and their ReLU variants.

ReLU variants: Llama with `hidden_act` relu (ReluLLaMA); ProSparse (`SparseLlamaForCausalLM`, FATReLU with its threshold
in `hidden_act_param`); Bamboo and TurboSparse (dReLU: ReLU on gate and up), under model type `bamboo` or with
`hidden_act` "drelu".

Knows: the config keys and tensor names of the family. Does not know: how tensors are stored, or what becomes of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from flashfmt.convert.config import Config
from flashfmt.convert.rotary import MAIN_TABLE, rotary_table
from flashfmt.convert.translation import FfnSources, TensorMap
from flashfmt.layout import MAX_LAYERS
from flashfmt.manifest import (
    Activation,
    Attention,
    Decoder,
    Embedding,
    FeedForward,
    Layer,
    Logits,
    Norm,
)


@dataclass(frozen=True, slots=True)
class _Variant:
    """How a model type departs from Llama, in what its config does not say."""

    qkv_bias: bool | None = None  # None: `attention_bias` decides, and holds for the output projection too
    mlp_bias: bool = False  # whether the key `mlp_bias` is honoured
    qk_norm: bool = False
    tied: bool = False
    default_head_dim: int | None = None
    default_theta: float = 10_000.0
    window: str = "none"  # none; all: `sliding_window` in every layer; layers: `layer_types` decides


_VARIANTS = {
    "llama": _Variant(mlp_bias=True),
    "sparsellama": _Variant(mlp_bias=True),
    "mistral": _Variant(qkv_bias=False, window="all"),
    "bamboo": _Variant(qkv_bias=False, window="all"),
    "qwen2": _Variant(qkv_bias=True, window="layers"),
    "qwen3": _Variant(qk_norm=True, default_head_dim=128, window="layers"),
    "smollm3": _Variant(mlp_bias=True, tied=True, default_theta=2_000_000.0, window="layers"),
}

MODEL_TYPES: tuple[str, ...] = tuple(_VARIANTS)

_SPARSE_ARCHITECTURE = "SparseLlamaForCausalLM"
_RELU = Activation(kind="relu")


def describe(config: Config) -> Decoder:
    """The decoder of a Llama-like config; CheckpointError for values it cannot express."""
    variant = _VARIANTS[config.text("model_type")]
    config.refuse_unless_neutral()
    _refuse_foreign_code(config)
    n_heads, head_dim = config.count("num_attention_heads"), _head_dim(config, variant)
    n_kv_heads = _kv_heads(config, n_heads)
    norm = Norm(kind="rms_norm", eps=config.positive("rms_norm_eps", 1e-6))
    attention_bias = config.flag("attention_bias", False)
    if variant.qkv_bias is not None and attention_bias and not variant.qkv_bias:
        config.refuse("attention_bias", "this architecture has no attention biases", expected="false")
    output_bias = attention_bias if variant.qkv_bias is None else False
    table = rotary_table(config, head_dim, variant.default_theta)
    return Decoder(
        vocab_size=config.count("vocab_size"),
        d_model=config.count("hidden_size"),
        context_tokens=config.count("max_position_embeddings"),
        embedding=Embedding(d_embed=config.count("hidden_size")),
        rotary=(table.description,),
        norm=norm,
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=attention_bias if variant.qkv_bias is None else variant.qkv_bias,
            output_bias=output_bias,
            qk_norm=norm if variant.qk_norm else None,
        ),
        ffn=_feed_forward(config, variant),
        logits=Logits(tied=config.flag("tie_word_embeddings", variant.tied)),
        layers=_layers(config, variant),
    )


def tensor_map(config: Config, decoder: Decoder, names: Collection[str]) -> TensorMap:
    """Where the arrays of a Llama-like decoder come from; a bare base model lacks the ``model.`` prefix."""
    prefix = "model." if any(name.startswith("model.") for name in names) else ""
    table = rotary_table(config, decoder.attention.head_dim, _VARIANTS[config.text("model_type")].default_theta)
    mlp = [f"{prefix}layers.{layer}.mlp" for layer in range(decoder.n_layers)]
    return TensorMap(
        arrays=dict(_arrays(decoder, prefix)),
        ffn=tuple(
            FfnSources(gate=f"{m}.gate_proj.weight", up=f"{m}.up_proj.weight", down=f"{m}.down_proj.weight")
            for m in mlp
        ),
        computed={f"rotary/{MAIN_TABLE}": table.frequencies},
        copies={"lm_head.weight": f"{prefix}embed_tokens.weight"} if decoder.logits.tied else {},
        ignorable=lambda name: name.endswith(".rotary_emb.inv_freq"),
    )


def _arrays(decoder: Decoder, prefix: str) -> Iterator[tuple[str, str]]:
    attention, ffn = decoder.attention, decoder.ffn
    yield "embedding/tokens", f"{prefix}embed_tokens.weight"
    for layer in range(decoder.n_layers):
        ours, theirs = f"layers/{layer}", f"{prefix}layers.{layer}"
        yield f"{ours}/attention/norm/weight", f"{theirs}.input_layernorm.weight"
        yield f"{ours}/ffn/norm/weight", f"{theirs}.post_attention_layernorm.weight"
        for name, projection in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj")):
            yield f"{ours}/attention/{name}/weight", f"{theirs}.self_attn.{projection}.weight"
            if attention.output_bias if name == "output" else attention.qkv_bias:
                yield f"{ours}/attention/{name}/bias", f"{theirs}.self_attn.{projection}.bias"
        if attention.qk_norm is not None:
            yield f"{ours}/attention/q_norm/weight", f"{theirs}.self_attn.q_norm.weight"
            yield f"{ours}/attention/k_norm/weight", f"{theirs}.self_attn.k_norm.weight"
        if ffn.up_bias:
            for part in ("gate", "up", "down"):
                yield f"{ours}/ffn/{part}_bias", f"{theirs}.mlp.{part}_proj.bias"
    yield "final_norm/weight", f"{prefix}norm.weight"
    if not decoder.logits.tied:
        yield "logits/weight", "lm_head.weight"


def _refuse_foreign_code(config: Config) -> None:
    """Refuse checkpoints whose arithmetic lives in code of their own, unless it is code this file describes."""
    sparse = config.text("model_type") == "sparsellama" or config.architecture == _SPARSE_ARCHITECTURE
    if sparse and config.text("hidden_act") not in ("relu", "fatrelu"):
        config.refuse("hidden_act", f"{_SPARSE_ARCHITECTURE} is known with ReLU only", expected="relu or fatrelu")
    if config.has("auto_map") and not sparse and config.text("model_type") != "bamboo":
        config.refuse(
            "auto_map",
            "the model's arithmetic is in code of its own, which conversion cannot see; where that code is Llama with "
            "another activation, name it in hidden_act (relu, fatrelu, drelu) and remove auto_map",
            expected="absent",
        )


def _head_dim(config: Config, variant: _Variant) -> int:
    d_model, n_heads = config.count("hidden_size"), config.count("num_attention_heads")
    if config.has("head_dim"):
        return config.count("head_dim")
    if variant.default_head_dim is not None and "head_dim" not in config.values:
        return variant.default_head_dim
    if d_model % n_heads:
        config.refuse("num_attention_heads", "does not divide hidden_size", expected=f"a divisor of {d_model}")
    return d_model // n_heads


def _kv_heads(config: Config, n_heads: int) -> int:
    n_kv_heads = config.count("num_key_value_heads", n_heads)
    if n_heads % n_kv_heads:
        config.refuse("num_key_value_heads", "does not divide num_attention_heads", expected=f"a divisor of {n_heads}")
    return n_kv_heads


def _feed_forward(config: Config, variant: _Variant) -> FeedForward:
    bias = config.flag("mlp_bias", False)
    if bias and not variant.mlp_bias:
        config.refuse("mlp_bias", "this architecture has no FFN biases", expected="false")
    d_ff, d_relu = config.count("intermediate_size"), config.values.get("hidden_act") == "drelu"
    if config.text("model_type") == "bamboo" and not d_relu:
        d_relu = config.text("hidden_act") == "relu"
        if not d_relu:
            config.refuse("hidden_act", "Bamboo is known with dReLU only", expected="relu")
    if d_relu:
        gated = FeedForward(kind="gated", d_ff=d_ff, activation=_RELU, up_activation=_RELU)
    else:
        gated = FeedForward(kind="gated", d_ff=d_ff, activation=config.activation("hidden_act", "silu"))
    if not bias:
        return gated
    return FeedForward(
        kind="gated",
        d_ff=d_ff,
        activation=gated.activation,
        up_activation=gated.up_activation,
        gate_bias=True,
        up_bias=True,
        down_bias=True,
    )


def _layers(config: Config, variant: _Variant) -> tuple[Layer, ...]:
    n_layers = config.count("num_hidden_layers", limit=MAX_LAYERS)
    rotated = _rotated(config, n_layers)
    return tuple(
        Layer(rotary=MAIN_TABLE if rotates else None, attention_window_tokens=window)
        for rotates, window in zip(rotated, _windows(config, variant, rotated), strict=True)
    )


def _rotated(config: Config, n_layers: int) -> list[bool]:
    """Which layers rotate queries and keys: all, but for SmolLM3."""
    if config.text("model_type") != "smollm3":
        if config.has("no_rope_layers"):
            config.refuse("no_rope_layers", "this architecture rotates every layer", expected="absent")
        return [True] * n_layers
    flags = config.values.get("no_rope_layers")
    if flags is None:
        interval = config.count("no_rope_layer_interval", 4)
        return [(layer + 1) % interval != 0 for layer in range(n_layers)]
    if not isinstance(flags, list) or len(flags) < n_layers or any(flag not in (0, 1) for flag in flags):
        config.refuse("no_rope_layers", "not a list of 0 and 1 for every layer", expected=f"{n_layers} numbers")
    return [bool(flag) for flag in flags[:n_layers]]


def _windows(config: Config, variant: _Variant, rotated: list[bool]) -> list[int | None]:
    """Attention window of every layer, as transformers decides it."""
    if variant.window == "none":
        if config.has("sliding_window"):
            config.refuse("sliding_window", "this architecture has no attention window", expected="absent")
        window = None
    elif variant.window == "all":
        window = config.values.get("sliding_window", 4096)
    else:
        default = None if config.text("model_type") == "smollm3" else 4096
        window = config.values.get("sliding_window", default) if config.flag("use_sliding_window", False) else None
    if window is not None:
        window = config.count("sliding_window", window)
    types = config.values.get("layer_types")
    if types is None:
        types = _default_layer_types(config, variant, window, rotated)
    elif not isinstance(types, list) or len(types) != len(rotated):
        config.refuse("layer_types", "not a list with an entry for every layer", expected=f"{len(rotated)} entries")
    if any(kind not in ("full_attention", "sliding_attention") for kind in types):
        config.refuse("layer_types", "unknown kind of layer", expected="full_attention or sliding_attention")
    if window is None and "sliding_attention" in types:
        config.refuse("layer_types", "sliding layers without a sliding window", expected="a sliding_window in use")
    if variant.window == "all" and window is not None and "full_attention" in types:
        config.refuse("layer_types", "this architecture slides in every layer", expected="sliding_attention only")
    return [window if kind == "sliding_attention" else None for kind in types]


def _default_layer_types(config: Config, variant: _Variant, window: int | None, rotated: list[bool]) -> list[str]:
    if window is None:
        slides = [False] * len(rotated)
    elif variant.window == "all":
        slides = [True] * len(rotated)
    elif config.text("model_type") == "smollm3":
        slides = [not rotates for rotates in rotated]
    else:
        first = config.values.get("max_window_layers", 28)
        if not isinstance(first, int) or first < 0:
            config.refuse("max_window_layers", "not a number of layers", expected="an integer >= 0")
        slides = [layer >= first for layer in range(len(rotated))]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]
