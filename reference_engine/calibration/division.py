"""Dividing a text into what is fitted to, what choices are made on, and what is held out."""

from __future__ import annotations

from dataclasses import dataclass

from flashfmt.errors import PromptError


@dataclass(frozen=True, slots=True)
class Division:
    """A text in three parts that do not overlap: ``[0, validation)`` is for fitting, ``[validation, held_out)`` for
    choices, ``[held_out, n_tokens)`` for measuring. All are multiples of `window` tokens."""

    validation: int
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
    n_validation = min(max(1, round(held_out * n_windows / 2)), n_windows - n_held_out - 1)
    first = n_windows - n_held_out
    return Division((first - n_validation) * window, first * window, n_windows * window, window)
