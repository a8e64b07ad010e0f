"""Every kernel against float64, by way of the backend that launches it: fresh inputs, poisoned outputs."""

from typing import get_args

import numpy as np
import pytest

from flashfmt.encodings import Encoding
from flashfmt.manifest import Activation, ActivationKind
from reference_engine.backends import FfnShape, Matrix

SILU, RELU = Activation(kind="silu"), Activation(kind="relu")


def fresh():
    return int(np.random.SeedSequence().entropy % 2**32)


@pytest.fixture
def source(weights, record_property):
    seed = fresh()
    record_property("seed", seed)
    return weights(seed)


@pytest.fixture
def stored(on_device):
    """A matrix whose data lie on the device."""
    return lambda m: Matrix(m.encoding, m.n_rows, m.n_cols, on_device(m.data))


@pytest.mark.parametrize("n_tokens", [1, 2, 7, 9, 70])
@pytest.mark.parametrize(("n_rows", "n_cols"), [(1, 64), (37, 192), (130, 320)])
def test_matmul(backend, device, oracle, source, stored, on_device, encoding, n_tokens, n_rows, n_cols):
    matrix, decoded = source.matrix(encoding, n_rows, n_cols)
    x, bias = source.normal(n_tokens, n_cols), source.normal(n_rows)
    out = on_device(np.full((n_tokens, n_rows), np.nan, np.float32))
    assert backend.matmul(stored(matrix), on_device(x), out, on_device(bias)) is out
    expected = oracle.matmul(decoded, x, bias)
    bound = np.abs(decoded).max() * np.abs(x).max() * np.sqrt(n_cols)
    assert np.abs(device.download(out) - expected).max() <= 1e-5 * bound
    plain = device.download(backend.matmul(stored(matrix), on_device(x)))
    assert np.abs(plain - oracle.matmul(decoded, x)).max() <= 1e-5 * bound


@pytest.mark.parametrize("encoding", [Encoding.F32, Encoding.F16, Encoding.BF16], ids=str)
@pytest.mark.parametrize("n_cols", [1, 3, 100, 301])
def test_rows_of_any_width(backend, device, oracle, source, stored, on_device, relative_error, encoding, n_cols):
    for n_tokens in (1, 3, 12):
        matrix, decoded = source.matrix(encoding, 21, n_cols)
        x = source.normal(n_tokens, n_cols)
        out = device.download(backend.matmul(stored(matrix), on_device(x)))
        assert relative_error(out, oracle.matmul(decoded, x)) <= 1e-5


def test_error_of_a_wide_row(backend, device, oracle, source, stored, on_device, relative_error, encoding):
    matrix, decoded = source.matrix(encoding, 6, 4096)
    x = source.normal(1, 4096)
    assert (
        relative_error(device.download(backend.matmul(stored(matrix), on_device(x))), oracle.matmul(decoded, x)) <= 1e-5
    )


def test_what_is_not_finite_stays_so(backend, device, source, stored, on_device, encoding):
    matrix, _ = source.matrix(encoding, 5, 128)
    for n_tokens in (1, 3, 10):
        x = source.normal(n_tokens, 128)
        x[:, 40] = np.nan
        assert np.isnan(device.download(backend.matmul(stored(matrix), on_device(x)))).all()


def test_rows_decode(backend, device, source, stored, encoding):
    matrix, decoded = source.matrix(encoding, 30, 128)
    ids = np.array([29, 0, 7, 7])
    assert np.array_equal(device.download(backend.rows(stored(matrix), ids)), decoded[ids])
    assert backend.rows(stored(matrix), ids[:0]).shape == (0, 128)
    for bad in (30, -1):
        with pytest.raises(IndexError):
            backend.rows(stored(matrix), np.array([bad]))


@pytest.mark.parametrize("n_tokens", [1, 5, 20])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("d_model", [64, 320])
def test_ffn(backend, device, oracle, source, on_device, relative_error, encoding, n_tokens, gated, d_model):
    shape, rows, bundles = source.bundles(encoding, 150, d_model, SILU if gated else RELU, gated=gated)
    slots = source.rng.permutation(150)[:131].astype(np.int32)
    x, start, up_bias = source.normal(n_tokens, d_model), source.normal(n_tokens, d_model), source.normal(131)
    gate_bias = source.normal(131) if gated else None
    out = on_device(start)
    biases = {"up_bias": on_device(up_bias), "gate_bias": on_device(gate_bias)}
    backend.ffn(shape, on_device(rows), on_device(slots), on_device(x), out, **biases)
    expected = start + oracle.ffn(shape, bundles[slots], x, up_bias, gate_bias)
    assert relative_error(device.download(out), expected) <= 2e-5

    out = on_device(start)
    backend.ffn(shape, on_device(rows), None, on_device(x), out)
    assert relative_error(device.download(out), start + oracle.ffn(shape, bundles, x)) <= 2e-5


@pytest.mark.parametrize("encoding", [Encoding.F32, Encoding.F16, Encoding.BF16], ids=str)
def test_ffn_of_any_width(backend, device, oracle, source, on_device, relative_error, encoding):
    for d_model, n_tokens in ((1, 1), (37, 1), (37, 3), (101, 11)):
        shape, rows, bundles = source.bundles(encoding, 70, d_model, RELU)
        x, out = source.normal(n_tokens, d_model), on_device(np.zeros((n_tokens, d_model), np.float32))
        backend.ffn(shape, on_device(rows), None, on_device(x), out)
        assert relative_error(device.download(out), oracle.ffn(shape, bundles, x)) <= 2e-5


@pytest.mark.parametrize("kind", get_args(ActivationKind))
@pytest.mark.parametrize("n_tokens", [1, 10])
def test_activations(backend, device, oracle, source, on_device, relative_error, kind, n_tokens):
    activation = Activation(kind=kind, threshold=0.25 if kind == "fatrelu" else 0.0)
    for gated in (False, True):
        shape, rows, bundles = source.bundles(Encoding.F32, 70, 32, RELU if gated else activation, gated=gated)
        if gated:
            shape = FfnShape(shape.encoding, shape.parts, 32, shape.part, shape.stride, RELU, activation)
        x, out = 20 * source.normal(n_tokens, 32), on_device(np.zeros((n_tokens, 32), np.float32))
        backend.ffn(shape, on_device(rows), None, on_device(x), out)
        assert relative_error(device.download(out), oracle.ffn(shape, bundles, x)) <= 4e-6


@pytest.mark.parametrize("n_tokens", [1, 11])
def test_same_bits_however_cut(backend, device, source, on_device, encoding, n_tokens):
    d_model = 192 if encoding.is_quantised else 200
    shape, rows, _ = source.bundles(encoding, 200, d_model, SILU)
    x, start = source.normal(n_tokens, d_model), source.normal(n_tokens, d_model)
    whole = on_device(start)
    backend.ffn(shape, on_device(rows), None, on_device(x), whole)
    ring = np.full((300, shape.stride), 0xFF, np.uint8)
    slots = source.rng.permutation(300)[:200].astype(np.int32)
    ring[slots] = rows
    out = on_device(start)
    for part in (slice(0, 64), slice(64, 192), slice(192, 200)):
        backend.ffn(shape, on_device(ring), on_device(slots[part]), on_device(x), out)
    assert np.array_equal(device.download(out), device.download(whole))


def test_host_slots_are_checked(backend, source, on_device):
    shape, rows, _ = source.bundles(Encoding.F32, 4, 16, RELU)
    x, out = on_device(np.ones((1, 16), np.float32)), on_device(np.zeros((1, 16), np.float32))
    for slot in (-1, 4):
        with pytest.raises(IndexError):
            backend.ffn(shape, on_device(rows), np.array([0, slot], np.int32), x, out)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("n_tokens", "n_past", "n_heads", "n_kv_heads", "width", "window"),
    [(1, 0, 1, 1, 3, None), (1, 299, 6, 2, 64, None), (1, 200, 4, 4, 130, 40), (9, 150, 4, 2, 16, 33),
     (70, 0, 2, 1, 80, None), (3, 140, 3, 3, 128, 1)],
)  # fmt: skip
def test_attention(
    backend, device, oracle, source, on_device, relative_error, dtype, n_tokens, n_past, n_heads, n_kv_heads, width,
    window,
):  # fmt: skip
    q = 2 * source.normal(n_tokens, n_heads, width)
    cache = [source.normal(n_kv_heads, n_past + n_tokens + 5, width).astype(dtype) for _ in range(2)]
    for array in cache:
        array[:, n_past + n_tokens :] = np.nan
    keys, values = map(on_device, cache)
    out = device.download(backend.attend(on_device(q), keys, values, n_past=n_past, scale=0.3, window=window))
    assert relative_error(out, oracle.attend(q, *cache, n_past, 0.3, window)) <= 5e-6


def test_attention_with_extreme_scores(backend, device, oracle, source, on_device, relative_error):
    q, keys, values = source.normal(1, 2, 64), source.normal(2, 200, 64), source.normal(2, 200, 64)
    keys[:, 150] = 400 * q[0]
    out = device.download(backend.attend(on_device(q), on_device(keys), on_device(values), n_past=199, scale=1.0))
    assert relative_error(out, oracle.attend(q, keys, values, 199, 1.0, None)) <= 1e-5


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_new_keys_and_values_are_stored_behind_the_old(backend, device, source, on_device, dtype):
    before = [source.normal(3, 20, 24).astype(dtype) for _ in range(2)]
    keys, values = map(on_device, before)
    new = [100 * source.normal(5, 3, 24) for _ in range(2)]
    new[0][0, 0, :6] = 0, -0.0, 6e-8, 65504, 1e-7, -70000 if dtype == np.float32 else -65504
    backend.append_kv(on_device(new[0]), on_device(new[1]), keys, values, 11)
    for old, added, kept in zip(before, new, (keys, values), strict=True):
        old[:, 11:16] = added.swapaxes(0, 1)
        assert np.array_equal(device.download(kept), old)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("n_pairs", [3, 8])
def test_rotation(backend, device, oracle, source, on_device, relative_error, pairing, n_pairs):
    x, angles = source.normal(5, 3, 16), source.normal(5, n_pairs)
    cos, sin = np.cos(angles), np.sin(angles)
    turned = on_device(x)
    backend.rotate(turned, on_device(cos), on_device(sin), pairing)
    assert relative_error(device.download(turned), oracle.rotate(x, cos, sin, pairing)) <= 1e-6


@pytest.mark.parametrize("width", [1, 33, 700])
@pytest.mark.parametrize("with_weights", [False, True])
def test_norms(backend, device, oracle, source, on_device, relative_error, width, with_weights):
    x = source.normal(4, width) + 3
    weight, bias = (source.normal(width) if with_weights else None for _ in range(2))
    rms = device.download(backend.rms_norm(on_device(x), on_device(weight), 1e-5))
    assert relative_error(rms, oracle.norm(x, weight, None, 1e-5, centred=False)) <= 2e-6
    layer = device.download(backend.layer_norm(on_device(x), on_device(weight), on_device(bias), 1e-5))
    assert relative_error(layer, oracle.norm(x, weight, bias, 1e-5, centred=True)) <= 1e-5


@pytest.mark.parametrize("n", [1, 31, 1024, 2500])
@pytest.mark.parametrize("n_tokens", [1, 3])
@pytest.mark.parametrize("magnitude", [False, True])
def test_active_ids_are_sorted_and_complete(backend, source, on_device, n, n_tokens, magnitude):
    scores = source.normal(n_tokens, n)
    scores[:, ::7] = np.nan
    for cut in (-np.inf, 0.0, 1.5, np.inf):
        size = np.abs(scores) if magnitude else scores
        expected = np.flatnonzero((size > np.float32(cut)).any(axis=0))
        active = backend.active_ids(on_device(scores), cut, magnitude=magnitude)
        assert active.dtype == np.int32
        assert np.array_equal(active, expected)


def test_rows_move_between_slots(device, source, on_device):
    rows = source.rng.integers(0, 256, (9, 80), np.uint8)
    target = on_device(np.zeros((12, 80), np.uint8))
    from_, to = np.array([8, 0, 3], np.int32), np.array([11, 5, 0], np.int32)
    stride = np.int64(80)
    device.launch(
        "move_rows",
        (3, 1, 1),
        128,
        on_device(rows),
        on_device(from_),
        target,
        on_device(to),
        stride,
        stride,
        queue="copy",
    )
    expected = np.zeros((12, 80), np.uint8)
    expected[to] = rows[from_]
    device.synchronize(device.record("copy"))
    assert np.array_equal(device.download(target), expected)


def test_shapes_are_checked(backend, source, stored, on_device):
    matrix, _ = source.matrix(Encoding.F32, 8, 16)
    matrix, x = stored(matrix), on_device(np.zeros((1, 16), np.float32))
    with pytest.raises(ValueError, match="expected"):
        backend.matmul(matrix, x[:, :8])
    with pytest.raises(ValueError, match="expected"):
        backend.matmul(matrix, x, on_device(np.zeros((1, 7), np.float32)))
    with pytest.raises(ValueError, match="expected"):
        backend.matmul(matrix, x, None, on_device(np.zeros(7, np.float32)))
