import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfmt.errors import ChecksumError, FlashReadError
from reference_engine.flash_io import CyclicStream, DirectFile, StreamRange

BLOCK = 8192
N_BLOCKS = 7


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream") / "data.bin"
    path.write_bytes(b"".join(bytes([i]) * BLOCK for i in range(N_BLOCKS)))
    with DirectFile(path) as file:
        yield file


def ranges(file, n=N_BLOCKS):
    return [StreamRange(file, i * BLOCK, BLOCK - 100 * i) for i in range(n)]


@given(n=st.integers(1, N_BLOCKS), n_slots=st.integers(1, 9), n_readers=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_delivers_every_range_in_order_for_ever(file, n, n_slots, n_readers):
    stream = CyclicStream(ranges(file, n), n_slots=n_slots, n_readers=n_readers)
    for turn in range(3 * n + 2):
        index, data = stream.take()
        assert index == turn % n
        assert data.nbytes == BLOCK - 100 * index
        assert (data == index).all()
        stream.give_back()
    stream.close()


def test_a_held_buffer_is_not_overwritten(file):
    stream = CyclicStream(ranges(file), n_slots=2)
    _, data = stream.take()
    time.sleep(0.05)
    assert (data == 0).all()
    with pytest.raises(RuntimeError, match="not given back"):
        stream.take()
    stream.close()


def test_rewind_starts_over(file):
    stream = CyclicStream(ranges(file), n_slots=3)
    for _ in range(4):
        stream.take()
        stream.give_back()
    stream.take()
    stream.rewind()
    assert stream.take()[0] == 0
    stream.close()


def test_read_error_reaches_the_consumer_at_its_place(file):
    bad = [*ranges(file, 3), StreamRange(file, N_BLOCKS * BLOCK, 4096)]
    stream = CyclicStream(bad, n_slots=1, n_readers=1)
    for expected in range(3):
        assert stream.take()[0] == expected
        stream.give_back()
    with pytest.raises(FlashReadError):
        stream.take()
    with pytest.raises(FlashReadError):
        stream.take()
    stream.close()


def test_check_sees_every_arrival_and_its_error_is_raised(file):
    seen = []

    def check(index, data):
        seen.append((index, int(data[0])))
        if index == 2:
            raise ChecksumError("planted")

    stream = CyclicStream(ranges(file), n_slots=1, n_readers=1, check=check)
    for _ in range(2):
        stream.take()
        stream.give_back()
    with pytest.raises(ChecksumError, match="planted"):
        stream.take()
    assert seen == [(0, 0), (1, 1), (2, 2)]
    stream.close()


def test_close_ends_the_threads(file):
    before = threading.active_count()
    stream = CyclicStream(ranges(file), n_slots=3, n_readers=3)
    stream.take()
    stream.close()
    assert threading.active_count() == before


def test_waiting_is_measured(file):
    gate = threading.Event()
    stream = CyclicStream(ranges(file), n_slots=1, check=lambda index, data: gate.wait() and None)
    threading.Timer(0.1, gate.set).start()
    stream.take()
    assert stream.wait_seconds > 0.05
    stream.close()


def test_empty_streams_are_refused(file):
    with pytest.raises(ValueError, match="ranges"):
        CyclicStream([], n_slots=1)
    with pytest.raises(ValueError, match="slots"):
        CyclicStream([StreamRange(file, 0, np.int64(1))], n_slots=0)
