"""Choosing the next token from logits.

The filters, their order, their defaults and the meaning of their off values are llama.cpp's (src/llama-sampling.cpp,
common/common.h): penalties, top-k, top-p, min-p, temperature, draw. Random numbers are numpy's PCG64, so a seed gives
the same text here on every machine, but not the text that llama.cpp gives.

Knows: logits and token ids. Does not know: the model, the tokenizer, when to stop.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from flashfmt.errors import FlashError, PromptError

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

_INFINITE: Final = float("inf")
_NUCLEUS_STEPS: Final = (256, 4096)  # candidates that top-p sorts first; nearly always enough

_RANGES: Final[dict[str, tuple[float, float]]] = {
    "temperature": (-100.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repeat_penalty": (0.01, 100.0),
    "repeat_last_n": (-1, _INFINITE),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
    "min_keep": (0, _INFINITE),
    "seed": (0, 2**64 - 1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen.

    Parameters
    ----------
    temperature : divides the logits; at 0 or below the likeliest token is taken.
    top_k : keep the k likeliest tokens; 0 or below keeps all.
    top_p : keep the fewest tokens whose probabilities sum to this; 1 keeps all.
    min_p : keep tokens at least this share as probable as the likeliest one; 0 keeps all.
    min_keep : tokens that top-p and min-p leave at the least.
    repeat_penalty : of each token among the last ones, a positive logit is divided by this, another multiplied.
    repeat_last_n : how many last tokens the penalties look at, the prompt's included; 0 none, -1 all.
    presence_penalty : subtracted from the logit of each token among the last ones.
    frequency_penalty : the same, once for each occurrence.
    seed : makes the choices repeatable; None draws fresh entropy.

    Raises
    ------
    PromptError
        If a value is outside its range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    min_keep: int = 0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # so that NaN is refused too
                expected = f"at least {low}" if high == _INFINITE else f"{low} to {high}"
                raise PromptError(f"sampling option {name} is out of range", expected=expected, actual=value)

    @property
    def penalises(self) -> bool:
        """Whether earlier tokens change the logits."""
        neutral = (self.repeat_penalty, self.presence_penalty, self.frequency_penalty) == (1.0, 0.0, 0.0)
        return self.repeat_last_n != 0 and not neutral


class Sampler:
    """Chooses tokens for one sequence. `accept` every token of it, the prompt's included, in order.

    Parameters
    ----------
    options : how to choose.
    vocab_size : length of the logits.
    """

    def __init__(self, options: SamplingOptions, vocab_size: int) -> None:
        self.options = options
        self.vocab_size = vocab_size
        self._random = np.random.Generator(np.random.PCG64(options.seed))
        self._recent: deque[int] = deque()
        self._counts = np.zeros(vocab_size if options.penalises else 0, np.int32)  # occurrences in _recent

    def accept(self, token: int) -> None:
        """Count `token` as part of the sequence."""
        if not self.options.penalises:
            return
        self._recent.append(token)
        self._counts[token] += 1
        if len(self._recent) > self.options.repeat_last_n >= 0:
            self._counts[self._recent.popleft()] -= 1

    def sample(self, logits: F32) -> int:
        """Choose the next token. Does not accept it.

        Parameters
        ----------
        logits : float32 [vocab_size]; not changed. -inf rules a token out.

        Raises
        ------
        FlashError
            If a logit is NaN or +inf, or all are -inf.
        """
        if logits.shape != (self.vocab_size,):
            raise ValueError(f"logits have shape {logits.shape}, not ({self.vocab_size},)")
        if self.options.penalises:
            logits = self._penalised(logits)
        peak = float(logits.max())  # NaN wherever any logit is
        if not np.isfinite(peak):
            raise FlashError("the model gave logits that nothing can be drawn from", expected="numbers", actual=peak)
        if self.options.temperature <= 0:
            return int(np.argmax(logits))
        return self._draw(logits, kept_ids(logits, self.options))

    def _penalised(self, logits: F32) -> F32:
        o = self.options
        seen = np.flatnonzero(self._counts)
        values = logits[seen].astype(np.float64)
        values = np.where(values > 0, values / o.repeat_penalty, values * o.repeat_penalty)
        values -= self._counts[seen] * o.frequency_penalty + o.presence_penalty
        changed = logits.copy()
        with np.errstate(over="ignore"):  # `sample` refuses infinities
            changed[seen] = values
        return changed

    def _draw(self, logits: F32, ids: Ids) -> int:
        kept = logits[ids].astype(np.float64)
        with np.errstate(over="ignore"):  # a tiny temperature sends all but the likeliest to -inf
            weights = np.exp((kept - kept.max()) / self.options.temperature)
        sums = np.cumsum(weights)
        place = np.searchsorted(sums, self._random.random() * sums[-1], side="right")
        last = np.searchsorted(sums, sums[-1])  # the product above may round up to the sum
        return int(ids[min(place, last)])


def kept_ids(logits: F32, options: SamplingOptions) -> Ids:
    """The tokens that top-k, top-p and min-p leave to draw from.

    Parameters
    ----------
    logits : float32 [vocab_size], without NaN.

    Returns
    -------
    Ids
        int64 [n_kept], at least one. By falling logit, ties by rising id, unless neither top-k nor top-p is on: then by
        rising id.
    """
    n_keep = max(options.min_keep, 1)
    if options.top_k > 0:
        ids = _largest(logits, options.top_k)
        if options.top_p < 1:
            ids = ids[: _nucleus_size(_probabilities(logits[ids]), options.top_p, n_keep)]
    elif options.top_p < 1:
        ids = _nucleus(logits, options.top_p, n_keep)
    else:
        ids = np.arange(len(logits))
    if options.min_p > 0:
        kept = logits[ids]
        likely = ids[kept >= kept.max() + np.log(options.min_p)]
        ids = likely if len(likely) >= n_keep else ids[np.sort(_largest(kept, n_keep))]
    return ids


def _largest(logits: F32, k: int) -> Ids:
    """Indices of the k largest logits by falling logit; of equal ones the lowest, whatever numpy's partition does."""
    if k >= len(logits):
        ids = np.arange(len(logits))
    else:
        smallest_kept = np.partition(logits, -k)[-k]
        above = np.flatnonzero(logits > smallest_kept)
        ids = np.concatenate([above, np.flatnonzero(logits == smallest_kept)[: k - len(above)]])
    return ids[np.lexsort((ids, -logits[ids]))]


def _nucleus(logits: F32, top_p: float, n_keep: int) -> Ids:
    """The nucleus of the whole vocabulary, without sorting it where a part is enough."""
    probabilities = _probabilities(logits)
    for k in _NUCLEUS_STEPS:
        ids = _largest(logits, k)
        if n_keep <= len(ids) and np.cumsum(probabilities[ids])[-1] >= top_p:
            break
    else:
        ids = _largest(logits, len(logits))
    return ids[: _nucleus_size(probabilities[ids], top_p, n_keep)]


def _nucleus_size(probabilities: F64, top_p: float, n_keep: int) -> int:
    """How many of the falling `probabilities` it takes to reach `top_p`, and at least `n_keep`."""
    return max(int(np.searchsorted(np.cumsum(probabilities), top_p)) + 1, n_keep)


def _probabilities(logits: F32) -> F64:
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    total: F64 = weights / weights.sum()
    return total
