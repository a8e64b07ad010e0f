"""The taxonomy of errors, and the registry of rules that they name."""

import re
from pathlib import Path

import pytest

import flashfmt
from flashfmt import errors

PACKAGE = Path(flashfmt.__file__).parent
TESTS = Path(__file__).parent
RULE = re.compile(r"FF-[A-Z]+-[0-9]+")
FAMILIES = [
    "ZIP", "DIR", "JSON", "VER", "MAN", "ARR", "TEN", "BND", "IDX", "SUM", "FILE", "PRED", "STAT", "LIM", "ALIGN",
]  # fmt: skip


def mentioned(folder, *, suffix=""):
    """Rule ids in string literals of the sources of a folder."""
    found = set()
    for path in folder.rglob(f"*{suffix}.py"):
        if path.name not in ("rules.py", "test_errors.py"):
            found |= set(re.findall(r'"(FF-[A-Z]+-[0-9]+)"', path.read_text()))
    return found


def test_every_rule_that_is_raised_is_registered_and_the_reverse():
    assert mentioned(PACKAGE) == set(flashfmt.RULES)


def test_every_rule_is_broken_by_a_test():
    assert set(flashfmt.RULES) - mentioned(TESTS) == set()


def test_rules_are_numbered_without_holes():
    assert all(RULE.fullmatch(rule) for rule in flashfmt.RULES)
    for family in FAMILIES:
        numbers = [int(rule.rsplit("-", 1)[1]) for rule in flashfmt.RULES if rule.startswith(f"FF-{family}-")]
        assert numbers == list(range(1, len(numbers) + 1))
        assert numbers
    assert {rule.split("-")[1] for rule in flashfmt.RULES} == set(FAMILIES)


def test_statements_are_sentences():
    for statement in flashfmt.RULES.values():
        assert statement.endswith((".", "(verify).", "read)."))
        assert "\n" not in statement
    with pytest.raises(TypeError):
        flashfmt.RULES["FF-ZIP-1"] = "other"


def test_an_error_carries_its_evidence():
    error = errors.FlashFormatError(
        "not aligned", path="m.flash", where=4100, rule="FF-ALIGN-1", expected="a multiple of 4096", actual=4100
    )
    assert str(error) == "m.flash: FF-ALIGN-1 at byte 4100: not aligned (expected a multiple of 4096, got 4100)"
    assert (error.path, error.where, error.rule, error.actual) == (Path("m.flash"), 4100, "FF-ALIGN-1", 4100)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "wrong"),
        ({"path": "a"}, "a: wrong"),
        ({"where": "x"}, "x: wrong"),
        ({"rule": "FF-ZIP-1"}, "FF-ZIP-1: wrong"),
        ({"expected": None, "actual": 0}, "wrong (expected None, got 0)"),
        ({"actual": 0}, "wrong (expected None, got 0)"),
    ],
)
def test_an_error_says_what_it_knows(arguments, text):
    assert str(errors.FlashError("wrong", **arguments)) == text


def test_exit_codes():
    codes = {name: getattr(errors, name).exit_code for name in dir(errors) if name.endswith("Error")}
    assert codes.pop("FlashFormatError") == codes.pop("ChecksumError") == errors.EXIT_CORRUPT == 3
    assert codes.pop("UnsupportedError") == errors.EXIT_UNSUPPORTED == 4
    assert set(codes.values()) == {errors.EXIT_FAILURE} == {1}
    assert (errors.EXIT_OK, errors.EXIT_USAGE) == (0, 2)
