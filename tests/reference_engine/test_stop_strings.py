from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashfmt.errors import PromptError
from reference_engine.stop_strings import StopStrings

SHORT = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def cut_into_pieces(text, cuts):
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(places)]


def expected_text(text, stops):
    """Text before the stop string that is complete first."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(found)[1]] if found else text


@given(text=SHORT, stops=STOPS, cuts=st.lists(st.integers(0, 12), max_size=6))
def test_the_text_ends_before_the_first_stop_string(text, stops, cuts):
    matcher = StopStrings(stops)
    parts = [matcher.push(piece) for piece in cut_into_pieces(text, cuts)]
    assert (matcher.matched is not None) == any(stop in text for stop in stops)
    assert "".join(parts) + matcher.flush() == expected_text(text, stops)


@given(text=SHORT, stops=STOPS)
def test_nothing_is_held_back_but_the_beginning_of_a_stop_string(text, stops):
    matcher = StopStrings(stops)
    passed = ""
    for n, character in enumerate(text, 1):
        passed += matcher.push(character)
        if matcher.matched is not None:
            break
        held = text[len(passed) : n]
        assert passed == text[: len(passed)]
        possible = [text[at:n] for at in range(n + 1) if any(stop.startswith(text[at:n]) for stop in stops)]
        assert held == max(possible, key=len, default="")


def test_what_matched_is_told_and_the_rest_is_dropped():
    matcher = StopStrings(["\n\nUser:", "###"])
    assert matcher.push("One\n") == "One"
    assert matcher.push("\nUse") == ""
    assert matcher.push("ful\n") == "\n\nUseful"
    assert matcher.push("\nUser: no") == ""
    assert matcher.matched == "\n\nUser:"
    assert matcher.push("more") == ""
    assert matcher.flush() == ""


def test_of_stop_strings_that_end_together_the_longest_counts():
    matcher = StopStrings(["b", "ab"])
    assert matcher.push("xab") == "x"
    assert matcher.matched == "ab"


def test_without_stop_strings_everything_passes():
    matcher = StopStrings([])
    assert matcher.push("anything") == "anything"
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(PromptError, match="empty"):
        StopStrings(["a", ""])
