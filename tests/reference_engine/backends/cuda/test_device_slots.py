"""The remap of a bank of slots against a dictionary, and the second tier's promise to have what left last."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_engine.device_slots import SlotTable, VictimTable

N = 30


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.sets(st.integers(0, N - 1), max_size=12), max_size=20))
def test_slots_are_never_shared(steps):
    table, model = SlotTable(12, N), {}
    for wanted in steps:
        gone = np.array(sorted(set(model) - wanted), np.int32)
        assert np.array_equal(table.release(gone), [model.pop(int(i)) for i in gone])
        new = np.array(sorted(wanted - set(model)), np.int32)
        model |= dict(zip(new.tolist(), table.assign(new).tolist(), strict=True))
        assert len(set(model.values())) == len(model)
        assert set(model.values()) <= set(range(12))
        assert table.n_free == 12 - len(model)
        held = np.array(sorted(model), np.int32)
        assert np.array_equal(table.slots(held), [model[int(i)] for i in held])
        assert np.flatnonzero(table.has(np.arange(N))).tolist() == held.tolist()


def test_too_many_are_refused_unchanged():
    table = SlotTable(2, 5)
    with pytest.raises(ValueError, match="do not fit"):
        table.assign(np.arange(3, dtype=np.int32))
    assert table.n_free == 2
    assert not table.has(np.arange(5)).any()


@settings(max_examples=80, deadline=None)
@given(
    n_slots=st.integers(1, 10),
    steps=st.lists(st.tuples(st.sets(st.integers(0, N - 1)), st.sets(st.integers(0, N - 1))), max_size=20),
)
def test_the_tier_hands_out_what_was_put_there(n_slots, steps):
    """A dictionary from slot to neuron stands for the rows; what leaves is copied in before what is wanted goes out."""
    tier, rows, caught = VictimTable(n_slots, N), {}, []
    for wanted, evicted in steps:
        gone = np.array(sorted(evicted - wanted - set(caught)), np.int32)
        asked = np.array(sorted(wanted), np.int32)
        out, out_slots, taken, slots = tier.exchange(asked, gone)
        assert set(out.tolist()) == wanted & set(caught)
        assert not set(slots.tolist()) & set(out_slots.tolist())
        rows |= dict(zip(slots.tolist(), taken.tolist(), strict=True))
        assert [rows[slot] for slot in out_slots.tolist()] == out.tolist()
        room = n_slots - len(out)
        assert taken.tolist() == gone[max(0, len(gone) - room) :].tolist()
        stay = [neuron for neuron in caught if neuron not in wanted]
        caught = (stay + taken.tolist())[-room:] if room else []
