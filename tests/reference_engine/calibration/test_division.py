import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashfmt.errors import PromptError
from reference_engine.calibration.division import divide, located, n_tokens_of
from reference_engine.calibration.options import Target


@given(n_windows=st.integers(3, 500), window=st.integers(2, 600), rest=st.integers(0, 599), share=st.floats(0.01, 0.99))
def test_the_parts_are_windows_that_do_not_overlap(n_windows, window, rest, share):
    d = divide(n_windows * window + rest % window, window, share)
    owner = np.zeros(n_windows, np.int64)
    for part, ranges in enumerate((d.train, d.validation, ((d.held_out, d.n_tokens),)), 1):
        assert n_tokens_of(ranges) > 0
        for first, last in ranges:
            assert first % window == last % window == 0
            assert not owner[first // window : last // window].any()
            owner[first // window : last // window] = part
    assert owner.all()
    assert d.n_tokens == n_windows * window


def test_what_is_held_out_is_the_share_asked_for():
    d = divide(1000, 10, 0.2)
    assert (d.held_out, d.n_tokens, n_tokens_of(d.validation)) == (800, 1000, 100)


def test_validation_lies_all_over_what_is_not_held_out():
    d = divide(1000, 10, 0.2)
    assert len(d.validation) == 8
    assert {last - first for first, last in d.validation} <= {10, 20}
    assert {last - first for first, last in d.train} <= {80, 90}


@given(st.data())
def test_places_of_ranges_put_in_a_row(data):
    cuts = sorted(data.draw(st.sets(st.integers(0, 60), min_size=4, max_size=12)))
    within = tuple(zip(cuts[::2], cuts[1::2], strict=False))
    first, last = data.draw(st.sampled_from(within))
    asked = ((first, first + (last - first + 1) // 2), within[-1])
    tokens = np.concatenate([np.arange(*bounds) for bounds in within])
    found = [tokens[slice(*place)] for place in located(asked, within)]
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate([np.arange(*bounds) for bounds in asked]))


def test_a_short_text_is_refused():
    with pytest.raises(PromptError, match="too short"):
        divide(29, 10, 0.2)


@pytest.mark.parametrize(
    ("text", "metric", "value"),
    [
        ("recall=0.95", "recall", 0.95),
        ("recall=95%", "recall", 0.95),
        ("perplexity=1%", "perplexity", 0.01),
        ("perplexity=.01", "perplexity", 0.01),
    ],
)
def test_targets(text, metric, value):
    target = Target.parse(text)
    assert (target.metric, target.value) == (metric, pytest.approx(value))


@pytest.mark.parametrize("text", ["", "recall", "recall=2", "recall=0", "loss=1%", "perplexity=-1%", "perplexity=1%%"])
def test_other_targets_are_refused(text):
    with pytest.raises(ValueError, match="not a target"):
        Target.parse(text)
