"""Ending a text at the first stop string, while it streams.

Knows: text in pieces. Does not know: tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

from flashfmt.errors import PromptError


class StopStrings:
    """Passes text on up to the first stop string, holding back only what could be the beginning of one.

    The first stop string is the one that is complete first: how the text is cut into pieces does not matter. Of several
    that are complete at the same character the longest counts.

    Parameters
    ----------
    stops : texts to stop at; none stops never.

    Raises
    ------
    PromptError
        If one of them is empty.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self.stops = tuple(dict.fromkeys(stops))
        if "" in self.stops:
            raise PromptError("a stop string is empty")
        self.matched: str | None = None
        self._held = ""

    def push(self, piece: str) -> str:
        """Take the next piece; returns the text that is now certain to come before any stop string.

        Once `matched` is set, everything returns the empty text.
        """
        if self.matched is not None:
            return ""
        text = self._held + piece
        found = [(at + len(stop), at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.matched = min(found)
            self._held = ""
            return text[:at]
        n_held = max((_overlap(text, stop) for stop in self.stops), default=0)
        cut = len(text) - n_held
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What is still held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, shorter than `stop` itself."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
