import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashfmt.errors import PromptError
from reference_engine.calibration.division import divide
from reference_engine.calibration.options import Target


@given(n_windows=st.integers(3, 500), window=st.integers(2, 600), rest=st.integers(0, 599), share=st.floats(0.01, 0.99))
def test_the_parts_are_windows_that_do_not_overlap(n_windows, window, rest, share):
    d = divide(n_windows * window + rest % window, window, share)
    assert 0 < d.validation < d.held_out < d.n_tokens == n_windows * window
    assert {d.validation % window, d.held_out % window} == {0}


def test_what_is_held_out_is_the_share_asked_for():
    d = divide(1000, 10, 0.2)
    assert (d.validation, d.held_out, d.n_tokens) == (700, 800, 1000)


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
