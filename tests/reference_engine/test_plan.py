import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfmt.errors import BudgetError
from reference_engine.bundle_blocks import (
    Block,
    choose_pinned,
    neurons_per_block,
    pinned_nbytes,
    spread_evenly,
)
from reference_engine.plan import FixedParts, plan_memory

MIB = 1 << 20
FIXED = FixedParts(process=100 * MIB, residents=50 * MIB, kv_cache=10 * MIB, scratch=5 * MIB)


def blocks(n, nbytes=2 * MIB):
    return [Block(layer=i // 4, first=i % 4 * 64, n_neurons=64, offset=i * nbytes, nbytes=nbytes) for i in range(n)]


@given(n_blocks=st.integers(1, 400), data=st.data())
def test_spread_marks_the_wanted_number_evenly(n_blocks, data):
    n_pinned = data.draw(st.integers(0, n_blocks))
    marks = spread_evenly(n_blocks, n_pinned)
    assert sum(marks) == n_pinned
    for start in range(n_blocks):
        for width in (1, 5, 17):
            window = marks[start : start + width]
            assert abs(sum(window) - len(window) * n_pinned / n_blocks) <= 1


@given(n=st.integers(1, 60), budget=st.integers(0, 140 * MIB))
def test_as_many_blocks_are_pinned_as_fit(n, budget):
    every = blocks(n)
    pinned = choose_pinned(every, budget)
    held = pinned_nbytes(every, pinned)
    assert held <= budget
    assert all(pinned) or held + 2 * MIB > budget


@given(stride=st.integers(64, 16 * MIB))
def test_blocks_are_multiples_of_64_neurons_near_two_mebibytes(stride):
    n = neurons_per_block(stride)
    assert n % 64 == 0
    assert n >= 64
    assert n == 64 or 1 * MIB <= n * stride <= 3 * MIB


@given(ceiling=st.integers(0, 600 * MIB), n=st.integers(1, 120))
@settings(max_examples=200)
def test_plans_stay_below_their_ceiling_or_are_refused_below_the_floor(ceiling, n):
    every = blocks(n)
    try:
        plan = plan_memory(FIXED, every, ceiling, 2048)
    except BudgetError as error:
        floor = int(error.expected.split()[2])
        assert ceiling < floor
        assert plan_memory(FIXED, every, floor, 2048).planned <= floor
        return
    assert plan.planned <= ceiling
    assert plan.floor <= ceiling
    assert plan.streamed == sum(b.nbytes for b, p in zip(every, plan.pinned_blocks, strict=True) if not p)
    assert plan.planned == sum(nbytes for _, nbytes in plan.rows())
    if plan.is_resident:
        assert plan.ring == 0


def test_more_memory_never_pins_less():
    every = blocks(100)
    pinned = [plan_memory(FIXED, every, c * MIB, 2048).pinned for c in range(210, 500, 5)]
    assert pinned == sorted(pinned)
    assert pinned[0] < pinned[-1] == 200 * MIB


def test_refusal_names_the_smallest_workable_figure():
    with pytest.raises(BudgetError, match=r"the smallest that works is \d+ MiB") as caught:
        plan_memory(FIXED, blocks(10), 1 * MIB, 2048)
    assert caught.value.exit_code == 1
    assert caught.value.actual == 1 * MIB


def test_a_small_model_needs_no_more_than_itself():
    every = blocks(2)
    plan = plan_memory(FIXED, every, 1 << 40, 2048)
    assert plan.is_resident
    assert plan.floor <= plan.planned


def test_no_ceiling_is_below_what_the_process_held_before_the_plan():
    every = blocks(4)
    before = plan_memory(FIXED, every, 600 * MIB, 2048)
    started = plan_memory(dataclasses.replace(FIXED, at_start=400 * MIB), every, 600 * MIB, 2048)
    assert started.planned == before.planned < 400 * MIB < started.floor < 420 * MIB
