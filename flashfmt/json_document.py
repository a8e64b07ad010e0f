"""Strict JSON: bytes to checked Python objects, and those to typed structs (SPEC.md section "Documents").

The standard parser accepts duplicate keys, NaN, numbers beyond binary64 and any depth; a document with one of these
means different things to different readers, so it is refused here.

Knows: JSON and msgspec's types. Does not know: Zarr, the manifest.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import msgspec

from flashfmt.errors import FlashFormatError, printable
from flashfmt.layout import MAX_JSON_DEPTH, MAX_METADATA_BYTES

T = TypeVar("T")

_UTF8_MARK: Final = b"\xef\xbb\xbf"
# A string (also one that is never closed: then the rest of the text, so that the scan stays linear) or a bracket.
_STRING_OR_BRACKET: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_ERROR_PLACE: Final = re.compile(r"(.*) - at `(\$.*)`", re.DOTALL)


class _RefusedError(Exception):
    """A rule broken inside a callback of the parser."""

    def __init__(self, rule: str, message: str) -> None:
        self.rule = rule
        super().__init__(message)


def parse_document(raw: bytes, *, path: Path, where: str) -> dict[str, Any]:
    """Parse one document strictly.

    Parameters
    ----------
    raw : the bytes of the document.
    path, where : file and key, for errors.

    Raises
    ------
    FlashFormatError
        With the rule that is broken: FF-LIM-3, FF-LIM-4 or FF-JSON-n.
    """

    def fail(rule: str, message: str) -> NoReturn:
        raise FlashFormatError(message, path=path, where=where, rule=rule)

    if len(raw) > MAX_METADATA_BYTES:
        fail("FF-LIM-3", f"the document has {len(raw)} bytes, more than {MAX_METADATA_BYTES}")
    if raw.startswith(_UTF8_MARK):
        fail("FF-JSON-1", "the document begins with a byte order mark")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        fail("FF-JSON-1", f"the document is not UTF-8 at byte {error.start}")
    if _depth(raw) > MAX_JSON_DEPTH:
        fail("FF-LIM-4", f"the document nests deeper than {MAX_JSON_DEPTH}")
    try:
        document = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
    except _RefusedError as error:
        fail(error.rule, str(error))
    except ValueError as error:
        fail("FF-JSON-2", f"not JSON: {error}")
    if not isinstance(document, dict):
        fail("FF-JSON-5", "the top level of the document is not an object")
    if b"\\u" in raw and _has_surrogate(document):
        fail("FF-JSON-6", "a string holds an unpaired surrogate")
    return document


def convert(
    value: object, type_: type[T], *, path: Path, where: str, rule: str | Callable[[str], str], root: str = "$"
) -> T:
    """Turn parsed JSON into a typed struct, strictly: no booleans as numbers, no numbers as text.

    Parameters
    ----------
    rule : id of the rule a mismatch breaks, or a function from the JSON path of the mismatch to the id.
    root : JSON path of `value` in its document, for errors.

    Raises
    ------
    FlashFormatError
        Naming the JSON path of the first mismatch.
    """
    try:
        return msgspec.convert(value, type_, strict=True)
    except msgspec.ValidationError as error:
        match = _ERROR_PLACE.fullmatch(str(error))
        text, place = match.groups() if match else (str(error), "$")
        message, rule_id = printable(text), rule if isinstance(rule, str) else rule(place)
        raise FlashFormatError(message, path=path, where=f"{where} {root}{place[1:]}", rule=rule_id) from None


def _depth(raw: bytes) -> int:
    """Deepest nesting of brackets outside strings; the text need not be valid JSON."""
    depth = deepest = 0
    for match in _STRING_OR_BRACKET.finditer(raw):
        token = match[0]
        if token in (b"{", b"["):
            depth += 1
            deepest = max(deepest, depth)
        elif token in (b"}", b"]"):
            depth -= 1
    return deepest


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _RefusedError("FF-JSON-3", f"the key {repeated[:80]!a} occurs twice in an object")
    return members


def _refuse_constant(text: str) -> NoReturn:
    raise _RefusedError("FF-JSON-4", f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _RefusedError("FF-JSON-4", f"the number {text[:40]} is beyond binary64")
    return value


def _integer(text: str) -> int:
    value = int(text) if len(text) <= 20 else 1 << 64
    if not -(1 << 63) <= value < 1 << 64:
        raise _RefusedError("FF-JSON-4", f"the integer {text[:40]} does not fit 64 bits")
    return value


def _has_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return _SURROGATE.search(value) is not None
    if isinstance(value, dict):
        return any(_has_surrogate(key) or _has_surrogate(member) for key, member in value.items())
    return isinstance(value, list) and any(_has_surrogate(member) for member in value)
