import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfmt.encodings import Encoding, decode, encode
from reference_engine.backends import Matrix
from reference_engine.backends.numpy_backend import NumpyBackend
from reference_engine.selectors import Everything, LowBitGate, LowRankPredictor, Trace

BACKEND = NumpyBackend()


def matrix(weights, encoding=Encoding.F32):
    return Matrix(encoding, *weights.shape, encode(weights, encoding))


@given(
    seed=st.integers(0, 2**32 - 1),
    n_tokens=st.integers(1, 4),
    threshold=st.floats(0.01, 0.99),
    with_bias=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_low_rank_predictor_is_the_papers_formula(seed, n_tokens, threshold, with_bias):
    rng = np.random.default_rng(seed)
    down, up = rng.standard_normal((8, 32), np.float32), rng.standard_normal((50, 8), np.float32)
    bias = rng.standard_normal(50, np.float32) if with_bias else None
    x = rng.standard_normal((n_tokens, 32), np.float32)
    argument = x.astype(np.float64) @ down.T.astype(np.float64) @ up.T.astype(np.float64)
    if bias is not None:
        argument += bias
    probability = 1 / (1 + np.exp(-argument))
    selected = LowRankPredictor(matrix(down), matrix(up), bias, threshold, BACKEND).select(x)
    chosen = np.zeros(50, bool)
    chosen[selected] = True
    clear = np.abs(probability - threshold).min(axis=0) > 1e-4
    np.testing.assert_array_equal(chosen[clear], (probability > threshold).any(axis=0)[clear])
    assert selected.dtype == np.int32
    assert (np.diff(selected) > 0).all()


@pytest.mark.parametrize(("threshold", "n_selected"), [(0.0, 50), (1.0, 0)])
def test_extreme_thresholds_select_all_or_none(threshold, n_selected):
    rng = np.random.default_rng(0)
    predictor = LowRankPredictor(
        matrix(rng.standard_normal((4, 16), np.float32)),
        matrix(rng.standard_normal((50, 4), np.float32)),
        None,
        threshold,
        BACKEND,
    )
    assert len(predictor.select(rng.standard_normal((1, 16), np.float32))) == n_selected


@pytest.mark.parametrize("encoding", [Encoding.Q4, Encoding.Q8, Encoding.F16])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_low_bit_gate_cuts_the_stored_copy(encoding, signed, with_bias):
    rng = np.random.default_rng(1)
    gate = matrix(rng.standard_normal((40, 64), np.float32), encoding)
    x = rng.standard_normal((2, 64), np.float32)
    bias = rng.standard_normal(40, np.float32) if with_bias else None
    scores = x.astype(np.float64) @ decode(gate.data, encoding, 64).T.astype(np.float64)
    scores += 0 if bias is None else bias
    expected = ((scores if signed else np.abs(scores)) > 3.0).any(axis=0)
    selected = LowBitGate(gate, bias, 3.0, BACKEND, signed=signed).select(x)
    np.testing.assert_array_equal(selected, np.flatnonzero(expected))


def test_everything_and_trace():
    x = np.zeros((1, 4), np.float32)
    np.testing.assert_array_equal(Everything(3).select(x), [0, 1, 2])
    recorded = [np.array([1, 5], np.int32), np.array([], np.int32)]
    trace = Trace(recorded)
    assert trace.select(x) is recorded[0]
    assert trace.select(x) is recorded[1]
    with pytest.raises(LookupError, match="no more tokens"):
        trace.select(x)
