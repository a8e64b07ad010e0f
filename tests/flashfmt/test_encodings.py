"""Encodings against plain float64 loops over the bytes that SPEC.md describes."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flashfmt.encodings import Encoding, decode, encode, part_layout, scales

WEIGHT_ENCODINGS = [encoding for encoding in Encoding if encoding.is_weight]
finite = st.floats(-1e4, 1e4, width=32)
rows = st.integers(1, 3).flatmap(
    lambda blocks: hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.just(64 * blocks)), elements=finite)
)


def decoded_q8(raw, n):
    scale = struct.unpack("<f", raw[:4])[0]
    return [scale * q for q in struct.unpack(f"{n}b", raw[64 : 64 + n])]


def decoded_q4(raw, n):
    group_scales = struct.unpack(f"<{n // 32}e", raw[: n // 16])
    start = -(-(n // 16) // 64) * 64
    weights = []
    for j in range(n):
        block, k = divmod(j, 64)
        byte = raw[start + 32 * block + k % 32]
        weights.append(group_scales[j // 32] * ((byte >> 4 if k >= 32 else byte & 15) - 8))
    return weights


@pytest.mark.parametrize(("encoding", "oracle"), [(Encoding.Q8, decoded_q8), (Encoding.Q4, decoded_q4)])
@pytest.mark.parametrize("n", [64, 192, 1088])
def test_quantised_rows_decode_as_specified(encoding, oracle, n):
    rng = np.random.default_rng(n)
    stored = encode(rng.normal(size=(3, n)).astype(np.float32), encoding)
    decoded = decode(stored, encoding, n)
    for row, raw in zip(decoded, stored, strict=True):
        np.testing.assert_allclose(row, oracle(raw.tobytes(), n), rtol=1e-6)


@pytest.mark.parametrize(
    ("encoding", "n", "nbytes", "values_offset"),
    [
        ("q8", 64, 128, 64),
        ("q8", 4096, 4160, 64),
        ("q4", 64, 128, 64),
        ("q4", 4096, 2304, 256),
        ("q4", 2048, 1152, 128),
    ],
)
def test_sizes_of_quantised_rows(encoding, n, nbytes, values_offset):
    layout = part_layout(Encoding(encoding), n)
    assert (layout.nbytes, layout.values_offset, layout.storage_length) == (nbytes, values_offset, nbytes)
    assert encode(np.ones((2, n), np.float32), Encoding(encoding)).shape == (2, nbytes)


@pytest.mark.parametrize("n", [1, 32, 65])
def test_quantised_rows_need_whole_blocks(n):
    for encoding in (Encoding.Q8, Encoding.Q4):
        with pytest.raises(ValueError, match="multiple of 64"):
            part_layout(encoding, n)


@settings(max_examples=40, deadline=None)
@given(rows)
def test_f32_is_lossless_and_copies_nothing(weights):
    assert encode(weights, Encoding.F32) is weights
    assert decode(weights, Encoding.F32) is weights


@settings(max_examples=40, deadline=None)
@given(rows, st.sampled_from([Encoding.F16, Encoding.BF16]))
def test_half_precision_rounds_to_nearest(weights, encoding):
    decoded = decode(encode(weights, encoding), encoding)
    bits, tiny = (11, 2.0**-24) if encoding is Encoding.F16 else (8, 2.0**-133)
    error = np.abs(decoded.astype(np.float64) - weights)
    assert (error <= np.maximum(np.abs(weights) * 2.0**-bits, tiny)).all()
    np.testing.assert_array_equal(decode(encode(decoded, encoding), encoding), decoded)


@settings(max_examples=40, deadline=None)
@given(rows)
def test_q8_errs_by_half_a_step(weights):
    n = weights.shape[-1]
    stored = encode(weights, Encoding.Q8)
    step = scales(stored, part_layout(Encoding.Q8, n)).astype(np.float64)
    assert (np.abs(decode(stored, Encoding.Q8, n) - weights) <= step * 0.51 + 1e-30).all()


@settings(max_examples=40, deadline=None)
@given(rows)
def test_q4_errs_by_one_step_at_most(weights):
    n = weights.shape[-1]
    stored = encode(weights, Encoding.Q4)
    step = np.repeat(np.abs(scales(stored, part_layout(Encoding.Q4, n))).astype(np.float64), 32, axis=-1)
    assert (np.abs(decode(stored, Encoding.Q4, n) - weights) <= step * 1.01 + 2.0**-21).all()


@settings(max_examples=40, deadline=None)
@given(rows, st.sampled_from([Encoding.Q8, Encoding.Q4]))
def test_padding_is_zero(weights, encoding):
    layout = part_layout(encoding, weights.shape[-1])
    stored = encode(weights, encoding)
    n_values = layout.n_values if encoding is Encoding.Q8 else layout.n_values // 2
    assert not stored[:, layout.scales_nbytes : layout.values_offset].any()
    assert not stored[:, layout.values_offset + n_values :].any()


@pytest.mark.parametrize("encoding", WEIGHT_ENCODINGS)
def test_zeros_stay_zeros(encoding):
    decoded = decode(encode(np.zeros((2, 3, 64), np.float32), encoding), encoding, 64)
    assert decoded.shape == (2, 3, 64)
    assert decoded.dtype == np.float32
    assert not decoded.any()


@pytest.mark.parametrize("encoding", WEIGHT_ENCODINGS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(encoding, value):
    weights = np.zeros((1, 64), np.float32)
    weights[0, 7] = value
    for source in (weights, weights.astype(np.float16)):
        with pytest.raises(ValueError, match="finite"):
            encode(source, encoding)


def test_values_beyond_a_type_are_refused():
    for value, encoding in ((1e5, Encoding.F16), (6e5, Encoding.Q4), (3.4e38, Encoding.BF16)):
        with pytest.raises(ValueError, match="beyond"):
            encode(np.full((1, 64), value, np.float32), encoding)


@pytest.mark.parametrize("encoding", [Encoding.U8, Encoding.U32])
def test_integers_are_no_weights(encoding):
    with pytest.raises(ValueError, match="does not encode weights"):
        encode(np.zeros((1, 64), np.float32), encoding)
    with pytest.raises(ValueError, match="does not encode weights"):
        decode(np.zeros((1, 64), encoding.storage_dtype), encoding)


def test_decoding_needs_the_right_number_of_weights():
    stored = encode(np.ones((1, 64), np.float32), Encoding.Q4)
    with pytest.raises(ValueError, match="number of weights"):
        decode(stored, Encoding.Q4)
    with pytest.raises(ValueError, match="bytes"):
        decode(stored, Encoding.Q4, 1024)
