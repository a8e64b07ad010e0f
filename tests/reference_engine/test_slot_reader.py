import errno
import os
import threading
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfmt.errors import FlashReadError
from reference_engine import slot_reader
from reference_engine.flash_io import aligned_empty
from reference_engine.slot_reader import GAP_BYTES, REQUEST_BYTES, RowTable, SlotReader, plan_requests

N_ROWS = 600


def ids(values):
    return np.array(sorted(values), np.int32)


@given(rows=st.sets(st.integers(0, 5000), max_size=300), stride=st.sampled_from([64, 512, 3072, 4096, 16384, 1 << 20]))
@settings(deadline=None)
def test_requests_cover_every_row_once_within_their_limits(rows, stride):
    rows = ids(rows)
    wide = rows.astype(int)
    requests = plan_requests(rows, stride)
    assert [i for first, last in requests for i in range(first, last)] == list(range(len(rows)))
    for first, last in requests:
        assert last - first == 1 or (wide[last - 1] - wide[first] + 1) * stride <= REQUEST_BYTES
        assert all((gap - 1) * stride <= GAP_BYTES for gap in np.diff(wide[first:last]))
    for (first, last), (_, end) in pairwise(requests):
        fits = (wide[last] - wide[first] + 1) * stride <= REQUEST_BYTES
        assert not fits or (wide[last] - wide[last - 1] - 1) * stride > GAP_BYTES
        assert end > last


@pytest.fixture(scope="module", params=[(4096, 0), (512, 4096), (3072, 512), (192, 64)], ids=str)
def table(request, tmp_path_factory):
    """A file of rows in which each byte is random, and its table; aligned for direct reads, or not."""
    stride, offset = request.param
    path = tmp_path_factory.mktemp("rows") / "rows.bin"
    data = np.random.default_rng(stride).integers(0, 256, offset + N_ROWS * stride + 4096, np.uint8)
    path.write_bytes(data.tobytes())
    return RowTable(path, offset, stride), data[offset : offset + N_ROWS * stride].reshape(N_ROWS, stride)


@pytest.fixture
def reader():
    reader = SlotReader(4)
    yield reader
    reader.close()


def matrix(n, stride):
    return aligned_empty(n * stride).reshape(n, stride)


@pytest.mark.parametrize("buffered", [False, True])
def test_rows_land_in_their_slots_and_nothing_else_changes(table, reader, monkeypatch, buffered):
    if buffered:
        monkeypatch.delattr(os, "O_DIRECT")
    table, data = table
    rng = np.random.default_rng(1)
    for n in (1, 7, 200, N_ROWS):
        rows = ids(rng.choice(N_ROWS, n, replace=False).tolist())
        slots = rng.permutation(N_ROWS + 10)[:n].astype(np.int32)
        target = matrix(N_ROWS + 10, table.stride)
        target[:] = 7
        expected = target.copy()
        expected[slots] = data[rows]
        batch = reader.submit(table, rows, target, slots, expected=False)
        batch.wait(n)
        assert not batch.failures()
        np.testing.assert_array_equal(target, expected)
        assert batch.n_requests <= n
        assert batch.nbytes >= n * table.stride


def test_waiting_for_some_rows_returns_when_they_are_there(table, reader):
    table, data = table
    rows = np.arange(N_ROWS, dtype=np.int32)
    target = matrix(N_ROWS, table.stride)
    batch = reader.submit(table, rows, target, rows, expected=False)
    for n in (1, 100, 101, N_ROWS):
        batch.wait(n)
        np.testing.assert_array_equal(target[:n], data[:n])


def test_nothing_to_read_is_there_at_once(table, reader):
    table, _ = table
    none = np.empty(0, np.int32)
    batch = reader.submit(table, none, matrix(1, table.stride), none, expected=False)
    batch.wait(0)
    assert (batch.nbytes, batch.n_requests, batch.failures()) == (0, 0, {})


def test_a_device_error_names_the_rows_it_hits_and_spares_their_neighbours(table, reader, monkeypatch):
    table, data = table
    bad = 5
    begin, end = table.offset + bad * table.stride, table.offset + (bad + 1) * table.stride
    real = os.preadv

    def failing(fd, buffers, offset):
        nbytes = sum(len(buffer) for buffer in buffers)
        if offset < end and begin < offset + nbytes and nbytes % table.stride == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    if table.stride % 512:
        pytest.skip("blocks around a row of this table hold its neighbours")
    monkeypatch.setattr(slot_reader.os, "preadv", failing)
    rows = np.arange(10, dtype=np.int32)
    target = matrix(10, table.stride)
    batch = reader.submit(table, rows, target, rows, expected=False)
    batch.wait(10)
    failures = batch.failures()
    assert list(failures) == [bad]
    assert failures[bad].where == begin
    assert "Input/output error" in str(failures[bad])
    good = rows != bad
    np.testing.assert_array_equal(target[good], data[:10][good])


def test_reads_that_come_in_pieces_are_put_together(table, reader, monkeypatch):
    table, data = table
    real = os.preadv

    def short(fd, buffers, offset):
        piece = 4096 if len(buffers[0]) > 4096 else 512
        return real(fd, [buffers[0][:piece]], offset)

    monkeypatch.setattr(slot_reader.os, "preadv", short)
    rows = np.arange(20, dtype=np.int32)
    target = matrix(20, table.stride)
    batch = reader.submit(table, rows, target, rows, expected=False)
    batch.wait(20)
    assert not batch.failures()
    np.testing.assert_array_equal(target, data[:20])


def test_a_file_that_ends_early_is_an_error(tmp_path, reader):
    path = tmp_path / "short.bin"
    path.write_bytes(bytes(3 * 4096))
    rows = np.arange(5, dtype=np.int32)
    batch = reader.submit(RowTable(path, 0, 4096), rows, matrix(5, 4096), rows, expected=False)
    batch.wait(5)
    failures = batch.failures()
    assert sorted(failures) == [3, 4]
    assert all(isinstance(error, FlashReadError) and "ends inside" in str(error) for error in failures.values())


def test_demanded_rows_are_read_before_expected_ones(tmp_path, monkeypatch):
    path = tmp_path / "rows.bin"
    path.write_bytes(bytes(100 * 4096))
    table = RowTable(path, 0, 4096)
    order = []
    real = os.preadv

    def slow(fd, buffers, offset):
        if offset >= 8192:
            order.append(offset // 4096)
        return real(fd, buffers, offset)

    monkeypatch.setattr(slot_reader.os, "preadv", slow)
    reader = SlotReader(0)
    spread = np.arange(10, 100, 10, dtype=np.int32)
    target, slots = matrix(9, 4096), np.arange(9, dtype=np.int32)
    reader.submit(table, spread, target, slots, expected=True)
    reader.submit(table, spread + 5, target, slots, expected=False)
    late = reader.submit(table, spread + 7, target, slots, expected=True)
    late.demand()
    thread = threading.Thread(target=reader._work)
    reader._threads.append(thread)
    thread.start()
    late.wait(9)
    reader.close()
    assert order[:18] == [*(spread + 5).tolist(), *(spread + 7).tolist()]


def test_cancelled_rows_are_named_and_not_read(tmp_path):
    path = tmp_path / "rows.bin"
    path.write_bytes(bytes(100 * 4096))
    spread = np.arange(10, 100, 10, dtype=np.int32)
    reader = SlotReader(0)
    batch = reader.submit(RowTable(path, 0, 4096), spread, matrix(9, 4096), np.arange(9, dtype=np.int32), expected=True)
    assert batch.cancel() == list(range(9))
    batch.wait(9)
    assert batch.failures() == {}
    assert batch.cancel() == []
    reader.close()
    assert reader.counters.n_requests == 0
