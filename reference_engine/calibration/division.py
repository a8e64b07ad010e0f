"""Dividing a text into what is fitted to, what choices are made on, and what is held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from flashfmt.errors import PromptError

_MAX_BLOCKS: Final = 8

Ranges = tuple[tuple[int, int], ...]
"""Tokens ``[first, last)`` each, ascending, apart from each other."""


@dataclass(frozen=True, slots=True)
class Division:
    """A text in three parts that do not overlap: `train` is for fitting, `validation` for choices,
    ``[held_out, n_tokens)`` for measuring. All ranges are multiples of `window` tokens.

    Validation lies in a few blocks spread over what comes before `held_out`, because a text often changes its subject
    on the way: choices made on its last pages would be choices for these. What is held out is the end in one piece,
    so that no page of it stands between pages that were fitted to.
    """

    train: Ranges
    validation: Ranges
    held_out: int
    n_tokens: int
    window: int


def divide(n_tokens: int, window: int, held_out: float) -> Division:
    """Divide a text; validation has half the size of what is held out. A last incomplete window is left out.

    Raises
    ------
    PromptError
        If there are not three windows.
    """
    n_windows = n_tokens // window
    if n_windows < 3:
        raise PromptError(
            "the text is too short to be divided",
            expected=f"at least {3 * window} tokens",
            actual=n_tokens,
        )
    n_held_out = min(max(1, round(held_out * n_windows)), n_windows - 2)
    n_before = n_windows - n_held_out
    n_validation = min(max(1, round(held_out * n_windows / 2)), n_before - 1)
    n_blocks = min(_MAX_BLOCKS, n_validation, n_before - n_validation)
    train, validation, end = [], [], 0
    for block in range(1, n_blocks + 1):  # each segment ends with its block of validation
        begin, end = end, block * n_before // n_blocks
        cut = end - (block * n_validation // n_blocks - (block - 1) * n_validation // n_blocks)
        if cut > begin:
            train.append((begin * window, cut * window))
        validation.append((cut * window, end * window))
    return Division(tuple(train), tuple(validation), n_before * window, n_windows * window, window)


def n_tokens_of(ranges: Ranges) -> int:
    """Tokens in all."""
    return sum(last - first for first, last in ranges)


def located(ranges: Ranges, within: Ranges) -> Ranges:
    """Where `ranges` come to lie when the ranges `within`, each of which may hold some of them, are put in a row."""
    places, start = [], 0
    for first, last in within:
        places += [(a - first + start, b - first + start) for a, b in ranges if first <= a and b <= last]
        start += last - first
    return tuple(places)
