"""The window that keeps nothing, together with the cache that it steps."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_engine.bench.nothing_kept import KeepNothing
from reference_engine.bundle_cache import BundleCache

N = 24
SETS = st.lists(st.sets(st.integers(0, N - 1), max_size=10), min_size=1, max_size=8)


def ids(values):
    return np.array(sorted(values), np.int32)


@settings(max_examples=50, deadline=None)
@given(SETS)
def test_every_active_neuron_is_read_anew_and_the_cache_holds_exactly_those(sets):
    window, cache = KeepNothing().build(N, 10), BundleCache(np.zeros((10, 1), np.uint8), N)
    for active in map(ids, sets):
        step = window.step(active)
        slots = cache.apply(step)
        assert not len(step.hits)
        assert (step.missing == active).all()
        assert (cache.slots(active) == slots).all()
        assert len(np.unique(slots)) == len(active)
        assert sorted(cache.held()) == active.tolist() == window.held().tolist()
    assert cache.n_moved == 0


def test_what_failed_to_come_is_not_held():
    window = KeepNothing().build(N, 10)
    window.step(ids({1, 2, 3}))
    window.forget(ids({2}))
    assert window.held().tolist() == [1, 3]
    assert window.step(ids({4})).evicted.tolist() == [1, 3]
