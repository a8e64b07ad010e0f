"""Text for calibration and evaluation: files to token ids, and their division into train, validation, held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashfmt.errors import FlashReadError, PromptError
from reference_engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenText:
    """Token ids of some files in a row; `name` is for people, `sha256` of the ids."""

    name: str
    token_ids: tuple[int, ...]

    @property
    def sha256(self) -> str:
        """Identity of the text, as this tokenizer sees it."""
        return hashlib.sha256(repr(self.token_ids).encode()).hexdigest()

    def last(self, share: float) -> TokenText:
        """The last part of it: this share of its tokens, at least one."""
        n = max(1, round(share * len(self.token_ids)))
        whole = n >= len(self.token_ids)
        return self if whole else TokenText(f"last {share:.0%} of {self.name}", self.token_ids[-n:])

    def first(self, n_tokens: int | None) -> TokenText:
        """At most its first `n_tokens` tokens."""
        return self if n_tokens is None else TokenText(self.name, self.token_ids[:n_tokens])


def read_texts(paths: Sequence[Path], tokenizer: Tokenizer) -> TokenText:
    """Read UTF-8 text files and encode them, one after another.

    Raises
    ------
    FlashReadError
        If a file cannot be read.
    PromptError
        If a file is no UTF-8 text, or all are empty.
    """
    token_ids: list[int] = []
    for path in paths:
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise PromptError("not UTF-8 text", path=path, where=error.start) from None
        except OSError as error:
            raise FlashReadError(f"cannot be read: {error.strerror or error}", path=path) from error
        token_ids += tokenizer.encode(text, add_special_tokens=True)
    if not token_ids:
        raise PromptError("the text is empty", path=paths[0] if paths else None)
    return TokenText(", ".join(path.name for path in paths), tuple(token_ids))


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
