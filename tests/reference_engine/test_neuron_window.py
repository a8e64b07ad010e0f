import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_engine.neuron_window import LeastRecent, RecentTokens

N = 40
traces = st.lists(st.sets(st.integers(0, N - 1), max_size=12), min_size=1, max_size=40)


def ids(values):
    return np.array(sorted(values), np.int32)


class DictRecentTokens:
    """The paper's rule over plain sets."""

    def __init__(self, k):
        self.k, self.tokens, self.held = k, [], set()

    def step(self, active):
        self.tokens.append(active)
        wanted = set().union(*self.tokens[-self.k :])
        result = (self.held & active, active - self.held, self.held - wanted)
        self.held = (self.held | active) & wanted
        return result


class DictLeastRecent:
    """The capacity-bound rule over a plain dict of neuron -> token of its last activity."""

    def __init__(self, capacity):
        self.capacity, self.held, self.token = capacity, {}, 0

    def step(self, active):
        hits, missing = active & set(self.held), active - set(self.held)
        self.held.update(dict.fromkeys(active, self.token))
        self.token += 1
        order = sorted((n for n in self.held if n not in active), key=lambda n: (self.held[n], n))
        evicted = set(order[: max(0, len(self.held) - self.capacity)])
        for neuron in evicted:
            del self.held[neuron]
        return hits, missing, evicted


def check(window, model, trace):
    for active in trace:
        step = window.step(ids(active))
        for got, expected in zip((step.hits, step.missing, step.evicted), model.step(active), strict=True):
            assert got.dtype == np.int32
            np.testing.assert_array_equal(got, ids(expected))
        np.testing.assert_array_equal(window.held(), ids(set(model.held)))


@given(trace=traces, k=st.integers(1, 6))
@settings(deadline=None)
def test_recent_tokens_follow_the_set_model(trace, k):
    check(RecentTokens(N, k), DictRecentTokens(k), trace)


@given(trace=traces, capacity=st.integers(12, N))
@settings(deadline=None)
def test_least_recent_follows_the_dict_model(trace, capacity):
    check(LeastRecent(N, capacity), DictLeastRecent(capacity), trace)


@given(trace=traces, k=st.integers(1, 6))
@settings(deadline=None)
def test_at_the_same_room_the_capacity_rule_never_loads_more(trace, k):
    fixed = RecentTokens(N, k)
    n_fixed, room = 0, 1
    for active in trace:
        n_fixed += len(fixed.step(ids(active)).missing)
        room = max(room, len(fixed.held()))
    bound = LeastRecent(N, room)
    assert sum(len(bound.step(ids(active)).missing) for active in trace) <= n_fixed


@pytest.mark.parametrize("window", [RecentTokens(N, 2), LeastRecent(N, 10)])
def test_forgotten_neurons_are_loaded_again(window):
    window.step(ids({1, 2, 3}))
    window.forget(ids({2}))
    np.testing.assert_array_equal(window.held(), ids({1, 3}))
    step = window.step(ids({1, 2}))
    np.testing.assert_array_equal(step.missing, ids({2}))
    np.testing.assert_array_equal(step.hits, ids({1}))


def test_forgotten_neurons_free_their_room():
    window = LeastRecent(N, 3)
    window.step(ids({1, 2, 3}))
    window.forget(ids({2, 3}))
    assert len(window.step(ids({4, 5})).evicted) == 0


def test_limits_are_checked():
    with pytest.raises(ValueError, match="at least one token"):
        RecentTokens(N, 0)
    with pytest.raises(ValueError, match="at least one neuron"):
        LeastRecent(N, 0)
    with pytest.raises(ValueError, match="3 active neurons exceed the capacity of 2"):
        LeastRecent(N, 2).step(ids({1, 2, 3}))
