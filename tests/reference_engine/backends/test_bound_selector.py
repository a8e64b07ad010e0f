"""`bind_selector`: one call chooses the rows that the products of the backend say."""

import numpy as np
import pytest

from flashfmt.encodings import Encoding
from reference_engine.backends import Matrix
from reference_engine.backends.numpy_backend import NumpyBackend

WIDTH, RANK, N_ROWS = 192, 64, 333


@pytest.mark.parametrize("n_matrices", [1, 2])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_rows_above_a_cut(numba_backends, weights, encoding, n_matrices, signed, with_bias):
    source = weights(30)
    down, up = source.matrix(encoding, RANK, WIDTH)[0], source.matrix(encoding, N_ROWS, RANK)[0]
    matrices = [down, up] if n_matrices == 2 else [source.matrix(encoding, N_ROWS, WIDTH)[0]]
    bias = source.normal(N_ROWS) if with_bias else None
    x = source.normal(1, WIDTH)
    backend = numba_backends[0]
    scores = x
    for matrix in matrices:
        scores = backend.matmul(matrix, scores, bias=bias if matrix is matrices[-1] else None)
    if not signed:
        scores = np.abs(scores)
    for cut in (float(np.median(scores)), -np.inf, np.inf, float(scores.max())):
        expected = np.flatnonzero(scores[0] > np.float32(cut))
        for other in numba_backends:
            chosen = other.bind_selector(matrices, bias, cut, signed=signed)(x)
            assert chosen.dtype == np.int32
            np.testing.assert_array_equal(chosen, expected)


def test_what_is_not_a_number_is_not_chosen(numba_backends, weights):
    source = weights(31)
    matrix, bias = source.matrix(Encoding.F16, N_ROWS, WIDTH)[0], source.normal(N_ROWS)
    bias[::3] = np.nan
    selection = numba_backends[0].bind_selector([matrix], bias, -np.inf, signed=True)
    np.testing.assert_array_equal(selection(source.normal(1, WIDTH)), np.flatnonzero(~np.isnan(bias)))


def test_a_choice_stays_as_it_is(numba_backends, weights):
    source = weights(32)
    selection = numba_backends[0].bind_selector([source.matrix(Encoding.F16, N_ROWS, WIDTH)[0]], None, 0.0, signed=True)
    first = selection(source.normal(1, WIDTH))
    before = first.copy()
    selection(source.normal(1, WIDTH))
    np.testing.assert_array_equal(first, before)


def test_what_does_not_go_together(numba_backends, weights):
    source, backend = weights(33), numba_backends[0]
    down, up = source.matrix(Encoding.F16, RANK, WIDTH)[0], source.matrix(Encoding.F16, N_ROWS, RANK)[0]
    with pytest.raises(ValueError, match="go with"):
        backend.bind_selector([up, down], None, 0.0, signed=True)
    with pytest.raises(ValueError, match="expected"):
        backend.bind_selector([down, up], source.normal(N_ROWS + 1), 0.0, signed=True)
    with pytest.raises(ValueError, match="expected"):
        backend.bind_selector([down, up], None, 0.0, signed=True)(source.normal(2, WIDTH))
    other = Matrix(Encoding.F32, N_ROWS, RANK, source.normal(N_ROWS, RANK))
    assert backend.bind_selector([down, other], None, 0.0, signed=True) is None
    assert NumpyBackend().bind_selector([down, up], None, 0.0, signed=True) is None
