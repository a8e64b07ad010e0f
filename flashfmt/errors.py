"""The errors of the format, and the exit code each has on the command line.

Knows: what evidence an error carries. Does not know: who raises it. Every error that a file, a checkpoint or the
operating system can cause is one of these; anything else that escapes is a bug of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_CORRUPT = 3
EXIT_UNSUPPORTED = 4

_MISSING: Any = object()
_MAX_EVIDENCE_CHARACTERS = 500


class FlashError(Exception):
    """Base of all errors that flashfmt and its engines raise on purpose.

    Parameters
    ----------
    message : what is wrong, one clause, without the evidence.
    path : the file concerned.
    where : the place in the file: an array name, a JSON path, or a byte offset (an int).
    rule : id of the SPEC.md rule that was broken, such as ``FF-BND-2``.
    expected, actual : what the rule asks for and what was found.
    """

    exit_code = EXIT_FAILURE

    def __init__(
        self,
        message: str,
        *,
        path: str | Path | None = None,
        where: str | int | None = None,
        rule: str | None = None,
        expected: object = _MISSING,
        actual: object = _MISSING,
    ) -> None:
        self.message = message
        self.path = None if path is None else Path(path)
        self.where = where
        self.rule = rule
        self.expected = None if expected is _MISSING else expected
        self.actual = None if actual is _MISSING else actual
        self._has_evidence = expected is not _MISSING or actual is not _MISSING
        super().__init__(message)

    def __str__(self) -> str:
        place = f"byte {self.where}" if isinstance(self.where, int) else printable(self.where or "")
        head = " at ".join(part for part in (self.rule, place) if part)
        parts = [str(self.path) if self.path else None, head or None, self.message]
        text = ": ".join(part for part in parts if part)
        if self._has_evidence:
            text += f" (expected {printable(self.expected)}, got {printable(self.actual)})"
        return text


def printable(value: object) -> str:
    """Text of a value that may come from a file: one line of bounded length that cannot control a terminal."""
    text = str(value)
    if len(text) > _MAX_EVIDENCE_CHARACTERS:
        text = text[:_MAX_EVIDENCE_CHARACTERS] + "..."
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


class FlashFormatError(FlashError):
    """The file breaks a rule of SPEC.md: it is damaged, truncated, or was written by a faulty writer."""

    exit_code = EXIT_CORRUPT


class ChecksumError(FlashFormatError):
    """Stored bytes do not match their checksum."""


class UnsupportedError(FlashError):
    """The file is well formed, but this reader does not take its major version, a required feature, or its demands."""

    exit_code = EXIT_UNSUPPORTED


class FlashReadError(FlashError):
    """The operating system failed to deliver bytes that the file's structure promises."""


class FlashWriteError(FlashError):
    """The operating system failed to store the file; nothing is left under the final name."""


class CheckpointError(FlashError):
    """The source checkpoint cannot be converted: unknown, incomplete, misshapen, or with invalid values."""


class BudgetError(FlashError):
    """The memory ceiling is below what the model needs at the least; says the smallest workable figure."""


class PromptError(FlashError):
    """The prompt, message list or sampling options cannot be used with this model."""


class MissingExtraError(FlashError):
    """An optional dependency is needed; names the extra that brings it."""
