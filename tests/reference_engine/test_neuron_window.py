import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_engine.neuron_window import DecayedFrequency, LeastRecent, RecentTokens, fitting_parts, parse_window

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


class DictDecayedFrequency:
    """The default rule over a plain dict of neuron -> decayed count, decayed one token at a time."""

    def __init__(self, capacity, half_life):
        self.capacity, self.decay, self.held, self.activity = capacity, 0.5 ** (1 / half_life), set(), {}

    def step(self, active):
        hits, missing = active & self.held, active - self.held
        self.activity = {neuron: worth * self.decay for neuron, worth in self.activity.items()}
        for neuron in active:
            self.activity[neuron] = self.activity.get(neuron, 0) + 1
        # sums in another order differ in their last bits, where ties are decided by id
        order = sorted(self.held - active, key=lambda n: (float(f"{self.activity[n]:.9g}"), n))
        evicted = set(order[: max(0, len(self.held | active) - self.capacity)])
        self.held = (self.held | active) - evicted
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


@given(trace=traces, capacity=st.integers(12, N), half_life=st.sampled_from([1, 2, 64]))
@settings(deadline=None)
def test_decayed_frequency_follows_the_dict_model(trace, capacity, half_life):
    check(DecayedFrequency(N, capacity, half_life), DictDecayedFrequency(capacity, half_life), trace)


def test_counts_survive_longer_than_a_float_could_grow():
    window = DecayedFrequency(N, 3, 2)
    for _ in range(2000):
        window.step(ids({1, 2}))
    window.step(ids({3}))
    for _ in range(3):
        window.step(ids({2}))
    np.testing.assert_array_equal(window.step(ids({4})).evicted, [3])


@pytest.mark.parametrize("k", [1, 2, 3])
@given(trace=traces, capacity=st.integers(12, N))
@settings(deadline=None, max_examples=30)
def test_the_papers_window_within_a_capacity_never_outgrows_it(trace, capacity, k):
    window, unbounded = RecentTokens(N, k, capacity), DictRecentTokens(k)
    for active in trace:
        before = set(window.held().tolist())
        step = window.step(ids(active))
        unbounded.step(active)
        held = set(window.held().tolist())
        assert held == (before | active) - set(step.evicted.tolist())
        assert active <= held <= unbounded.held
        assert len(held) <= capacity


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


@pytest.mark.parametrize("window", [RecentTokens(N, 2), LeastRecent(N, 10), DecayedFrequency(N, 10, 8)])
def test_forgotten_neurons_are_loaded_again(window):
    window.step(ids({1, 2, 3}))
    window.forget(ids({2}))
    np.testing.assert_array_equal(window.held(), ids({1, 3}))
    step = window.step(ids({1, 2}))
    np.testing.assert_array_equal(step.missing, ids({2}))
    np.testing.assert_array_equal(step.hits, ids({1}))


@pytest.mark.parametrize("window", [LeastRecent(N, 3), DecayedFrequency(N, 3, 8)])
def test_forgotten_neurons_free_their_room(window):
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
    with pytest.raises(ValueError, match="at least one neuron"):
        DecayedFrequency(N, 0, 1)
    with pytest.raises(ValueError, match="half-life is positive"):
        DecayedFrequency(N, 1, 0)
    with pytest.raises(ValueError, match="3 active neurons exceed the capacity of 2"):
        RecentTokens(N, 1, 2).step(ids({1, 2, 3}))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("paper:5", RecentTokens),
        ("lru", LeastRecent),
        ("frequency", DecayedFrequency),
        ("frequency:9", DecayedFrequency),
    ],
)
def test_rules_have_names(text, kind):
    assert type(parse_window(text).build(N, 7)) is kind


@pytest.mark.parametrize("text", ["", "paper", "paper:0", "paper:-1", "paper:x", "frequency:0", "lru:3", "fifo"])
def test_other_names_are_refused(text):
    with pytest.raises(ValueError, match="no rule for the window"):
        parse_window(text)


@given(
    active=st.sets(st.integers(0, 99)),
    held=st.sets(st.integers(0, 99), max_size=30),
    n_free=st.integers(0, 20),
    in_order=st.booleans(),
)
def test_parts_fit_and_miss_nothing(active, held, n_free, in_order):
    capacity = max(len(held) + n_free, 1)
    ids = np.array(sorted(active), np.int32)
    is_held = None if in_order else np.isin(ids, list(held))
    parts = list(fitting_parts(ids, capacity, is_held))
    assert all(len(part) <= capacity for part in parts)
    assert all((np.diff(part) > 0).all() for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == ids.tolist()
    if len(ids) <= capacity:
        assert len(parts) == 1
    elif in_order:
        assert np.array_equal(np.concatenate(parts), ids)
    else:
        assert set(parts[0].tolist()) == active & held
