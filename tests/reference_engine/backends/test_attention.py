"""Attention, rotary positions and norms of every backend against float64."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(
    groups=st.integers(1, 3), n_kv_heads=st.integers(1, 3), width=st.integers(1, 70),
    n_tokens=st.sampled_from([1, 1, 2, 9, 20]),
    n_past=st.integers(0, 90), window=st.none() | st.integers(1, 40), spare=st.integers(0, 5),
    dtype=st.sampled_from([np.float32, np.float16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_attention(
    backend, oracle, weights, relative_error, groups, n_kv_heads, width, n_tokens, n_past, window, spare, dtype, seed
):
    source = weights(seed)
    q = 2 * source.normal(n_tokens, groups * n_kv_heads, width)
    cache = [source.normal(n_kv_heads, n_past + n_tokens + spare, width).astype(dtype) for _ in range(2)]
    for array in cache:
        array[:, n_past + n_tokens :] = np.nan
    out = backend.attend(q, *cache, n_past=n_past, scale=0.3, window=window)
    assert relative_error(out, oracle.attend(q, *cache, n_past, 0.3, window)) <= 3e-6


def test_attention_with_extreme_scores(backend, oracle, weights, relative_error):
    source = weights(1)
    q, keys, values = source.normal(2, 2, 32), source.normal(2, 60, 32), source.normal(2, 60, 32)
    for scale in (1e-6, 30.0):
        out = backend.attend(q, keys, values, n_past=58, scale=scale)
        assert relative_error(out, oracle.attend(q, keys, values, 58, scale, None)) <= 1e-5


def test_attention_has_the_same_bits_with_any_number_of_threads(numba_backends, weights):
    source = weights(2)
    q, cache = source.normal(5, 3, 24), source.normal(2, 3, 50, 24).astype(np.float16)
    one, two = (b.attend(q, *cache, n_past=45, scale=0.2) for b in numba_backends)
    assert np.array_equal(one, two)


def test_attention_checks_the_capacity(backend):
    q, cache = np.zeros((2, 1, 8), np.float32), np.zeros((1, 4, 8), np.float32)
    with pytest.raises(ValueError, match="positions"):
        backend.attend(q, cache, cache, n_past=3, scale=1.0)


@FEW
@given(
    n_tokens=st.integers(1, 4), n_heads=st.integers(1, 3), n_pairs=st.integers(1, 20), spare=st.integers(0, 5),
    pairing=st.sampled_from(["half", "interleaved"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_rotation(backend, oracle, weights, n_tokens, n_heads, n_pairs, spare, pairing, seed):
    source = weights(seed)
    x = source.normal(n_tokens, n_heads, 2 * n_pairs + spare)
    angle = 3 * source.normal(n_tokens, n_pairs)
    cos, sin = np.cos(angle), np.sin(angle)
    expected = oracle.rotate(x, cos, sin, pairing)
    backend.rotate(x, cos, sin, pairing)
    assert np.abs(x - expected).max() <= 2e-6


@FEW
@given(
    n_rows=st.integers(1, 4), width=st.integers(1, 300), with_weight=st.booleans(), with_bias=st.booleans(),
    offset=st.sampled_from([0.0, 5.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_norms(backend, oracle, weights, n_rows, width, with_weight, with_bias, offset, seed):
    source = weights(seed)
    x = source.normal(n_rows, width) + np.float32(offset)
    weight = source.normal(width) if with_weight else None
    bias = source.normal(width) if with_bias else None
    kept = x.copy()
    rms = backend.rms_norm(x, weight, 1e-5)
    assert np.abs(rms - oracle.norm(x, weight, None, 1e-5, centred=False)).max() <= 1e-5
    layer = backend.layer_norm(x, weight, bias, 1e-3)
    assert np.abs(layer - oracle.norm(x, weight, bias, 1e-3, centred=True)).max() <= 1e-4
    assert np.array_equal(x, kept)


def test_norms_over_heads(backend, oracle, weights):
    x, weight = weights(3).normal(3, 4, 16), weights(4).normal(16)
    out = backend.rms_norm(x, weight, 1e-6)
    assert out.shape == x.shape
    assert np.abs(out - oracle.norm(x, weight, None, 1e-6, centred=False)).max() <= 1e-5
