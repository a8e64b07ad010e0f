"""The shard index: what is built is accepted, whatever deviates is refused under its own rule."""

import struct
from pathlib import Path

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfmt.errors import FlashFormatError
from flashfmt.layout import BundleGeometry
from flashfmt.shard_index import build_shard_index, check_shard_index


@st.composite
def geometries(draw):
    alignment, row_nbytes = draw(st.sampled_from([64, 512, 4096])), draw(st.integers(1, 5000))
    stride = (-(-row_nbytes // alignment) + draw(st.integers(0, 2))) * alignment
    return BundleGeometry(draw(st.integers(1, 40)), row_nbytes, stride, alignment)


def check(raw, geometry):
    check_shard_index(raw, geometry, path=Path("m.flash"), where="layers/0/ffn/bundles")


@given(geometries())
@settings(max_examples=50)
def test_the_index_is_the_arithmetic_written_out(geometry):
    raw = build_shard_index(geometry)
    entries = b"".join(struct.pack("<QQ", i * geometry.stride, geometry.row_nbytes) for i in range(geometry.n_neurons))
    assert raw == entries + struct.pack("<I", google_crc32c.value(entries))
    assert len(raw) == geometry.index_nbytes
    check(raw, geometry)


@given(geometries(), st.data())
@settings(max_examples=50)
def test_any_flipped_bit_is_found(geometry, data):
    raw = bytearray(build_shard_index(geometry))
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FlashFormatError) as error:
        check(bytes(raw), geometry)
    assert error.value.rule == "FF-IDX-2"


@given(geometries(), st.data())
@settings(max_examples=50)
def test_a_wrong_entry_with_a_matching_checksum_is_found(geometry, data):
    body = bytearray(build_shard_index(geometry)[:-4])
    neuron = data.draw(st.integers(0, geometry.n_neurons - 1))
    body[16 * neuron + data.draw(st.integers(0, 15))] ^= 1
    with pytest.raises(FlashFormatError, match=f"bundle {neuron} ") as error:
        check(bytes(body) + struct.pack("<I", google_crc32c.value(bytes(body))), geometry)
    assert error.value.rule == "FF-IDX-3"


@pytest.mark.parametrize("cut", [1, 16])
def test_another_size_is_refused(cut):
    geometry = BundleGeometry.for_rows(5, 384)
    with pytest.raises(FlashFormatError) as error:
        check(build_shard_index(geometry)[:-cut], geometry)
    assert error.value.rule == "FF-IDX-1"
