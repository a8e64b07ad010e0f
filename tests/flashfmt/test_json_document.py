"""Strict JSON against the standard parser."""

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfmt.errors import FlashFormatError
from flashfmt.json_document import convert, parse_document

PATH = Path("m.flash")


def parse(raw):
    return parse_document(raw, path=PATH, where="zarr.json")


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(), values, max_size=3), st.booleans())
def test_valid_documents_parse_as_usual(document, ascii_only):
    raw = json.dumps(document, ensure_ascii=ascii_only).encode("utf-8")
    assert parse(raw) == document


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text('{}[]",:\\ue0d8N19.-', max_size=60).map(str.encode)))
def test_any_bytes_parse_or_break_a_rule(raw):
    try:
        assert isinstance(parse(raw), dict)
    except FlashFormatError as error:
        assert error.rule.startswith(("FF-JSON-", "FF-LIM-"))  # noqa: PT017


@pytest.mark.parametrize(
    ("raw", "rule"),
    [
        (b"", "FF-JSON-2"),
        (b"\xef\xbb\xbf{}", "FF-JSON-1"),
        (b"\xff\xfe{\0}\0", "FF-JSON-1"),
        (b'{"a":"\xc0\xaf"}', "FF-JSON-1"),
        (b'{"a":1,}', "FF-JSON-2"),
        (b"{'a':1}", "FF-JSON-2"),
        (b'{"a":1} {}', "FF-JSON-2"),
        (b'{"a":01}', "FF-JSON-2"),
        (b'{"a":"\n"}', "FF-JSON-2"),
        (b'{"a":"', "FF-JSON-2"),
        (b'{"a":1,"\\u0061":2}', "FF-JSON-3"),
        (b'[{"x":{"a":1,"a":1}}]', "FF-JSON-3"),
        (b'{"a":NaN}', "FF-JSON-4"),
        (b'{"a":-1e400}', "FF-JSON-4"),
        (b'{"a":-9223372036854775809}', "FF-JSON-4"),
        (b'{"a":' + b"1" * 100_000 + b"}", "FF-JSON-4"),
        (b'"a"', "FF-JSON-5"),
        (b'{"\\udfff":1}', "FF-JSON-6"),
        (b'{"a":[{"b":"\\ud83d x"}]}', "FF-JSON-6"),
        (b'{"a":' * 33 + b"1" + b"}" * 33, "FF-LIM-4"),
        (b'{"a":' + b"[" * 900_000, "FF-LIM-4"),
        (b"{}" + b" " * (1 << 20), "FF-LIM-3"),
    ],
)
def test_a_broken_rule_is_named(raw, rule):
    with pytest.raises(FlashFormatError) as caught:
        parse(raw)
    assert caught.value.rule == rule, str(caught.value)
    assert len(str(caught.value)) < 300
    str(caught.value).encode()


def test_limits_are_inclusive():
    assert parse(b'{"a":' * 32 + b"1" + b"}" * 32)
    assert parse(b"{}".ljust(1 << 20)) == {}
    assert parse(b'{"a":"\\ud83d\\ude00[[[[","b":18446744073709551615}') == {"a": "\U0001f600[[[[", "b": (1 << 64) - 1}


@pytest.mark.parametrize("raw", [b'"' * (1 << 20), b'\\"' * (1 << 19), b'{"' + b"\\" * ((1 << 20) - 2)])
def test_hostile_strings_take_linear_time(raw):
    with pytest.raises(FlashFormatError):
        parse(raw)


class Point(msgspec.Struct):
    x: int
    tags: list[str] = []


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"x": True}, "$.deep.x"),
        ({"x": "1"}, "$.deep.x"),
        ({"x": 1, "tags": ["a", 2]}, "$.deep.tags[1]"),
        ({}, "$.deep"),
        ([], "$.deep"),
    ],
)
def test_a_mismatch_names_its_json_path(value, place):
    with pytest.raises(FlashFormatError) as caught:
        convert(value, Point, path=PATH, where="zarr.json", rule="FF-MAN-2", root="$.deep")
    assert caught.value.where == f"zarr.json {place}"
    assert caught.value.rule == "FF-MAN-2"
