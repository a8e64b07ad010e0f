"""Arithmetic of bundles, as properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashfmt import layout
from flashfmt.layout import BundleGeometry

alignments = st.integers(6, 15).map(lambda exponent: 1 << exponent)


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 20))
def test_round_up_is_the_least_multiple_not_below(value, multiple):
    rounded = layout.round_up(value, multiple)
    assert rounded % multiple == 0
    assert value <= rounded < value + multiple


@given(st.integers(1, layout.MAX_ROW_BYTES))
def test_padding_stays_below_an_eighth_or_is_the_least(row_nbytes):
    alignment = layout.choose_alignment(row_nbytes)
    padding = layout.round_up(row_nbytes, alignment) - row_nbytes
    assert alignment in (4096, 512)
    assert padding <= row_nbytes / 8 or alignment == 512


@pytest.mark.parametrize(
    ("row_nbytes", "alignment"), [(24576, 4096), (10240, 512), (4608, 512), (6912, 512), (4096, 4096), (3640, 512)]
)
def test_alignment_of_real_rows(row_nbytes, alignment):
    assert layout.choose_alignment(row_nbytes) == alignment


@given(st.integers(1, 1000), st.integers(1, 1 << 16), st.none() | alignments)
def test_bundles_tile_their_payload(n_neurons, row_nbytes, alignment):
    geometry = BundleGeometry.for_rows(n_neurons, row_nbytes, alignment)
    assert geometry.stride % geometry.alignment == 0
    assert geometry.row_nbytes <= geometry.stride < row_nbytes + geometry.alignment
    previous = 0
    for neuron in {0, n_neurons // 2, n_neurons - 1}:
        start, stop = geometry.bundle_range(neuron)
        assert (start, stop - start) == (neuron * geometry.stride, row_nbytes)
        previous = max(previous, stop)
    assert previous <= geometry.index_offset == n_neurons * geometry.stride
    assert geometry.payload_nbytes == geometry.index_offset + 16 * n_neurons + 4


@pytest.mark.parametrize("neuron", [-1, 3])
def test_no_range_outside_the_layer(neuron):
    with pytest.raises(IndexError):
        BundleGeometry.for_rows(3, 100).bundle_range(neuron)
