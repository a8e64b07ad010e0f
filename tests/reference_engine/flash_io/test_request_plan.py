import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_engine.flash_io.request_plan import plan_requests

UNIT = 512
SCRATCH = 1 << 50


@st.composite
def range_sets(draw):
    """Sorted ranges with gaps, and slots that are now neighbours, now far apart; everything in units."""
    n = draw(st.integers(0, 30))
    sizes = draw(st.lists(st.integers(1, 9), min_size=n, max_size=n))
    gaps = draw(st.lists(st.sampled_from([0, 0, 1, 2, 3, 50]), min_size=n, max_size=n))
    jumps = draw(st.lists(st.sampled_from([0, 0, 7]), min_size=n, max_size=n))
    offsets = np.cumsum(np.array(gaps, np.int64) + np.r_[0, sizes[:-1]].astype(np.int64)[:n]) * UNIT
    addresses = (1000 + np.cumsum(np.array(jumps, np.int64) + np.r_[0, sizes[:-1]].astype(np.int64)[:n])) * UNIT
    order = draw(st.permutations(range(n))) if draw(st.booleans()) and len(set(sizes)) == 1 else range(n)
    return offsets, np.array(sizes, np.int64) * UNIT, addresses[list(order)]


def plain_plan(offsets, nbytes, addresses, *, gap_bytes, max_request_bytes, max_segments):
    """[(offset, nbytes, [(address, nbytes), ...])], one byte unit at a time."""
    requests = []
    run = last_end = None
    n_pieces = 0
    for offset, size, address in zip(offsets.tolist(), nbytes.tolist(), addresses.tolist(), strict=True):
        if last_end is None or offset - last_end > gap_bytes:
            run = offset
            window = None
        at = offset
        while at < offset + size:
            index = (at - run) // max_request_bytes
            end = min(offset + size, run + (index + 1) * max_request_bytes)
            target, piece = address + at - offset, end - at
            if index != window or n_pieces == max_segments // 2:
                requests.append([at, 0, []])
                window, n_pieces = index, 0
            request = requests[-1]
            gap = at - (request[0] + request[1])
            if gap:
                request[2].append([SCRATCH, gap])
                request[1] += gap
            if request[2] and not gap and sum(request[2][-1]) == target:
                request[2][-1][1] += piece
            else:
                request[2].append([target, piece])
            request[1] += piece
            n_pieces += 1
            at = end
        last_end = offset + size
    return requests


def as_lists(plan):
    segments = [list(pair) for pair in plan.segments.tolist()]
    return [
        [offset, nbytes, segments[first : first + n]]
        for offset, nbytes, first, n in zip(
            plan.offsets.tolist(),
            plan.nbytes.tolist(),
            plan.first_segment.tolist(),
            plan.n_segments.tolist(),
            strict=True,
        )
    ]


@given(
    ranges=range_sets(),
    gap=st.sampled_from([0, 1, 2, 3]),
    cap=st.sampled_from([4, 5, 16, 1000]),
    max_segments=st.sampled_from([2, 3, 6, 1024]),
)
@settings(max_examples=300, deadline=None)
def test_plan_is_that_of_a_plain_loop(ranges, gap, cap, max_segments):
    knobs = {"gap_bytes": gap * UNIT, "max_request_bytes": cap * UNIT, "max_segments": max_segments}
    plan = plan_requests(*ranges, **knobs, scratch_address=SCRATCH)
    assert as_lists(plan) == plain_plan(*ranges, **knobs)


@given(ranges=range_sets(), gap=st.sampled_from([0, 1, 3]), cap=st.sampled_from([4, 7, 1000]))
@settings(max_examples=100, deadline=None)
def test_every_byte_goes_to_its_slot_within_the_limits(ranges, gap, cap):
    plan = plan_requests(
        *ranges, gap_bytes=gap * UNIT, max_request_bytes=cap * UNIT, max_segments=8, scratch_address=SCRATCH
    )
    assert (plan.nbytes <= cap * UNIT).all()
    assert (plan.n_segments <= 8).all()
    landed = {}
    for offset, nbytes, segments in as_lists(plan):
        assert sum(size for _, size in segments) == nbytes
        assert segments[0][0] != SCRATCH
        assert segments[-1][0] != SCRATCH
        at = offset
        for address, size in segments:
            if address == SCRATCH:
                assert size <= gap * UNIT
            else:
                landed.update((address + i, at + i) for i in range(0, size, UNIT))
            at += size
    expected = {
        address + i: offset + i
        for offset, nbytes, address in zip(*(a.tolist() for a in ranges), strict=True)
        for i in range(0, nbytes, UNIT)
    }
    assert landed == expected


@pytest.mark.parametrize("knobs", [(-1, 512, 8), (512, 512, 8), (0, 512, 1)])
def test_impossible_knobs_are_refused(knobs):
    gap, cap, max_segments = knobs
    one = np.ones(1, np.int64)
    with pytest.raises(ValueError, match="cannot plan"):
        plan_requests(
            one, one, one, gap_bytes=gap, max_request_bytes=cap, max_segments=max_segments, scratch_address=SCRATCH
        )
