"""How much a predictor should care about each neuron: by what it adds to the layer's output, and how often.

A fit counts all neurons of a layer alike, and trusts what it has learnt on any text. Both can be dear: trained models
have a few neurons that fire for nearly every token, or hardly ever, and then add tens of times what others do. On text
unlike that of the fit such a neuron was missed for some tokens, and without it these came out wrong.

Neuron i is worth computing for a token when ``P(active) * size[i]`` passes a cut that all neurons of a layer share.
``P(active)`` is the predictor's with probability ``1 - DISTRUST``, and with probability `DISTRUST` only the share of
tokens for which the neuron is active at all. The sizes become part of the bias. The share gives a floor that the logits
do not fall below; neurons whose floor lies above the cut are predicted for every token.

Knows: shares and sizes of neurons, fits. Does not know: where they come from, files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self, cast

import numpy as np
import numpy.typing as npt

from reference_engine.predictor_training import F32, LOGIT_LIMIT, LowRankFit

F64 = npt.NDArray[np.float64]

DISTRUST: Final = 0.05
_ASSUMED_COUNT: Final = 5  # of activations with the layer's mean size, on top of those that were seen
_ALWAYS: Final = np.float32(2 * LOGIT_LIMIT)


@dataclass(frozen=True, slots=True, eq=False)
class WeighedFit:
    """A fit that knows what neurons are worth; `bias` of `fit` holds their sizes, `floor` is float32 [n_neurons]."""

    fit: LowRankFit
    floor: F32

    def logits(self, z: F32) -> F32:
        """float32 [n_tokens, n_neurons]; above a cut exactly where ``at_cut(cut)`` is."""
        return cast(F32, np.maximum(self.fit.logits(z), self.floor))

    def at_cut(self, cut: float) -> LowRankFit:
        """The predictor to store with this cut: neurons whose floor lies above it are predicted for every token."""
        always = self.floor > np.float32(cut)
        up = np.where(always[:, None], np.float32(0), self.fit.up)
        return LowRankFit(self.fit.down, up, np.where(always, _ALWAYS, self.fit.bias))


@dataclass(frozen=True, slots=True, eq=False)
class NeuronWeights:
    """What is added to the logits of a layer's neurons, and what they do not fall below; float32 [n_neurons] each."""

    added: F32
    floor: F32

    @classmethod
    def of(cls, n_active: npt.NDArray[np.int64], sizes: F64, n_tokens: int) -> Self:
        """From a text.

        Parameters
        ----------
        n_active : tokens for which each neuron was active.
        sizes : summed over these tokens, the size of what the neuron added, ``|h[i]| * norm(down[i])``.
        n_tokens : of the text.
        """
        mean = sizes.sum() / max(int(n_active.sum()), 1)
        if mean <= 0:
            return cls.alike(len(n_active))
        relative = (sizes / mean + _ASSUMED_COUNT) / (n_active + _ASSUMED_COUNT)
        added = np.log(np.maximum(relative, np.finfo(np.float32).tiny))
        share = n_active / n_tokens
        mean_share = np.clip(share.mean(), 1e-6, 1 - 1e-6)
        balance = np.log((1 - mean_share) / mean_share)  # fits are made as if half of the entries were active
        expected = np.log(np.maximum(DISTRUST * share, np.finfo(np.float32).tiny))
        return cls(added.astype(np.float32), (expected + added + balance).astype(np.float32))

    @classmethod
    def alike(cls, n_neurons: int) -> Self:
        """All neurons count the same, and predictions are trusted."""
        return cls(np.zeros(n_neurons, np.float32), np.full(n_neurons, -np.inf, np.float32))

    def apply(self, fit: LowRankFit) -> WeighedFit:
        """A fit with these weights."""
        return WeighedFit(LowRankFit(fit.down, fit.up, fit.bias + self.added), self.floor)
