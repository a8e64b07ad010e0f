import errno
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfmt.errors import FlashReadError
from reference_engine.flash_io import IO_ALIGNMENT, DirectFile, aligned_empty


@pytest.fixture(scope="module")
def content() -> bytes:
    return np.random.default_rng(7).bytes(3 * (1 << 20) + 1234)


@pytest.fixture(scope="module")
def path(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("direct") / "data.bin"
    path.write_bytes(content)
    return path


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_read_equals_slice(path, content, data):
    offset = data.draw(st.integers(0, len(content) - 1))
    nbytes = data.draw(st.integers(1, len(content) - offset))
    with DirectFile(path) as file:
        assert file.read(offset, nbytes).tobytes() == content[offset : offset + nbytes]


def test_counters_count_delivered_bytes(path, content):
    with DirectFile(path) as file:
        before = file.counters
        file.read(0, IO_ALIGNMENT)
        assert (file.counters - before).bytes_read == IO_ALIGNMENT
        assert (file.counters - before).n_requests == 1


def test_range_past_the_end_names_place_and_size(path, content):
    with DirectFile(path) as file, pytest.raises(FlashReadError) as caught:
        file.read(len(content) - 10, 20)
    assert caught.value.path == path
    assert caught.value.where == len(content)
    assert "20 bytes" in str(caught.value) or "ends inside" in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(FlashReadError, match="cannot open"):
        DirectFile(tmp_path / "none.flash")


def test_device_error_is_reported_with_offset(path, monkeypatch):
    def broken(fd, buffers, offset):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with DirectFile(path) as file:
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(FlashReadError, match="Input/output error") as caught:
            file.read(8192, 100)
    assert caught.value.where == 8192


def test_short_reads_are_continued(path, content, monkeypatch):
    whole = os.preadv

    def short(fd, buffers, offset):
        return whole(fd, [buffers[0][:IO_ALIGNMENT]], offset)

    with DirectFile(path) as file:
        monkeypatch.setattr(os, "preadv", short)
        assert file.read(100, 50_000).tobytes() == content[100:50_100]


def test_misaligned_requests_are_refused(path):
    with DirectFile(path) as file:
        with pytest.raises(ValueError, match="misaligned"):
            file.read_into(aligned_empty(IO_ALIGNMENT), 1, 10)
        with pytest.raises(ValueError, match="misaligned"):
            file.read_into(aligned_empty(IO_ALIGNMENT), 0, IO_ALIGNMENT + 1)


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 5 << 20])
def test_aligned_empty(nbytes):
    buffer = aligned_empty(nbytes)
    assert buffer.nbytes == nbytes
    assert buffer.ctypes.data % IO_ALIGNMENT == 0
    assert not buffer.any()
