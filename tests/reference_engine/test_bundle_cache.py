import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_engine.bundle_cache import BundleCache
from reference_engine.neuron_window import LeastRecent, RecentTokens, WindowStep

N = 40
CAPACITY = 16


def ids(values=()):
    return np.array(sorted(values), np.int32)


def step(missing=(), evicted=()):
    return WindowStep(ids(), ids(missing), ids(evicted))


def fill(cache, missing, slots):
    cache.rows[slots] = missing[:, None] + 1


def check_consistent(cache, held):
    """Exactly `held`, in a prefix of the slots, each with its own bytes."""
    assert set(cache.held().tolist()) == held
    assert cache.num_used == len(held)
    np.testing.assert_array_equal(cache.id_to_slot[cache.held()], np.arange(cache.num_used))
    assert np.count_nonzero(cache.id_to_slot >= 0) == len(held)
    np.testing.assert_array_equal(cache.rows[: cache.num_used, 0], cache.held() + 1)


tokens = st.lists(
    st.tuples(st.sets(st.integers(0, N - 1), max_size=CAPACITY), st.sets(st.integers(0, N - 1), max_size=6)),
    min_size=1,
    max_size=30,
)


@given(tokens=tokens, k=st.one_of(st.none(), st.integers(1, 4)))
@settings(deadline=None)
def test_slots_hold_what_the_window_says_even_when_reads_fail(tokens, k):
    """Against a plain set; of each token's missing bundles some fail to arrive."""
    window = LeastRecent(N, CAPACITY) if k is None else RecentTokens(N, k, CAPACITY)
    cache = BundleCache(np.zeros((CAPACITY, 8), np.uint8), N)
    held = set()
    for active, failing in tokens:
        change = window.step(ids(active))
        slots = cache.apply(change)
        failed = ids(set(change.missing.tolist()) & failing)
        arrived = ~np.isin(change.missing, failed)
        fill(cache, change.missing[arrived], slots[arrived])
        cache.remove(failed)
        window.forget(failed)
        held = (held - set(change.evicted.tolist()) | active) - set(failed.tolist())
        check_consistent(cache, held)
        np.testing.assert_array_equal(window.held(), ids(held))
        np.testing.assert_array_equal(cache.slots(change.hits), cache.id_to_slot[change.hits])


def test_evicted_slots_are_refilled_before_the_tail_and_nothing_is_moved():
    cache = BundleCache(np.zeros((8, 4), np.uint8), N)
    np.testing.assert_array_equal(cache.apply(step({10, 11, 12, 13})), [0, 1, 2, 3])
    np.testing.assert_array_equal(cache.apply(step({20, 21, 22}, {11, 13})), [1, 3, 4])
    np.testing.assert_array_equal(cache.held(), [10, 20, 12, 21, 22])
    assert cache.n_moved == 0


def test_rows_move_from_the_tail_only_where_more_leave_than_come():
    cache = BundleCache(np.zeros((8, 4), np.uint8), N)
    first = ids({10, 11, 12, 13, 14, 15})
    fill(cache, first, cache.apply(step(first.tolist())))
    slots = cache.apply(step({20}, {10, 12, 15}))
    fill(cache, ids({20}), slots)
    np.testing.assert_array_equal(cache.held(), [20, 11, 14, 13])
    assert cache.n_moved == 1
    check_consistent(cache, {20, 11, 14, 13})


def test_too_many_bundles_change_nothing():
    cache = BundleCache(np.zeros((2, 4), np.uint8), N)
    fill(cache, ids({1}), cache.apply(step({1})))
    with pytest.raises(ValueError, match="3 bundles do not fit in 2 slots"):
        cache.apply(step({2, 3}))
    check_consistent(cache, {1})
