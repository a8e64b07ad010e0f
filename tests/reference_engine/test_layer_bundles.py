from itertools import chain

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flashfmt
from flashfmt.errors import ChecksumError, FlashReadError
from reference_engine import layer_bundles
from reference_engine.flash_io import IO_ALIGNMENT, Pending, aligned_empty, open_reader
from reference_engine.layer_bundles import LayerBundles
from reference_engine.neuron_window import DecayedFrequency, LeastRecent, RecentTokens

N = 448
CAPACITY = 120


def ids(values):
    return np.array(sorted(values), np.int32)


class Flaky:
    """A reader that delivers nothing of the batches with a range that begins at one of `bad` offsets."""

    def __init__(self, reader):
        self._reader = reader
        self.bad = set()

    def __getattr__(self, name):
        return getattr(self._reader, name)

    def submit(self, offsets, nbytes, buffer, positions, *, ahead=False):
        pending = self._reader.submit(offsets, nbytes, buffer, positions, ahead=ahead)
        hit = sorted(self.bad & set(offsets.tolist()))
        if hit:
            pending.wait()
            flat = buffer.reshape(-1)
            for position in positions.tolist():
                flat[position : position + 16] = 0xEE
            pending._error = FlashReadError("broken", where=hit[0])
        return pending


@pytest.fixture(scope="module")
def model(synthetic):
    with flashfmt.open(synthetic("plain", "f16")) as model:
        yield model


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    monkeypatch.setattr(layer_bundles, "GROUP_BUNDLES", 16)


def make(model, window, verify="first"):
    info = model.layers[1]
    reader = Flaky(open_reader(info.extent.path, range_alignment=512, backend="pread"))
    rows = aligned_empty(CAPACITY * info.geometry.stride).reshape(CAPACITY, -1)
    checksums = model.bundles(1).checksums
    return LayerBundles(info, window=window, rows=rows, checksums=checksums, verify=verify, reader=reader), reader


def check(layer, model, held):
    cache = layer.cache
    assert set(cache.held().tolist()) == held == set(layer.window.held().tolist())
    row_nbytes = layer.info.geometry.row_nbytes
    np.testing.assert_array_equal(cache.rows[: cache.num_used, :row_nbytes], model.bundles(1).rows[cache.held()])


def offset_of(layer, neuron):
    return layer.info.extent.offset + neuron * layer.info.geometry.stride


WINDOWS = [LeastRecent, lambda n, c: DecayedFrequency(n, c, 8), lambda n, c: RecentTokens(n, 2, c)]
neurons = st.integers(0, N - 1)
tokens = st.lists(st.tuples(st.sets(neurons, max_size=80), st.sets(neurons, max_size=60), st.booleans()), max_size=8)


@pytest.mark.parametrize("window", WINDOWS)
@given(tokens=tokens)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_held_is_what_arrived_whatever_fails(model, window, tokens):
    layer, reader = make(model, window(N, CAPACITY))
    try:
        for wanted, broken, ahead in tokens:
            reader.bad = {offset_of(layer, neuron) for neuron in broken}
            before = set(layer.cache.held().tolist())
            fetch = layer.fetch(ids(wanted), ahead=ahead)
            assert set(fetch.hits.tolist()) == before & wanted
            kept = before & set(layer.window.held().tolist())
            arrived, failure = set(), None
            try:
                for arriving, slots in fetch.arrivals():
                    np.testing.assert_array_equal(layer.cache.slots(arriving), slots)
                    arrived |= set(arriving.tolist())
            except FlashReadError as error:
                failure = error
            assert not broken & arrived
            if failure is None:
                assert arrived == wanted - before
            else:
                neuron = (failure.where - offset_of(layer, 0)) // layer.info.geometry.stride
                assert neuron in broken & wanted
                assert f"layer 1, neuron {neuron} cannot be read" in str(failure)
            held = set(layer.cache.held().tolist())
            assert kept | arrived <= held <= kept | wanted
            assert not held & broken - before
            check(layer, model, held)
    finally:
        reader.close()


def test_what_was_read_ahead_and_has_arrived_is_there_with_what_was_held(model):
    layer, reader = make(model, LeastRecent(N, CAPACITY))
    list(layer.fetch(ids(range(20))).arrivals())
    for ahead, wanted in ((True, range(10, 70)), (False, range(40, 99))):
        fetch = layer.fetch(ids(wanted), ahead=ahead)
        for group in fetch._groups:
            group.pending.wait()
        there, slots = fetch.there()
        assert set(there.tolist()) == (set(wanted) if ahead else set(fetch.hits.tolist()))
        np.testing.assert_array_equal(slots, layer.cache.slots(there))
        assert sum(len(arriving) for arriving, _ in fetch.arrivals()) == len(wanted) - len(there)
        check(layer, model, set(layer.cache.held().tolist()))
    reader.close()


def test_what_was_read_ahead_and_is_broken_is_found_when_its_turn_comes(model):
    layer, reader = make(model, LeastRecent(N, CAPACITY))
    reader.bad = {offset_of(layer, 20)}
    fetch = layer.fetch(ids(range(40)), ahead=True)
    for group in fetch._groups[:1]:
        group.pending.wait()
    with pytest.raises(FlashReadError, match="neuron 20"):
        list(chain([fetch.there()], fetch.arrivals()))
    assert not {20} & set(layer.cache.held().tolist())
    check(layer, model, set(layer.cache.held().tolist()))
    reader.close()


def test_a_fetch_that_nobody_waited_for_leaves_everything_consistent(model):
    layer, reader = make(model, LeastRecent(N, CAPACITY))
    first = layer.fetch(ids(range(60)))
    first.finish()
    first.finish()
    held = set(layer.cache.held().tolist())
    assert held <= set(range(60))
    check(layer, model, held)
    again = layer.fetch(ids(range(100)))
    assert sum(len(arriving) for arriving, _ in again.arrivals()) == 100 - len(held)
    check(layer, model, set(range(100)))
    reader.close()


def test_costs_count_what_was_read(model):
    layer, reader = make(model, LeastRecent(N, CAPACITY))
    fetch = layer.fetch(ids(range(0, 400, 10)))
    list(fetch.arrivals())
    assert fetch.costs.bytes_read == reader.counters.bytes_read >= 40 * layer.info.geometry.stride
    assert fetch.costs.n_requests == reader.counters.n_requests <= 40
    assert fetch.costs.upkeep_seconds > 0
    reader.close()


@pytest.mark.parametrize(("verify", "n_checked"), [("never", [0, 0]), ("first", [20, 0]), ("always", [20, 20])])
def test_bundles_are_checked_when_asked_for(model, monkeypatch, verify, n_checked):
    layer, reader = make(model, RecentTokens(N, 1, CAPACITY), verify)
    checked = []
    real = layer_bundles.bundle_mismatch
    monkeypatch.setattr(layer_bundles, "bundle_mismatch", lambda *a: checked.append(a[1]) or real(*a))
    for expected in n_checked:
        list(layer.fetch(ids(range(20))).arrivals())
        assert len(checked) == expected
        checked.clear()
        list(layer.fetch(ids(range(0))).arrivals())
    reader.close()


def test_a_wrong_bundle_is_named_not_held_and_checked_again(model):
    layer, reader = make(model, LeastRecent(N, CAPACITY))
    layer._checksums = layer._checksums.copy()
    layer._checksums[33] ^= 1
    for _ in range(2):
        with pytest.raises(ChecksumError, match="layer 1, neuron 33") as caught:
            list(layer.fetch(ids(range(30, 40))).arrivals())
        assert caught.value.where == offset_of(layer, 33)
        check(layer, model, set(range(30, 40)) - {33})
    layer._checksums[33] ^= 1
    list(layer.fetch(ids(range(30, 40))).arrivals())
    check(layer, model, set(range(30, 40)))
    reader.close()


def test_a_closed_reader_leaves_the_layer_as_it_was(model):
    layer, reader = make(model, LeastRecent(N, CAPACITY))
    list(layer.fetch(ids({1, 2})).arrivals())
    reader.close()
    with pytest.raises(FlashReadError, match="closed"):
        layer.fetch(ids({2, 3}))
    check(layer, model, {1, 2})


def test_rows_are_where_direct_reads_can_land(model):
    layer, reader = make(model, LeastRecent(N, CAPACITY))
    assert layer.cache.rows.ctypes.data % IO_ALIGNMENT == 0
    reader.close()


def test_an_interrupted_wait_leaves_nothing_half_read(model, monkeypatch):
    layer, reader = make(model, LeastRecent(N, CAPACITY))
    fetch = layer.fetch(ids(range(20)))
    real = Pending.wait

    def interrupted(pending):
        pending.is_cancelled = True
        real(pending)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Pending, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(fetch.arrivals())
    fetch.finish()
    held = set(layer.cache.held().tolist())
    assert held <= set(range(16, 20))
    check(layer, model, held)
    reader.close()
