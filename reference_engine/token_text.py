"""Text for calibration and evaluation: files to token ids."""

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
