"""Blocks of weights: finite checks, re-encoding, transposition, bundles."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfmt.convert.checkpoint import SourceTensor
from flashfmt.convert.weights import check_finite, encode_rows, interleave, transpose_columns
from flashfmt.encodings import Encoding, decode, encode
from flashfmt.errors import CheckpointError

PLAIN = [Encoding.F32, Encoding.F16, Encoding.BF16]


def source(weights, encoding):
    return SourceTensor(encoding, encode(np.asarray(weights, np.float32), encoding))


@pytest.mark.parametrize("encoding", PLAIN)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_value_that_is_not_finite_is_named(encoding, bad):
    weights = np.ones((600, 512), np.float32)
    weights[0, :3] = [0, -65504, 6e-8]
    tensor = source(weights, encoding)
    check_finite(tensor, "w")
    bits = {Encoding.F32: np.float32(bad), Encoding.F16: np.float16(bad)}.get(encoding)
    if bits is None:
        bits = np.float32(bad).view(np.uint32) >> np.uint32(16)
    tensor.data[571, 3] = bits
    tensor.data[590, 0] = bits
    with pytest.raises(CheckpointError, match=r"w: not a finite weight .*index \[1571, 3\]"):
        check_finite(tensor, "w", first_row=1000)


@pytest.mark.parametrize("target", list(Encoding)[:5])
@pytest.mark.parametrize("encoding", PLAIN)
def test_re_encoding_equals_encoding_the_values(encoding, target):
    tensor = source(np.random.default_rng(1).standard_normal((3, 64)), encoding)
    expected = encode(decode(tensor.data, encoding), target)
    result = encode_rows(tensor, target, "w")
    assert result.dtype == target.storage_dtype
    np.testing.assert_array_equal(result, expected)
    assert (result is tensor.data) == (encoding is target)


def test_values_that_do_not_fit_are_refused_by_name():
    with pytest.raises(CheckpointError, match=r"w: .*beyond float16"):
        encode_rows(source(np.full((2, 4), 1e6), Encoding.BF16), Encoding.F16, "w")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_transposition_equals_numpys(data):
    n_rows, n_columns = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 400))
    start = data.draw(st.integers(0, n_columns - 1))
    stop = data.draw(st.integers(start + 1, n_columns))
    matrix = np.arange(n_rows * n_columns, dtype=np.uint32).reshape(n_rows, n_columns)
    out = np.empty((stop - start, n_rows), np.uint32)
    transpose_columns(matrix, start, stop, out)
    np.testing.assert_array_equal(out, matrix[:, start:stop].T)


@pytest.mark.parametrize("target", [Encoding.F16, Encoding.Q8, Encoding.Q4])
def test_bundles_hold_rows_and_columns(target):
    rng = np.random.default_rng(2)
    gate, up, down = rng.standard_normal((5, 64)), rng.standard_normal((5, 64)), rng.standard_normal((64, 9))
    rows = [("g", source(gate, Encoding.F16)), ("u", source(up, Encoding.F32))]
    bundles = interleave(rows, "d", source(down, Encoding.F16), 3, target)
    values = decode(bundles, target, 64)
    assert values.shape == (5, 3, 64)
    parts = [(gate, Encoding.F16), (up, Encoding.F32), (down[:, 3:8].T, Encoding.F16)]
    for part, (wanted, encoding) in enumerate(parts):
        expected = encode(decode(source(wanted, encoding).data, encoding), target)
        np.testing.assert_array_equal(bundles[:, part], expected)
        np.testing.assert_allclose(values[:, part], wanted, atol=0.3 if target is Encoding.Q4 else 0.02)
