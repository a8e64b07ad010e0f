"""`bind_attention`: one call gives the bits of the functions it takes the place of."""

from dataclasses import replace

import numpy as np
import pytest

from flashfmt.encodings import Encoding
from reference_engine.backends import AttentionWeights, HeadNorm

N_HEADS, N_KV_HEADS, WIDTH, D_MODEL, CAPACITY = 5, 1, 64, 192, 50


def attention(source, encoding, *, with_bias=True, head_norm=None, window=None, pairing="half"):
    """Random weights of an attention; `head_norm` makes a norm of n vectors of a length."""

    def bias(n):
        return source.normal(n) if with_bias else None

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
        q_norm=head_norm and head_norm(N_HEADS),
        k_norm=head_norm and head_norm(N_KV_HEADS),
        n_heads=N_HEADS,
        n_kv_heads=N_KV_HEADS,
        head_dim=WIDTH,
        scale=0.02,
        window=window,
        pairing=pairing,
    )


def one_after_the_other(backend, w, x, cos, sin, keys, values, n_past):
    def normalised(y, norm):
        if norm is None:
            return y
        y = y.reshape(norm.n_vectors, -1)
        if norm.centred:
            return backend.layer_norm(y, norm.weight, norm.bias, norm.eps)
        return backend.rms_norm(y, norm.weight, norm.eps) + (0 if norm.bias is None else norm.bias)

    q = normalised(backend.matmul(w.q, x, bias=w.q_bias), w.q_norm).reshape(1, N_HEADS, WIDTH)
    k = normalised(backend.matmul(w.k, x, bias=w.k_bias), w.k_norm).reshape(1, N_KV_HEADS, WIDTH)
    v = backend.matmul(w.v, x, bias=w.v_bias).reshape(1, N_KV_HEADS, WIDTH)
    if cos is not None:
        backend.rotate(q, cos, sin, w.pairing)
        backend.rotate(k, cos, sin, w.pairing)
    keys[:, n_past], values[:, n_past] = k[0], v[0]
    mixed = backend.attend(q, keys, values, n_past=n_past, scale=w.scale, window=w.window)
    return backend.matmul(w.output, mixed.reshape(1, -1), bias=w.output_bias)


def over_heads(source, *, centred, with_bias):
    def make(n_heads):
        bias = source.normal(WIDTH) if with_bias else None
        return HeadNorm(n_heads, centred, 1e-5, source.normal(WIDTH), bias)

    return make


def over_all(source):
    return lambda n_heads: HeadNorm(1, False, 1e-6, source.normal(n_heads * WIDTH), None)


@pytest.mark.parametrize("kv_type", [np.float32, np.float16])
@pytest.mark.parametrize("norm", ["none", "rms", "layer", "all"])
@pytest.mark.parametrize("n_past", [0, 37])
def test_same_bits(numba_backends, weights, encoding, kv_type, norm, n_past):
    source = weights(20)
    head_norm = {
        "none": None,
        "rms": over_heads(source, centred=False, with_bias=False),
        "layer": over_heads(source, centred=True, with_bias=True),
        "all": over_all(source),
    }[norm]
    pairing = "half" if norm in ("none", "rms") else "interleaved"
    window = 20 if norm == "all" else None
    w = attention(source, encoding, with_bias=norm != "rms", head_norm=head_norm, window=window, pairing=pairing)
    x, angles = source.normal(1, D_MODEL), source.normal(1, 24)
    cos, sin = (None, None) if norm == "layer" else (np.cos(angles), np.sin(angles))
    cache = source.normal(2, N_KV_HEADS, CAPACITY, WIDTH).astype(kv_type)
    cache[:, :, n_past:] = np.nan
    expected_cache = cache.copy()
    expected = one_after_the_other(numba_backends[0], w, x, cos, sin, *expected_cache, n_past)
    for backend in numba_backends:
        step, own_cache = backend.bind_attention(w), cache.copy()
        out = step(x, cos, sin, *own_cache, n_past=n_past)
        assert np.array_equal(out, expected)
        assert np.array_equal(own_cache, expected_cache, equal_nan=True)


def test_keys_are_rounded_to_half_as_numpy_does(numba_backends, weights):
    """Subnormal, halfway, overflowing and infinite values, and those that are not numbers."""
    source = weights(21)
    w = attention(source, Encoding.F32, with_bias=True)
    w = replace(w, k=replace(w.k, data=np.zeros_like(w.k.data)))
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
    w.k_bias[: len(specials)] = specials
    cache = np.zeros((2, N_KV_HEADS, CAPACITY, WIDTH), np.float16)
    with np.errstate(over="ignore"):
        expected = w.k_bias.astype(np.float16)
    numba_backends[0].bind_attention(w)(source.normal(1, D_MODEL), None, None, *cache, n_past=3)
    assert np.array_equal(cache[0, 0, 3], expected, equal_nan=True)
    assert not cache[0, 0, [2, 4]].any()


def test_matrices_of_several_encodings_are_not_bound(numba_backends, weights):
    source = weights(22)
    w = attention(source, Encoding.F16)
    assert numba_backends[0].bind_attention(replace(w, v=attention(source, Encoding.Q8).v)) is None


def test_shapes_are_checked(numba_backends, weights):
    source = weights(23)
    w = attention(source, Encoding.F16)
    with pytest.raises(ValueError, match="go together"):
        numba_backends[0].bind_attention(replace(w, output=w.q))
    step = numba_backends[0].bind_attention(w)
    x, cache = source.normal(1, D_MODEL), np.zeros((2, N_KV_HEADS, CAPACITY, WIDTH), np.float32)
    for bad in (-1, CAPACITY):
        with pytest.raises(ValueError, match="positions"):
            step(x, None, None, *cache, n_past=bad)
    with pytest.raises(ValueError, match="go with"):
        step(x, None, None, *cache[:, :, :, :32], n_past=0)
    with pytest.raises(ValueError, match="expected"):
        step(source.normal(2, D_MODEL), None, None, *cache, n_past=0)
    with pytest.raises(ValueError, match="pairs"):
        step(x, source.normal(1, 33), source.normal(1, 33), *cache, n_past=0)
