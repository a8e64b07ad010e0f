import numpy as np
import pytest

import flashfmt
from flashfmt.encodings import Encoding, decode, part_layout
from flashfmt.errors import ChecksumError, UnsupportedError
from flashfmt.manifest import Activation
from reference_engine.backends import Matrix
from reference_engine.backends.numpy_backend import NumpyBackend
from reference_engine.selectors import Oracle, Threshold
from reference_engine.selectors.resident_parts import load_parts, part_nbytes

BACKEND = NumpyBackend()
RNG = np.random.default_rng(4)
GATE, UP = RNG.standard_normal((2, 60, 32), np.float32)
GATE_BIAS, UP_BIAS = RNG.standard_normal((2, 60), np.float32)
X = RNG.standard_normal((3, 32), np.float32)
IDENTITY = Activation(kind="identity")


def f32(weights):
    return Matrix(Encoding.F32, *weights.shape, weights)


def silu(x):
    return x / (1 + np.exp(-x))


ACTIVATIONS = {
    "relu": (Activation(kind="relu"), lambda x: np.maximum(x, 0)),
    "fatrelu": (Activation(kind="fatrelu", threshold=2.0), lambda x: np.where(x > 2, x, 0)),
    "silu": (Activation(kind="silu"), silu),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("cut", [0.0, 1.5])
@pytest.mark.parametrize("bias", [None, GATE_BIAS])
def test_threshold_cuts_the_activated_gate(kind, cut, bias):
    activation, function = ACTIVATIONS[kind]
    gate = X.astype(np.float64) @ GATE.T.astype(np.float64) + (0 if bias is None else bias)
    expected = np.flatnonzero((np.abs(function(gate)) > cut).any(axis=0))
    selected = Threshold(f32(GATE), bias, activation, cut, BACKEND).select(X)
    np.testing.assert_array_equal(selected, expected)
    assert selected.dtype == np.int32


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("epsilon", [0.0, 0.5])
@pytest.mark.parametrize("gated", [True, False])
def test_the_oracle_knows_what_is_not_zero(kind, epsilon, gated):
    activation, function = ACTIVATIONS[kind]
    up = X.astype(np.float64) @ UP.T.astype(np.float64) + UP_BIAS
    gate = X.astype(np.float64) @ GATE.T.astype(np.float64)
    h = function(gate) * np.maximum(up, 0) if gated else function(up)
    oracle = Oracle(
        f32(UP),
        UP_BIAS,
        activation,
        gate=f32(GATE) if gated else None,
        gate_bias=None,
        up_activation=Activation(kind="relu") if gated else IDENTITY,
        epsilon=epsilon,
        backend=BACKEND,
    )
    np.testing.assert_array_equal(oracle.select(X), np.flatnonzero((np.abs(h) > epsilon).any(axis=0)))


@pytest.mark.parametrize("container", ["file", "directory"])
@pytest.mark.parametrize("encoding", ["f32", "bf16", "q8", "q4"])
@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_copies_of_parts_are_the_parts(synthetic, kind, encoding, container):
    with flashfmt.open(synthetic(kind, encoding, "f16", container)) as model:
        info = model.layers[1]
        weights = model.bundles(1).decode(range(info.geometry.n_neurons))
        for part, copy in load_parts(model, 1, info.parts).items():
            assert copy.encoding == info.encoding
            assert copy.data.nbytes <= part_nbytes(info) < copy.data.nbytes + 4096
            decoded = decode(copy.data, copy.encoding, copy.n_cols)
            np.testing.assert_array_equal(decoded, weights[:, info.parts.index(part)])


def test_copies_can_be_made_in_few_bits(synthetic):
    with flashfmt.open(synthetic("gated", "f32")) as model:
        info = model.layers[0]
        gate = load_parts(model, 0, ("gate",), encoding=Encoding.Q4)["gate"]
        assert gate.encoding is Encoding.Q4
        assert gate.data.shape == (320, part_layout(Encoding.Q4, 128).nbytes)
        assert part_nbytes(info, Encoding.Q4) <= part_nbytes(info) / 4
        weights = model.bundles(0).decode(range(320))[:, 0]
        error = np.abs(decode(gate.data, Encoding.Q4, 128) - weights)
        assert 0 < error.max() < np.abs(weights).max() / 7


def test_damaged_bundles_are_not_copied(synthetic, tmp_path):
    path = tmp_path / "damaged.flash"
    data = bytearray(synthetic().read_bytes())
    with flashfmt.open(synthetic()) as model:
        data[model.layers[1].extent.offset + 9 * model.layers[1].geometry.stride] ^= 1
    path.write_bytes(data)
    with flashfmt.open(path) as model:
        load_parts(model, 1, ("up",), verify="never")
        with pytest.raises(ChecksumError, match="layer 1, neuron 9"):
            load_parts(model, 1, ("up",))


def test_widths_that_cannot_be_quantised_are_refused(tmp_path):
    from reference_engine.synthetic import Shape, write_synthetic

    path = tmp_path / "narrow.flash"
    write_synthetic(path, Shape("narrow", 1, 48, 64, 4, 4, 50, plain=True, tied=True, context_tokens=64))
    with flashfmt.open(path) as model, pytest.raises(UnsupportedError, match="multiple of 64"):
        part_nbytes(model.layers[0], Encoding.Q4)
