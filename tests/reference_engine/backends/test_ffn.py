"""`ffn` of every backend against float64, and the promise that the same bits come out however the work is cut."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashfmt.encodings import Encoding
from flashfmt.manifest import Activation, ActivationKind
from reference_engine.backends.activations import ACTIVATION_CODES
from reference_engine.backends.numba_kernels import ffn_one
from reference_engine.backends.numba_weights import TAGS

FEW = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SILU, RELU = Activation(kind="silu"), Activation(kind="relu")
EXACT, ROUNDED = 2e-5, 1e-4


def bound(encoding: Encoding) -> float:
    """Error relative to the largest output: activations and factors of one token and q4 have 16 bits."""
    return ROUNDED if encoding is Encoding.Q4 else EXACT


@FEW
@given(
    n_rows=st.integers(1, 200), units=st.integers(1, 5), width=st.integers(1, 300),
    n_tokens=st.sampled_from([1, 1, 2, 9, 33]),
    gated=st.booleans(), by_slots=st.booleans(), with_bias=st.booleans(), seed=st.integers(0, 99), data=st.data(),
)  # fmt: skip
def test_matches_float64(
    backend,
    oracle,
    weights,
    relative_error,
    encoding,
    n_rows,
    units,
    width,
    n_tokens,
    gated,
    by_slots,
    with_bias,
    seed,
    data,
):
    source = weights(seed)
    d_model = 64 * units if encoding.is_quantised else width
    activation = SILU if gated else RELU
    shape, rows, bundles = source.bundles(encoding, n_rows, d_model, activation, gated=gated)
    slots = None
    if by_slots:
        slots = source.rng.integers(0, n_rows, data.draw(st.integers(0, 150))).astype(np.int32)
        bundles = bundles[slots]
    n = len(bundles)
    up_bias, gate_bias = (source.normal(n) for _ in range(2)) if with_bias else (None, None)
    x = source.normal(n_tokens, d_model)
    start = source.normal(n_tokens, d_model)
    out = start.copy()
    backend.ffn(shape, rows, slots, x, out, up_bias=up_bias, gate_bias=gate_bias if gated else None)
    expected = start + oracle.ffn(shape, bundles, x, up_bias, gate_bias)
    assert relative_error(out, expected) <= bound(encoding)


@pytest.mark.parametrize("kind", get_args(ActivationKind))
@pytest.mark.parametrize("n_tokens", [1, 5])
def test_activations(backend, oracle, weights, relative_error, kind, n_tokens):
    source = weights(7)
    activation = Activation(kind=kind, threshold=0.25 if kind == "fatrelu" else 0.0)
    shape, rows, bundles = source.bundles(Encoding.F32, 70, 32, activation, gated=False)
    x = 20 * source.normal(n_tokens, 32)
    out = np.zeros((n_tokens, 32), np.float32)
    backend.ffn(shape, rows, None, x, out)
    assert relative_error(out, oracle.ffn(shape, bundles, x)) <= 2e-6


def test_up_activation(backend, oracle, weights, relative_error):
    source = weights(8)
    shape, rows, bundles = source.bundles(Encoding.F16, 70, 48, RELU)
    shape = type(shape)(
        shape.encoding, shape.parts, shape.d_model, shape.part, shape.stride, RELU, Activation(kind="relu2")
    )
    for n_tokens in (1, 20):
        x = source.normal(n_tokens, 48)
        out = np.zeros((n_tokens, 48), np.float32)
        backend.ffn(shape, rows, None, x, out)
        assert relative_error(out, oracle.ffn(shape, bundles, x)) <= 2e-6


def test_error_of_a_wide_layer(backend, oracle, weights, relative_error, encoding):
    source = weights(9)
    shape, rows, bundles = source.bundles(encoding, 512, 2048, SILU)
    for n_tokens in (1, 16):
        for outlier in (1, 40):
            x = source.normal(n_tokens, 2048)
            x[:, 100] *= outlier
            out = np.zeros((n_tokens, 2048), np.float32)
            backend.ffn(shape, rows, None, x, out)
            assert relative_error(out, oracle.ffn(shape, bundles, x)) <= bound(encoding)


@pytest.mark.parametrize("outlier", [1, 100, 10_000])
def test_error_of_neurons_of_very_different_size(backend, oracle, weights, relative_error, encoding, outlier):
    """A neuron that outweighs all others takes no more from their precision than from float32 sums."""
    source = weights(14)
    shape, rows, bundles = source.bundles(encoding, 200, 448, RELU, gated=False)
    up_bias = source.normal(200)
    up_bias[[3, 77, 150]] = outlier
    x = source.normal(1, 448)
    out = np.zeros((1, 448), np.float32)
    backend.ffn(shape, rows, None, x, out, up_bias=up_bias)
    assert relative_error(out, oracle.ffn(shape, bundles, x, up_bias)) <= bound(encoding)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("gated", [True, False])
def test_what_is_not_finite_stays_so(backend, weights, encoding, bad, gated):
    source = weights(15)
    shape, rows, _ = source.bundles(encoding, 70, 192, Activation(kind="identity"), gated=gated)
    for n_tokens in (1, 3):
        x = source.normal(n_tokens, 192)
        x[:, 100] = bad
        out = np.zeros((n_tokens, 192), np.float32)
        with np.errstate(invalid="ignore"):
            backend.ffn(shape, rows, None, x, out)
        assert not np.isfinite(out).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_neuron_that_is_not_finite(backend, weights, encoding, bad):
    source = weights(16)
    shape, rows, _ = source.bundles(encoding, 70, 192, Activation(kind="identity"), gated=False)
    up_bias = source.normal(70)
    up_bias[67] = bad
    out = np.zeros((1, 192), np.float32)
    with np.errstate(invalid="ignore"):
        backend.ffn(shape, rows, None, source.normal(1, 192), out, up_bias=up_bias)
    assert not np.isfinite(out).any()


@pytest.mark.parametrize("activation", [SILU, RELU], ids=["silu", "relu"])
@pytest.mark.parametrize("n_tokens", [1, 11])
def test_same_bits_however_cut(backend, numba_backends, weights, encoding, activation, n_tokens):
    """Blocks of any multiple of 64 bundles, in place or scattered over slots of another array, one thread or two."""
    source = weights(10)
    d_model = 192 if encoding.is_quantised else 200
    shape, rows, _ = source.bundles(encoding, 300, d_model, activation)
    up_bias, gate_bias = source.normal(300), source.normal(300)
    x = source.normal(n_tokens, d_model)
    start = source.normal(n_tokens, d_model)

    whole = start.copy()
    backend.ffn(shape, rows, None, x, whole, up_bias=up_bias, gate_bias=gate_bias)
    for block in (64, 128, 192):
        for scattered in (False, True):
            out = start.copy()
            for first in range(0, 300, block):
                part = slice(first, min(first + block, 300))
                taken, slots = rows[part], None
                if scattered:
                    slots = source.rng.permutation(400)[: len(taken)].astype(np.int32)
                    ring = np.full((400, shape.stride), 0xFF, np.uint8)
                    ring[slots] = taken
                    taken = ring
                backend.ffn(shape, taken, slots, x, out, up_bias=up_bias[part], gate_bias=gate_bias[part])
            assert np.array_equal(out, whole)

    results = []
    for other in numba_backends:
        out = start.copy()
        other.ffn(shape, rows, None, x, out, up_bias=up_bias, gate_bias=gate_bias)
        results.append(out)
    assert np.array_equal(*results)


@pytest.mark.parametrize("n", [6, 63, 64, 130, 200, 300])
def test_same_bits_however_threads_share_it(weights, encoding, n):
    """Each thread reads whole blocks and all share the rest, which depends on their number and on that of bundles."""
    source = weights(17)
    d_model = 320 if encoding.is_quantised else 300
    shape, rows, _ = source.bundles(encoding, 300, d_model, RELU)
    x, start = source.normal(1, d_model), source.normal(1, d_model)
    relu, identity = ACTIVATION_CODES["relu"], ACTIVATION_CODES["identity"]
    results = []
    for n_threads in (1, 2, 3, 5, 16):
        out = start.copy()
        ffn_one(
            TAGS[encoding], rows.ctypes.data, shape.stride, 0, n, d_model, shape.part.nbytes, 1, 0, 0, relu, 0.0,
            identity, 0.0, x.ctypes.data, out.ctypes.data, n_threads,
        )  # fmt: skip
        results.append(out)
    assert not np.array_equal(results[0], start)
    for out in results[1:]:
        assert np.array_equal(out, results[0])


@pytest.mark.parametrize("n", [70, 128, 256])
def test_down_rows_of_silent_neurons_are_not_read(numba_backends, weights, encoding, n):
    source = weights(18)
    shape, rows, _ = source.bundles(encoding, n, 192, RELU, gated=False)
    down = slice(shape.part.nbytes, 2 * shape.part.nbytes)
    up_bias = source.normal(n)
    silent = source.rng.random(n) < 0.6
    up_bias[silent] = -1e6
    x = source.normal(1, 192)
    for backend in numba_backends:
        outs = []
        for filling in (0, 0xFF):
            rows[silent, down] = filling
            out = np.zeros((1, 192), np.float32)
            backend.ffn(shape, rows, None, x, out, up_bias=up_bias)
            outs.append(out)
        assert np.isfinite(outs[1]).all()
        assert np.array_equal(*outs)


def test_a_token_does_not_depend_on_the_others(numba_backends, weights, encoding):
    source = weights(11)
    shape, rows, _ = source.bundles(encoding, 100, 128, SILU)
    x = source.normal(40, 128)
    whole, part = np.zeros((40, 128), np.float32), np.zeros((3, 128), np.float32)
    numba_backends[1].ffn(shape, rows, None, x, whole)
    numba_backends[1].ffn(shape, rows, None, x[20:23], part)
    assert np.array_equal(part, whole[20:23])


def test_no_bundles_add_nothing(backend, weights):
    shape, rows, _ = weights(12).bundles(Encoding.F32, 4, 16, RELU)
    out = np.ones((1, 16), np.float32)
    backend.ffn(shape, rows, np.zeros(0, np.int32), np.ones((1, 16), np.float32), out)
    assert np.array_equal(out, np.ones((1, 16)))


def test_slots_are_checked(backend, weights):
    shape, rows, _ = weights(13).bundles(Encoding.F32, 4, 16, RELU)
    x, out = np.ones((1, 16), np.float32), np.zeros((1, 16), np.float32)
    for slot in (-1, 4):
        with pytest.raises(IndexError):
            backend.ffn(shape, rows, np.array([0, slot], np.int32), x, out)
