import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfmt.errors import BudgetError
from reference_engine.plan import FixedParts
from reference_engine.slot_sharing import expected_misses, predicted_window, share_slots
from reference_engine.sparse_plan import BundleSizes, plan_sparse

N = 200
MIB = 1 << 20
FIXED = FixedParts(process=100 * MIB, residents=50 * MIB, kv_cache=10 * MIB, scratch=5 * MIB, selectors=7 * MIB)
SIZES = BundleSizes(n_layers=4, n_neurons=1000, stride=3072)
curves_of_layers = st.lists(
    st.lists(st.floats(0, 0.3), min_size=1, max_size=6).map(lambda steps: np.minimum(np.cumsum(steps), 1.0)),
    min_size=1,
    max_size=4,
)


def misses(curves, shares):
    return sum(np.interp(n, *curve) for n, curve in zip(shares, curves, strict=True))


@given(windows=curves_of_layers)
def test_curves_fall_from_the_active_neurons_to_nothing_and_are_convex(windows):
    for window in windows:
        slots, missing = expected_misses(window, N)
        assert (np.diff(slots) > 0).all()
        assert missing[0] <= window[0] * N + 1e-9
        assert (slots[0], slots[-1], missing[-1]) == (0, N, 0)
        slopes = np.diff(missing) / np.diff(slots)
        assert (slopes <= 1e-9).all()
        assert (np.diff(slopes) >= -1e-9).all()


def test_a_window_of_k_tokens_misses_what_the_next_one_adds():
    slots, missing = expected_misses([0.1, 0.15, 0.18, 0.2], N)
    np.testing.assert_allclose(np.interp([20, 30, 36], slots, missing), [10, 6, 4])


def test_what_a_predictor_names_grows_as_if_a_token_were_several():
    active = 1 - 0.9 ** np.arange(1, 9)  # independent tokens that use a tenth of the neurons
    np.testing.assert_allclose(predicted_window(active, 1 - 0.9**2), 1 - 0.81 ** np.arange(1, 9))
    core = 0.05 + 0.95 * (1 - 0.95 ** np.arange(1, 9))
    named = predicted_window(core, 0.3)
    assert named[0] == pytest.approx(0.3)
    assert (np.diff(named) > 0).all()
    assert (named > core).all()
    assert named[-1] < 1


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 1.0])
def test_a_predictor_that_names_fewer_than_are_active_or_all_changes_nothing(share):
    np.testing.assert_array_equal(predicted_window([0.1, 0.15], share), [0.1, 0.15])


@given(windows=curves_of_layers, data=st.data())
@settings(max_examples=60, deadline=None)
def test_sharing_is_as_good_as_the_best_of_all_swaps(windows, data):
    curves = [expected_misses(window, N) for window in windows]
    n_layers = len(curves)
    n_slots = data.draw(st.integers(n_layers * 10, n_layers * N))
    shares = share_slots(n_slots, N, curves, n_layers=n_layers, minimum=10)
    assert sum(shares) == n_slots
    assert all(10 <= n <= N for n in shares)
    for giver in range(n_layers):
        for taker in range(n_layers):
            for amount in (5, 20, 80):
                swapped = list(shares)
                swapped[giver] -= amount
                swapped[taker] += amount
                if giver != taker and swapped[giver] >= 10 and swapped[taker] <= N:
                    assert misses(curves, swapped) >= misses(curves, shares) - 1.01  # a piece ends within a slot


def test_the_layer_that_forgets_more_gets_more():
    busy, calm = expected_misses(np.linspace(0.1, 0.8, 16), N), expected_misses(np.linspace(0.05, 0.06, 16), N)
    shares = share_slots(150, N, [busy, calm], n_layers=2, minimum=10)
    assert shares[0] > 2 * shares[1]


@pytest.mark.parametrize(("n_slots", "shares"), [(30, [10, 10, 10]), (32, [11, 11, 10]), (600, [200] * 3)])
def test_without_statistics_layers_get_the_same(n_slots, shares):
    assert share_slots(n_slots, N, None, n_layers=3, minimum=10) == shares


def test_too_few_slots_are_refused():
    with pytest.raises(ValueError, match="29 slots are too few"):
        share_slots(29, N, None, n_layers=3, minimum=10)


@given(ceiling=st.integers(0, 300 * MIB), with_curves=st.booleans())
@settings(max_examples=200)
def test_plans_stay_below_their_ceiling_or_are_refused_below_the_floor(ceiling, with_curves):
    curves = [expected_misses([0.1, 0.1 + 0.02 * layer], 1000) for layer in range(4)] if with_curves else None
    try:
        plan = plan_sparse(FIXED, SIZES, ceiling, 2048, curves)
    except BudgetError as error:
        floor = int(error.expected.split()[2])
        assert ceiling < floor
        assert plan_sparse(FIXED, SIZES, floor, 2048, curves).planned <= floor
        return
    assert plan.planned <= ceiling
    assert plan.floor <= ceiling
    assert plan.planned == sum(nbytes for _, nbytes in plan.rows())
    assert all(64 <= n <= 1000 for n in plan.capacities)
    assert (plan.expected_read is None) == (curves is None)
    unused = ceiling - plan.planned
    assert plan.held_share == 1 or unused < 5 * (4096 + 3072) + MIB // 4


def test_expected_reads_fall_to_nothing_with_memory():
    curves = [expected_misses([0.1, 0.15], 1000)] * 4
    floor = plan_sparse(FIXED, SIZES, 1 << 40, 2048, curves).floor
    reads = [plan_sparse(FIXED, SIZES, floor + i * MIB, 2048, curves).expected_read for i in range(20)]
    assert reads == sorted(reads, reverse=True)
    assert reads[0] > reads[-1] == 0
