"""`matmul` and `rows` of every backend against float64, for every encoding."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashfmt.encodings import Encoding
from reference_engine.backends import Matrix

EXACT, ROUNDED = 5e-6, 5e-5

FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def bound(encoding: Encoding, n_tokens: int) -> float:
    """Error relative to the largest output: q4 rounds the activations of one token to 16 bits."""
    return ROUNDED if encoding is Encoding.Q4 and n_tokens == 1 else EXACT


@FEW
@given(
    n_rows=st.integers(1, 150), units=st.integers(1, 9), n_cols=st.integers(1, 400),
    n_tokens=st.sampled_from([1, 1, 2, 7, 33, 50]),
    misalignment=st.sampled_from([0, 4, 36]), with_bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_matches_float64(
    backend, oracle, weights, relative_error, encoding, n_rows, units, n_cols, n_tokens, misalignment, with_bias, seed
):
    source = weights(seed)
    n_cols = 64 * units if encoding.is_quantised else n_cols
    matrix, decoded = source.matrix(encoding, n_rows, n_cols, misalignment)
    x = source.normal(n_tokens, n_cols)
    bias = source.normal(n_rows) if with_bias else None
    out = np.full((n_tokens, n_rows), np.nan, np.float32)
    expected = oracle.matmul(decoded, x, bias)
    assert backend.matmul(matrix, x, out, bias) is out
    largest = np.abs(decoded).astype(np.float64).max(initial=0) * np.abs(x).max() * np.sqrt(n_cols)
    assert np.abs(out - expected).max() <= 2 * bound(encoding, n_tokens) * largest
    assert np.array_equal(backend.matmul(matrix, x, None, bias), out)


def test_error_of_a_large_matrix(backend, oracle, weights, relative_error, encoding):
    source = weights(1)
    matrix, decoded = source.matrix(encoding, 256, 4096)
    x = source.normal(1, 4096)
    assert relative_error(backend.matmul(matrix, x), oracle.matmul(decoded, x)) <= bound(encoding, 1)
    for size in (80, 1000):
        x[0, [17, 1000]] = 0.75 * size, -size
        assert relative_error(backend.matmul(matrix, x), oracle.matmul(decoded, x)) <= 2 * bound(encoding, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(backend, weights, encoding, bad):
    source = weights(7)
    matrix, _ = source.matrix(encoding, 5, 128)
    for n_tokens in (1, 3):
        x = source.normal(n_tokens, 128)
        x[:, 40] = bad
        with np.errstate(invalid="ignore"):
            assert not np.isfinite(backend.matmul(matrix, x)).any()


def test_rows_may_lie_apart(backend, oracle, weights, relative_error, encoding):
    source = weights(2)
    matrix, decoded = source.matrix(encoding, 41, 128)
    spread = Matrix(encoding, 21, 128, matrix.data[::2])
    x = source.normal(3, 128)
    assert relative_error(backend.matmul(spread, x), oracle.matmul(decoded[::2], x)) <= 1e-5


def test_rows_decode(backend, weights, encoding):
    matrix, decoded = weights(3).matrix(encoding, 30, 64)
    ids = np.array([29, 0, 7, 7])
    assert np.array_equal(backend.rows(matrix, ids), decoded[ids])
    assert backend.rows(matrix, ids[:0]).shape == (0, 64)
    with pytest.raises(IndexError):
        backend.rows(matrix, np.array([30]))
    with pytest.raises(IndexError):
        backend.rows(matrix, np.array([-1]))


def test_same_bits_with_any_number_of_threads_and_rows(numba_backends, weights, encoding):
    one, two = numba_backends
    source = weights(4)
    matrix, _ = source.matrix(encoding, 101, 320)
    for n_tokens in (1, 37):
        x = source.normal(n_tokens, 320)
        whole = one.matmul(matrix, x)
        assert np.array_equal(two.matmul(matrix, x), whole)
        for rows in (slice(0, 1), slice(3, 50), slice(98, 101)):
            part = Matrix(encoding, rows.stop - rows.start, 320, matrix.data[rows])
            assert np.array_equal(two.matmul(part, x), whole[:, rows])


def test_a_token_does_not_depend_on_the_others(numba_backends, weights, encoding):
    source = weights(5)
    matrix, _ = source.matrix(encoding, 40, 192)
    x = source.normal(50, 192)
    whole = numba_backends[1].matmul(matrix, x)
    assert np.array_equal(numba_backends[1].matmul(matrix, x[13:30]), whole[13:30])


def test_half_extremes(backend, relative_error):
    values = np.array([[0.0, -0.0, 6e-8, -5.9e-5, 6.1e-5, 65504.0, -1.0, 1.0009765625]], np.float16)
    matrix = Matrix(Encoding.F16, 1, 8, values)
    for i, value in enumerate(values[0]):
        x = np.zeros((1, 8), np.float32)
        x[0, i] = 1
        assert backend.matmul(matrix, x)[0, 0] == np.float32(value)


def test_shapes_are_checked(numba_backends, weights):
    backend = numba_backends[0]
    matrix, _ = weights(6).matrix(Encoding.F32, 8, 16)
    x = np.zeros((1, 16), np.float32)
    for wrong in (x[:, :8], x.astype(np.float64), np.zeros((16, 1), np.float32).T):
        if wrong.shape == x.shape and wrong.dtype == x.dtype:
            continue
        with pytest.raises(ValueError, match="expected"):
            backend.matmul(matrix, wrong)
    with pytest.raises(ValueError, match="expected"):
        backend.matmul(matrix, x, np.zeros((1, 7), np.float32))
    with pytest.raises(ValueError, match="expected"):
        backend.matmul(matrix, x, None, np.zeros(7, np.float32))
    with pytest.raises(ValueError, match="stored as"):
        Matrix(Encoding.Q8, 8, 16 * 4, np.zeros((8, 64), np.uint8))
