"""What predictors cost in perplexity on parts of a text, and how far that can be trusted.

Knows: scores of windows of text. Does not know: how predictors are made or chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from reference_engine.calibration.choosing import operating_point
from reference_engine.calibration.division import Ranges, n_tokens_of
from reference_engine.calibration.scratch import Scratch
from reference_engine.fitted_predictor import FittedPredictor
from reference_engine.observation import ObservedModel
from reference_engine.operating_points import Masking
from reference_engine.perplexity import Score, score_windows, text_windows
from reference_engine.step_progress import StepProgress

_NORMAL_QUANTILE: Final = 1.645  # 95 %, one-sided


@dataclass(frozen=True, slots=True)
class PairedScores:
    """The same windows of text scored with every neuron and with the predicted ones; at least one, of equal length."""

    exact: tuple[Score, ...]
    predicted: tuple[Score, ...]

    @property
    def exact_perplexity(self) -> float:
        """With every neuron."""
        return _perplexity(self.exact)

    @property
    def predicted_perplexity(self) -> float:
        """With the predicted neurons."""
        return _perplexity(self.predicted)

    @property
    def ratio(self) -> float:
        """Perplexity with the predicted neurons over that with every neuron."""
        return self.predicted_perplexity / self.exact_perplexity

    def loss_bound(self, n_windows: int) -> float:
        """Relative loss of perplexity that `n_windows` further windows will not exceed, with 95 % confidence.

        Windows count as independent draws: the bound of a prediction interval for the mean of the paired differences,
        with Student's quantile by its expansion for many degrees of freedom. A single window gives no interval; its
        own loss is returned.
        """
        losses = [p.nats / p.n_tokens - e.nats / e.n_tokens for e, p in zip(self.exact, self.predicted, strict=True)]
        mean, n = float(np.mean(losses)), len(losses)
        if n < 2:
            return math.expm1(mean)
        quantile = _NORMAL_QUANTILE + (_NORMAL_QUANTILE**3 + _NORMAL_QUANTILE) / (4 * (n - 1))
        return math.expm1(mean + quantile * float(np.std(losses, ddof=1)) * math.sqrt(1 / n + 1 / n_windows))


class PerplexityRuns:
    """Runs a model over parts of a text with the neurons that predictors choose; remembers results in the journal.

    Parameters
    ----------
    window : tokens computed from an empty context; the ranges that are run are multiples of it.
    progress : called with what is being run, tokens done, and tokens in all.
    """

    def __init__(
        self,
        model: ObservedModel,
        scratch: Scratch,
        token_ids: Sequence[int],
        window: int,
        progress: StepProgress,
    ) -> None:
        self._model = model
        self._scratch = scratch
        self._token_ids = token_ids
        self._window = window
        self._progress = progress

    def paired(self, part: str, ranges: Ranges, name: str, predictors: Sequence[FittedPredictor]) -> PairedScores:
        """Scores of the windows of some ranges; `part` and `name` are what ranges and predictors are remembered by."""
        exact = self._scores(f"perplexity of {part}, exact", ranges, None)
        return PairedScores(exact, self._scores(f"perplexity of {part}, {name}", ranges, predictors))

    def _scores(self, what: str, ranges: Ranges, predictors: Sequence[FittedPredictor] | None) -> tuple[Score, ...]:
        known = self._scratch.done(what)
        if known is not None:
            return tuple(Score(nats, n_tokens) for nats, n_tokens in known)
        d = self._model.model.decoder
        observer = None
        if predictors is not None:
            observer = Masking(operating_point(predictors, self._model.backend), d.ffn.d_ff, d.ffn.activation)
        n_tokens, n_done = n_tokens_of(ranges), 0

        def advance(n: int) -> None:
            nonlocal n_done
            n_done += n
            self._progress(what, n_done, n_tokens)

        scores: list[Score] = []
        for first, last in ranges:
            windows = text_windows(last - first, window=self._window, stride=self._window)
            scores += score_windows(self._model.watched(observer), self._token_ids[first:last], windows, advance)
        self._scratch.finish(what, [(score.nats, score.n_tokens) for score in scores])
        return tuple(scores)


def _perplexity(scores: Sequence[Score]) -> float:
    return Score(sum(s.nats for s in scores), sum(s.n_tokens for s in scores)).perplexity
