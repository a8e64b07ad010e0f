"""`bind_layers`: a token's pass gives the bits of the functions it takes the place of, wherever it stops on its way."""

from dataclasses import replace

import numpy as np
import pytest

from flashfmt.encodings import Encoding, part_layout
from flashfmt.manifest import Activation
from reference_engine.backends import (
    AttentionWeights,
    FfnShape,
    LayerRotation,
    LayerWeights,
    NormWeights,
    Step,
)

N_LAYERS, N_HEADS, N_KV_HEADS, WIDTH, D_MODEL, N_NEURONS, CAPACITY = 2, 5, 1, 64, 192, 150, 50
N_PAIRS = (24, 32)


def norm_weights(source, size, *, centred, with_bias=False):
    return NormWeights(centred, 1e-5, source.normal(size), source.normal(size) if with_bias else None)


def attention(source, encoding, *, with_bias, head_norm, window, rotation):
    """Random weights; `head_norm` is none, rms or layer for norms of each head, all for one of all heads."""

    def bias(n):
        return source.normal(n) if with_bias else None

    def norm_of(n_heads):
        if head_norm == "none":
            return None
        size = WIDTH * (n_heads if head_norm == "all" else 1)
        return norm_weights(source, size, centred=head_norm == "layer", with_bias=head_norm == "layer")

    n, n_kv = N_HEADS * WIDTH, N_KV_HEADS * WIDTH
    return AttentionWeights(
        q=source.matrix(encoding, n, D_MODEL)[0],
        k=source.matrix(encoding, n_kv, D_MODEL, 4)[0],
        v=source.matrix(encoding, n_kv, D_MODEL)[0],
        output=source.matrix(encoding, D_MODEL, n)[0],
        q_bias=bias(n),
        k_bias=bias(n_kv),
        v_bias=bias(n_kv),
        output_bias=bias(D_MODEL),
        q_norm=norm_of(N_HEADS),
        k_norm=norm_of(N_KV_HEADS),
        norm_each_head=head_norm != "all",
        n_heads=N_HEADS,
        n_kv_heads=N_KV_HEADS,
        head_dim=WIDTH,
        scale=0.02,
        window=window,
        rotation=rotation,
    )


def layer(
    source, encoding, *, order="pre_norm", centred=True, shared=False, with_bias=True, bundles=None, **of_attention
):
    """Random weights of a layer whose bundles have the encoding `bundles`, by default that of the attention."""
    options = {"with_bias": with_bias, "head_norm": "none", "window": None, "rotation": None} | of_attention
    bundle_encoding = bundles or encoding
    parts = ("up", "down") if centred else ("gate", "up", "down")
    matrices = [source.matrix(bundle_encoding, N_NEURONS, D_MODEL)[0] for _ in parts]
    rows = np.concatenate([m.data.view(np.uint8).reshape(N_NEURONS, -1) for m in matrices], axis=1)
    part = part_layout(bundle_encoding, D_MODEL)
    return LayerWeights(
        order=order,
        attention_norm=norm_weights(source, D_MODEL, centred=centred, with_bias=with_bias),
        attention=attention(source, encoding, **options),
        ffn_norm=None if shared else norm_weights(source, D_MODEL, centred=centred, with_bias=with_bias),
        ffn=FfnShape(
            encoding=bundle_encoding,
            parts=parts,
            d_model=D_MODEL,
            part=part,
            stride=rows.shape[1],
            activation=Activation(kind="relu" if centred else "silu"),
            up_activation=Activation(kind="identity"),
        ),
        gate_bias=None,
        up_bias=source.normal(N_NEURONS) if with_bias else None,
        down_bias=source.normal(D_MODEL) if with_bias else None,
        bundles=np.ascontiguousarray(rows),
    )


class Reference:
    """The same by the functions of a backend, one after the other."""

    def __init__(self, backend, angles, n_past):
        self.backend, self.angles, self.n_past = backend, angles, n_past

    def norm(self, w, x):
        if w.centred:
            return self.backend.layer_norm(x, w.weight, w.bias, w.eps)
        y = self.backend.rms_norm(x, w.weight, w.eps)
        return y if w.bias is None else y + w.bias

    def head_norm(self, w, norm, x):
        if norm is None:
            return x
        return self.norm(norm, x.reshape(-1, WIDTH)).reshape(1, -1) if w.norm_each_head else self.norm(norm, x)

    def attention(self, w, x, keys, values):
        b = self.backend
        q = self.head_norm(w, w.q_norm, b.matmul(w.q, x, bias=w.q_bias)).reshape(1, N_HEADS, WIDTH)
        k = self.head_norm(w, w.k_norm, b.matmul(w.k, x, bias=w.k_bias)).reshape(1, N_KV_HEADS, WIDTH)
        v = b.matmul(w.v, x, bias=w.v_bias).reshape(1, N_KV_HEADS, WIDTH)
        if w.rotation is not None:
            for vectors in (q, k):
                b.rotate(vectors, *self.angles[w.rotation.table], w.rotation.pairing)
        keys[:, self.n_past], values[:, self.n_past] = k[0], v[0]
        mixed = b.attend(q, keys, values, n_past=self.n_past, scale=w.scale, window=w.window)
        return b.matmul(w.output, mixed.reshape(1, -1), bias=w.output_bias)

    def ffn(self, w, x):
        out = np.zeros_like(x) if w.down_bias is None else w.down_bias[None].copy()
        self.backend.ffn(w.ffn, w.bundles, None, x, out, up_bias=w.up_bias, gate_bias=w.gate_bias)
        return out

    def layer(self, w, x, keys, values):
        if w.order == "post_norm":
            x = self.norm(w.attention_norm, x + self.attention(w.attention, x, keys, values))
            return self.norm(w.ffn_norm, x + self.ffn(w, x))
        h = self.norm(w.attention_norm, x)
        o = self.attention(w.attention, h, keys, values)
        if w.order == "pre_norm":
            x = x + o
            return x + self.ffn(w, self.norm(w.ffn_norm, x))
        return x + o + self.ffn(w, h if w.ffn_norm is None else self.norm(w.ffn_norm, x))


def random_angles(source):
    return [tuple(f(source.normal(1, n)).astype(np.float32) for f in (np.cos, np.sin)) for n in N_PAIRS]


def require_same_bits(numba_backends, layers, source, *, kv_type=np.float32, n_past=7, stops=()):
    x, angles = source.normal(1, D_MODEL), random_angles(source)
    cache = source.normal(2, len(layers), N_KV_HEADS, CAPACITY, WIDTH).astype(kv_type)
    cache[:, :, :, n_past:] = np.nan
    expected_cache = cache.copy()
    reference, expected = Reference(numba_backends[0], angles, n_past), x
    for w, keys, values in zip(layers, *expected_cache, strict=True):
        expected = reference.layer(w, expected, keys, values)
    for backend in numba_backends:
        token, own_cache = backend.bind_layers(layers), cache.copy()
        for _ in range(2):  # a pass leaves nothing behind
            token.begin(x, angles, *own_cache, n_past=n_past)
            for place, step in stops:
                token.advance(place, step)
                if step == Step.FFN_INPUT and not token.computes_ffn(place):
                    w = layers[place]
                    backend.ffn(w.ffn, w.bundles, None, token.ffn_input, token.ffn_output, up_bias=w.up_bias)
            token.advance(len(layers) - 1, Step.LAYER_OUTPUT)
            assert np.array_equal(token.hidden, expected)
            assert np.array_equal(own_cache, expected_cache, equal_nan=True)


@pytest.mark.parametrize("kv_type", [np.float32, np.float16])
@pytest.mark.parametrize("head_norm", ["none", "rms", "layer", "all"])
@pytest.mark.parametrize("n_past", [0, 37])
def test_attention(numba_backends, weights, encoding, kv_type, head_norm, n_past):
    source = weights(20)
    pairing = "half" if head_norm in ("none", "rms") else "interleaved"
    layers = [
        layer(
            source,
            encoding,
            with_bias=head_norm != "rms",
            head_norm=head_norm,
            window=20 if head_norm == "all" else None,
            rotation=None if head_norm == "layer" else LayerRotation(table, N_PAIRS[table], pairing),
        )
        for table in (1, 0)
    ]
    require_same_bits(numba_backends, layers, source, kv_type=kv_type, n_past=n_past)


@pytest.mark.parametrize(
    ("order", "shared"), [("pre_norm", False), ("post_norm", False), ("parallel", False), ("parallel", True)]
)
@pytest.mark.parametrize("centred", [True, False])
def test_orders(numba_backends, weights, encoding, order, shared, centred):
    source = weights(21)
    layers = [
        layer(source, encoding, order=order, shared=shared, centred=centred, with_bias=centred) for _ in range(N_LAYERS)
    ]
    require_same_bits(numba_backends, layers, source)
    stops = [(0, Step.ATTENTION_INPUT), (0, Step.FFN_OUTPUT), (1, Step.PROJECTIONS), (1, Step.FFN_INPUT)]
    require_same_bits(numba_backends, layers, source, stops=stops)


def test_bundles_elsewhere(numba_backends, weights):
    """FFNs of another encoding, or of bundles that do not stay, are left to the caller."""
    source = weights(22)
    layers = [layer(source, Encoding.Q8, bundles=Encoding.F16), layer(source, Encoding.Q8)]
    token = numba_backends[0].bind_layers(layers)
    assert [token.computes_ffn(place) for place in (0, 1)] == [False, True]
    assert not numba_backends[0].bind_layers([replace(layers[1], bundles=None)]).computes_ffn(0)
    require_same_bits(numba_backends, layers, source, stops=[(0, Step.FFN_INPUT)])


def test_activations_on_the_way(numba_backends, weights):
    source = weights(23)
    w = layer(source, Encoding.F32)
    x, cache = source.normal(1, D_MODEL), np.zeros((2, 1, N_KV_HEADS, CAPACITY, WIDTH), np.float32)
    backend = numba_backends[0]
    reference, token = Reference(backend, [], 3), backend.bind_layers([w])
    token.begin(x, [], *cache.copy(), n_past=3)
    token.advance(0, Step.ATTENTION_INPUT)
    h = reference.norm(w.attention_norm, x)
    assert np.array_equal(token.attention_input, h)
    token.advance(0, Step.FFN_INPUT)
    o = reference.attention(w.attention, h, *cache[:, 0])
    assert np.array_equal(token.attention_output, o)
    g = reference.norm(w.ffn_norm, x + o)
    assert np.array_equal(token.ffn_input, g)
    assert np.array_equal(token.ffn_output, w.down_bias[None])
    token.advance(0, Step.FFN_OUTPUT)
    assert np.array_equal(token.ffn_output, reference.ffn(w, g))


def test_keys_are_rounded_to_half_as_numpy_does(numba_backends, weights):
    """Subnormal, halfway, overflowing and infinite values, and those that are not numbers."""
    source = weights(24)
    w = layer(source, Encoding.F32)
    k = replace(w.attention.k, data=np.zeros_like(w.attention.k.data))
    w = replace(w, attention=replace(w.attention, k=k))
    specials = [
        0.0,
        -0.0,
        6e-8,
        -2.9e-8,
        3.1e-8,
        6.1e-5,
        1.00048828125,
        1.00146484375,
        65519.0,
        65520.0,
        np.inf,
        np.nan,
    ]
    w.attention.k_bias[: len(specials)] = specials
    cache = np.zeros((2, 1, N_KV_HEADS, CAPACITY, WIDTH), np.float16)
    with np.errstate(over="ignore"):
        expected = w.attention.k_bias.astype(np.float16)
    token = numba_backends[0].bind_layers([w])
    token.begin(source.normal(1, D_MODEL), [], *cache, n_past=3)
    token.advance(0, Step.FFN_INPUT)
    assert np.array_equal(cache[0, 0, 0, 3], expected, equal_nan=True)
    assert not cache[0, 0, 0, [2, 4]].any()


def test_matrices_of_several_encodings_are_not_bound(numba_backends, weights):
    source = weights(25)
    w, other = layer(source, Encoding.F16), layer(source, Encoding.Q8)
    mixed = replace(w, attention=replace(w.attention, v=other.attention.v))
    assert numba_backends[0].bind_layers([mixed]) is None
    assert numba_backends[0].bind_layers([w, other]) is None
    assert numba_backends[0].bind_layers([w]) is not None


def test_what_does_not_go_together_is_refused(numba_backends, weights):
    source = weights(26)
    backend, w = numba_backends[0], layer(source, Encoding.F16, rotation=LayerRotation(0, N_PAIRS[0], "half"))
    with pytest.raises(ValueError, match="go together"):
        backend.bind_layers([replace(w, attention=replace(w.attention, output=w.attention.q))])
    with pytest.raises(ValueError, match="pairs"):
        backend.bind_layers([replace(w, attention=replace(w.attention, rotation=LayerRotation(0, 33, "half")))])
    with pytest.raises(ValueError, match="one kind"):
        backend.bind_layers([replace(w, ffn_norm=replace(w.ffn_norm, eps=1e-3))])
    with pytest.raises(ValueError, match="bundles"):
        backend.bind_layers([replace(w, bundles=w.bundles[:, :-1])])
    token = backend.bind_layers([w])
    x, cache = source.normal(1, D_MODEL), np.zeros((2, 1, N_KV_HEADS, CAPACITY, WIDTH), np.float32)
    angles = random_angles(source)
    with pytest.raises(ValueError, match="cannot follow"):
        token.advance(0, Step.LAYER_OUTPUT)
    for bad in (-1, CAPACITY):
        with pytest.raises(ValueError, match="positions"):
            token.begin(x, angles, *cache, n_past=bad)
    with pytest.raises(ValueError, match="go with"):
        token.begin(x, angles, *cache[..., :32], n_past=0)
    with pytest.raises(ValueError, match="expected"):
        token.begin(source.normal(2, D_MODEL), angles, *cache, n_past=0)
    token.begin(x, angles, *cache, n_past=0)
    token.advance(0, Step.FFN_OUTPUT)
    for place, step in ((0, Step.FFN_OUTPUT), (0, Step.ATTENTION_INPUT), (1, Step.ATTENTION_INPUT)):
        with pytest.raises(ValueError, match="cannot follow"):
            token.advance(place, step)
