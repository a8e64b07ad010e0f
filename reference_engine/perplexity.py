"""Perplexity of a text by windows that overlap, as Hugging Face's perplexity guide defines it.

A window holds `window` tokens and begins `stride` tokens after the one before; of each window the tokens that no
earlier window held are scored, each given all that stand before it in the window. The first token of a window has
nothing before it and is never scored. (The guide weighs windows by one token less; that changes nothing to speak of.)

Knows: windows and scores. Does not know: how logits come about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TextWindow:
    """Tokens ``[first, last)`` of a text, of which ``[scored_from, last)`` are scored."""

    first: int
    last: int
    scored_from: int


@dataclass(frozen=True, slots=True)
class Score:
    """Sum of negative log-likelihoods in nats, and how many tokens it is of."""

    nats: float
    n_tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean; infinite where that is beyond a float."""
        mean = self.nats / self.n_tokens
        return math.exp(mean) if mean < 700 else math.inf


class RunsWindows(Protocol):
    """Gives hidden states of one window of text, some tokens at a time, and logits of hidden states."""

    def hidden_states(self, token_ids: Sequence[int], /) -> Iterator[tuple[int, F32]]:
        """(index of the first token, float32 [n, d_model]), in order."""
        ...

    def logits(self, hidden: F32, /) -> F32:
        """float32 [n, vocab_size]."""
        ...


def text_windows(n_tokens: int, *, window: int, stride: int) -> list[TextWindow]:
    """Windows over a text of `n_tokens`; the last may be shorter.

    Raises
    ------
    ValueError
        If ``1 <= stride <= window`` does not hold, or the window has less than two tokens.
    """
    if not (1 <= stride <= window and window >= 2):
        raise ValueError(f"a stride of {stride} does not fit a window of {window} tokens")
    windows = []
    scored_to = 0
    for first in range(0, n_tokens, stride):
        last = min(first + window, n_tokens)
        scored_from = max(scored_to, first + 1)
        if scored_from < last:
            windows.append(TextWindow(first, last, scored_from))
        scored_to = last
        if last == n_tokens:
            break
    return windows


def score_text(
    model: RunsWindows,
    token_ids: Sequence[int],
    windows: Sequence[TextWindow],
    progress: Callable[[int], None] | None = None,
) -> Score:
    """Score of a text, all windows together; raises as `score_windows`."""
    scores = score_windows(model, token_ids, windows, progress)
    return Score(sum(score.nats for score in scores), sum(score.n_tokens for score in scores))


def score_windows(
    model: RunsWindows,
    token_ids: Sequence[int],
    windows: Sequence[TextWindow],
    progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """Score the windows of a text one by one.

    Parameters
    ----------
    progress : called with the tokens just run.

    Raises
    ------
    ValueError
        If no window has a token to score.
    """
    if not windows:
        raise ValueError("the text is too short to score")
    scores = []
    for window in windows:
        nats, n_scored = 0.0, 0
        ids = np.asarray(token_ids[window.first : window.last], np.int64)
        for start, hidden in model.hidden_states(ids.tolist()):
            first = max(start, window.scored_from - window.first - 1)  # the state at i predicts token i + 1
            last = min(start + len(hidden), len(ids) - 1)
            if first < last:
                logits = model.logits(hidden[first - start : last - start])
                nats += float(_nats(logits, ids[first + 1 : last + 1]).sum())
                n_scored += last - first
            if progress is not None:
                progress(len(hidden))
        scores.append(Score(nats, n_scored))
    return scores


def _nats(logits: F32, targets: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Negative log-likelihood of each target, float64 [n], from logits [n, vocab_size]."""
    peak = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - peak).sum(axis=1, dtype=np.float64)) + peak[:, 0]
    likelihoods: npt.NDArray[np.float64] = total - logits[np.arange(len(targets)), targets]
    return likelihoods
