"""Readers in halves read the same bytes as whole ones; timed ones tell what beginning took."""

import numpy as np
import pytest

from flashfmt.errors import FlashReadError
from reference_engine.bench.bundle_readers import Clock, timed, unbundled
from reference_engine.flash_io import IoTuning, aligned_empty, open_reader

ROW = 8192
N_ROWS = 64


@pytest.fixture
def content(tmp_path):
    path = tmp_path / "rows"
    rows = np.random.default_rng(3).integers(0, 256, (N_ROWS, ROW), np.uint8)
    path.write_bytes(rows.tobytes())
    return path, rows


def opener(path):
    return open_reader(path, tuning=IoTuning(gap_bytes=0))


def read(reader, wanted):
    buffer = aligned_empty(len(wanted) * ROW).reshape(len(wanted), ROW)
    slots = np.random.default_rng(0).permutation(len(wanted))
    pending = reader.submit(np.array(wanted, np.int64) * ROW, ROW, buffer, slots * ROW)
    pending.wait()
    assert pending.is_done
    return buffer[slots], pending


@pytest.mark.parametrize("n_parts", [2, 3])
def test_parts_make_up_the_whole(content, n_parts):
    path, rows = content
    wanted = [0, 1, 5, 20, 21, 22, 63]
    reader = unbundled(opener, n_parts)(path)
    try:
        found, pending = read(reader, wanted)
        n_pieces = len(pending.plan)
        assert (found == rows[wanted]).all()
        assert reader.counters.bytes_read == len(wanted) * ROW == pending.plan.nbytes.sum()
        assert reader.counters.n_requests == n_pieces == n_parts * len(wanted)
    finally:
        reader.close()


def test_whole_bundles_take_at_most_half_the_requests(content):
    path, _ = content
    wanted = [0, 1, 5, 20, 21, 22, 63]
    counts = []
    for make in (opener, unbundled(opener, 2)):
        reader = make(path)
        read(reader, wanted)
        counts.append(reader.counters.n_requests)
        reader.close()
    assert counts[0] <= counts[1] / 2


def test_a_failing_part_is_raised_when_no_part_is_in_flight(content):
    path, _ = content
    reader = unbundled(opener, 2)(path)
    buffer = aligned_empty(2 * ROW)
    pending = reader.submit(np.array([0, N_ROWS * ROW]), ROW, buffer, np.array([0, ROW]))
    with pytest.raises(FlashReadError):
        pending.wait()
    assert pending.is_done
    reader.close()


def test_cancelling_cancels_every_part(content):
    path, _ = content
    reader = unbundled(opener, 2)(path)
    pending = reader.submit(np.array([0]), ROW, aligned_empty(ROW), np.array([0]))
    assert not pending.is_cancelled
    pending.is_cancelled = True
    assert pending.is_cancelled
    reader.close()


def test_ranges_of_several_sizes_are_refused(content):
    reader = unbundled(opener, 2)(content[0])
    with pytest.raises(ValueError, match="one size"):
        reader.submit(np.array([0]), np.array([ROW]), aligned_empty(ROW), np.array([0]))
    reader.close()


def test_beginning_takes_time(content):
    clock = Clock()
    reader = timed(opener, clock)(content[0])
    read(reader, [3, 4])
    assert clock.seconds > 0
    assert reader.counters.bytes_read == 2 * ROW
    reader.close()
