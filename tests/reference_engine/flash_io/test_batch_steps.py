"""The compiled steps of a batch against the plain ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_engine.flash_io import aligned_empty
from reference_engine.flash_io.aio_queue import AioQueue
from reference_engine.flash_io.batch_steps import TAG_BITS, PlainSteps, PlanLimits
from reference_engine.flash_io.numba_queue import CompiledAioQueue, CompiledSteps, CompiledUringQueue
from reference_engine.flash_io.uring_queue import UringQueue

UNIT = 512
N_SLOTS = 400
BUFFER = aligned_empty(N_SLOTS * UNIT)
FIELDS = ("offsets", "nbytes", "segments", "first_segment", "n_segments")


@st.composite
def batches(draw):
    """Offsets, sizes and positions, allowed ones; slots that are now neighbours, now far apart."""
    n = draw(st.integers(0, 40))
    sizes = np.array(draw(st.lists(st.integers(1, 9), min_size=n, max_size=n)), np.int64)
    gaps = np.array(draw(st.lists(st.sampled_from([0, 0, 1, 2, 3, 50]), min_size=n, max_size=n)), np.int64)
    before = np.cumsum(sizes) - sizes
    order = np.array(draw(st.permutations(range(n))) if draw(st.booleans()) else range(n), np.int64)
    positions = np.empty(n, np.int64)
    positions[order] = np.cumsum(sizes[order]) - sizes[order]
    return (np.cumsum(gaps) + before) * UNIT, sizes * UNIT, positions * UNIT


@st.composite
def limits(draw):
    return PlanLimits(
        alignment=UNIT,
        gap_bytes=draw(st.sampled_from([0, 1, 2, 3])) * UNIT,
        max_request_bytes=draw(st.sampled_from([4, 5, 16, 1000])) * UNIT,
        max_segments=draw(st.sampled_from([2, 3, 6, 1024])),
        scratch_address=1 << 50,
    )


@given(batch=batches(), limits=limits())
@settings(max_examples=300, deadline=None)
def test_compiled_plans_are_the_plain_ones(batch, limits):
    plain, compiled = (steps(limits).plan(*batch, BUFFER) for steps in (PlainSteps, CompiledSteps))
    for field in FIELDS:
        expected, found = getattr(plain, field), getattr(compiled, field)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@given(
    batch=batches().filter(lambda batch: len(batch[0])),
    limits=limits(),
    which=st.tuples(st.integers(0, 2), st.integers(0, 39)),
    change=st.sampled_from([-1, 1, -UNIT, UNIT, -N_SLOTS * UNIT, N_SLOTS * UNIT]),
)
@settings(max_examples=300, deadline=None)
def test_both_refuse_the_same_ranges(batch, limits, which, change):
    kind, i = which
    batch[kind][i % len(batch[kind])] += change
    plain, compiled = (steps(limits).plan(*batch, BUFFER) for steps in (PlainSteps, CompiledSteps))
    assert (compiled is None) == (plain is None)
    assert plain is None or abs(change) >= UNIT


@pytest.mark.parametrize(
    ("plain", "compiled"),
    [(UringQueue, CompiledUringQueue), (AioQueue, CompiledAioQueue)],
    ids=["uring", "aio"],
)
@given(batch=batches(), limits=limits(), number=st.integers(1, 2**30))
@settings(max_examples=100, deadline=None)
def test_compiled_entries_are_the_plain_ones(plain, compiled, batch, limits, number):
    queue = object.__new__(compiled)
    queue._fd = 77
    plan = PlainSteps(limits).plan(*batch, BUFFER)
    tag = number << TAG_BITS
    assert compiled.prepare(queue, plan, tag).tobytes() == plain.prepare(queue, plan, tag).tobytes()


results = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 9), st.sampled_from([0, 0, 0, -5, 512])), max_size=30)


@given(results=results, number=st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_compiled_results_are_settled_as_the_plain_ones(results, number):
    nbytes = np.arange(10, dtype=np.int64) * 1000
    tags = np.array([(batch << TAG_BITS) + request for batch, request, _ in results], np.int64)
    found = np.array([nbytes[request] + error for _, request, error in results], np.int64)
    plain, compiled = (
        steps(PlanLimits(UNIT, 0, UNIT, 2, 0)).settle(tags, found, number, nbytes)
        for steps in (PlainSteps, CompiledSteps)
    )
    assert compiled == plain
    mine = [(request, error) for batch, request, error in results if batch == number]
    assert plain == (len(mine), sum(1000 * request for request, _ in mine), not any(error for _, error in mine))
