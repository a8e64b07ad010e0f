"""OPT and Galactica checkpoints (transformers 5.23, `modeling_opt.py`).

Knows: the config keys and tensor names of the family. Does not know: how tensors are stored, or what becomes of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from flashfmt.convert.config import Config
from flashfmt.convert.translation import FfnSources, TensorMap
from flashfmt.layout import MAX_LAYERS
from flashfmt.manifest import (
    Attention,
    Block,
    Decoder,
    Embedding,
    FeedForward,
    Layer,
    LearnedPositions,
    Logits,
    Norm,
)

MODEL_TYPES: tuple[str, ...] = ("opt",)

POSITION_OFFSET = 2
LAYER_NORM_EPS = 1e-5


def describe(config: Config) -> Decoder:
    """The decoder of an OPT config; CheckpointError for values it cannot express."""
    config.refuse_unless_neutral()
    d_model, n_heads = config.count("hidden_size"), config.count("num_attention_heads")
    if d_model % n_heads:
        config.refuse("num_attention_heads", "does not divide hidden_size", expected=f"a divisor of {d_model}")
    d_embed = config.count("word_embed_proj_dim", d_model)
    context_tokens = config.count("max_position_embeddings")
    pre_norm, bias = config.flag("do_layer_norm_before", True), config.flag("enable_bias", True)
    affine = config.flag("layer_norm_elementwise_affine", True)
    return Decoder(
        vocab_size=config.count("vocab_size"),
        d_model=d_model,
        context_tokens=context_tokens,
        embedding=Embedding(d_embed=d_embed, projection=d_embed != d_model),
        positions=LearnedPositions(n_rows=context_tokens + POSITION_OFFSET, offset=POSITION_OFFSET),
        norm=Norm(kind="layer_norm", eps=LAYER_NORM_EPS, weight=affine, bias=affine),
        final_norm=pre_norm and not config.flag("_remove_final_layer_norm", False),
        block=Block(order="pre_norm" if pre_norm else "post_norm"),
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=n_heads,
            head_dim=d_model // n_heads,
            scale=(d_model // n_heads) ** -0.5,
            qkv_bias=bias,
            output_bias=bias,
        ),
        ffn=FeedForward(
            kind="plain",
            d_ff=config.count("ffn_dim"),
            activation=config.activation("activation_function", "relu"),
            up_bias=bias,
            down_bias=bias,
        ),
        logits=Logits(tied=config.flag("tie_word_embeddings", True)),
        layers=(Layer(),) * config.count("num_hidden_layers", limit=MAX_LAYERS),
    )


def tensor_map(config: Config, decoder: Decoder, names: Collection[str]) -> TensorMap:
    """Where the arrays of an OPT decoder come from; older checkpoints lack the ``model.`` prefix."""
    del config
    prefix = "model.decoder" if any(name.startswith("model.") for name in names) else "decoder"
    embedding = f"{prefix}.embed_tokens.weight"
    return TensorMap(
        arrays=dict(_arrays(decoder, prefix)),
        ffn=tuple(
            FfnSources(up=f"{prefix}.layers.{layer}.fc1.weight", down=f"{prefix}.layers.{layer}.fc2.weight")
            for layer in range(decoder.n_layers)
        ),
        copies={"lm_head.weight": embedding} if decoder.logits.tied else {},
        ignorable=lambda name: name == "decoder.version",
    )


def _arrays(decoder: Decoder, prefix: str) -> Iterator[tuple[str, str]]:
    yield "embedding/tokens", f"{prefix}.embed_tokens.weight"
    yield "embedding/positions", f"{prefix}.embed_positions.weight"
    if decoder.embedding.projection:
        yield "embedding/projection_in", f"{prefix}.project_in.weight"
        yield "embedding/projection_out", f"{prefix}.project_out.weight"
    for layer in range(decoder.n_layers):
        ours, theirs = f"layers/{layer}", f"{prefix}.layers.{layer}"
        for kind in ("weight", "bias"):
            if decoder.norm.weight:
                yield f"{ours}/attention/norm/{kind}", f"{theirs}.self_attn_layer_norm.{kind}"
                yield f"{ours}/ffn/norm/{kind}", f"{theirs}.final_layer_norm.{kind}"
            if kind == "weight" or decoder.attention.qkv_bias:
                for name, projection in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "out_proj")):
                    yield f"{ours}/attention/{name}/{kind}", f"{theirs}.self_attn.{projection}.{kind}"
        if decoder.ffn.up_bias:
            yield f"{ours}/ffn/up_bias", f"{theirs}.fc1.bias"
            yield f"{ours}/ffn/down_bias", f"{theirs}.fc2.bias"
    if decoder.final_norm and decoder.norm.weight:
        for kind in ("weight", "bias"):
            yield f"final_norm/{kind}", f"{prefix}.final_layer_norm.{kind}"
    if not decoder.logits.tied:
        yield "logits/weight", "lm_head.weight"
