"""Fitting low-rank predictors: what they are, how their loss counts, which rank and which cut to take.

The model is the one that a file stores (SPEC.md section "Predictors"): ``logit = up (down z) + bias``. It is fitted to
the binary cross-entropy of "neuron i is active", with active and inactive entries of a layer weighted to count the
same in all. The weights are those of the layer and not of each neuron, because the file has one threshold a layer: for
any share of predicted neurons the most active ones are found by cutting one probability scale that all neurons share.

Knows: activations and active sets in pieces. Does not know: where they come from, how parameters are found
(`reference_engine.training`), files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, cast

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

LOGIT_LIMIT: Final = 20.0
_N_BINS: Final = 4000
_MIXED_PIECES: Final = 16


class TrainingData(Protocol):
    """Activations and active sets of one layer, in pieces."""

    @property
    def n_pieces(self) -> int:
        """How many pieces there are."""
        ...

    def piece(self, index: int) -> tuple[F32, Mask]:
        """(z float32 [n, d_model], active bool [n, n_neurons]) of one piece; a copy."""
        ...


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How to fit: most passes over the data, tokens of a minibatch, the first step size of Adam (it falls to zero)."""

    epochs: int = 4
    batch_tokens: int = 256
    learning_rate: float = 1e-2
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class LowRankFit:
    """``logit = up (down z) + bias``: down float32 [rank, d_model], up [n_neurons, rank], bias [n_neurons]."""

    down: F32
    up: F32
    bias: F32

    @property
    def rank(self) -> int:
        """Width between the two matrices."""
        return len(self.down)

    def logits(self, z: F32) -> F32:
        """float32 [n_tokens, n_neurons]."""
        return cast(F32, (z @ self.down.T) @ self.up.T + self.bias)

    def rounded(self) -> LowRankFit:
        """The same with both matrices as float16 stores them."""
        down, up = (matrix.astype(np.float16).astype(np.float32) for matrix in (self.down, self.up))
        return LowRankFit(down, up, self.bias)


def balanced_loss(logits: F32, active: Mask, weights: tuple[float, float]) -> float:
    """Balanced binary cross-entropy, averaged over all entries.

    Parameters
    ----------
    logits, active : [n_tokens, n_neurons].
    weights : of an active and of an inactive entry.
    """
    weight = np.where(active, weights[0], weights[1])
    signed = np.where(active, -logits, logits).astype(np.float64)
    return float((weight * np.logaddexp(0, signed)).mean())


def learning_rate(progress: float, options: TrainingOptions) -> float:
    """Step size after a share of all steps: half a cosine down to zero."""
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def n_steps_of(n_tokens: int, options: TrainingOptions) -> int:
    """Steps of all epochs."""
    return max(1, options.epochs * -(-n_tokens // options.batch_tokens))


def minibatches(data: TrainingData, batch_tokens: int, rng: np.random.Generator) -> Iterator[tuple[F32, Mask]]:
    """All tokens once, in random order: pieces are mixed a few at a time."""
    order = rng.permutation(data.n_pieces)
    for first in range(0, len(order), _MIXED_PIECES):
        pieces = [data.piece(int(index)) for index in order[first : first + _MIXED_PIECES]]
        z = np.concatenate([piece[0] for piece in pieces])
        active = np.concatenate([piece[1] for piece in pieces])
        tokens = rng.permutation(len(z))
        for start in range(0, len(tokens), batch_tokens):
            batch = tokens[start : start + batch_tokens]
            yield z[batch], active[batch]


class CutCurve:
    """How recall and the predicted share depend on where the logits are cut; filled piece by piece."""

    def __init__(self) -> None:
        self._edges = np.linspace(-LOGIT_LIMIT, LOGIT_LIMIT, _N_BINS + 1)
        self._active = np.zeros(_N_BINS, np.int64)
        self._all = np.zeros(_N_BINS, np.int64)

    def add(self, logits: F32, active: Mask) -> None:
        """Count entries of [n_tokens, n_neurons]."""
        step = 2 * LOGIT_LIMIT / _N_BINS
        bins = np.clip(((logits + np.float32(LOGIT_LIMIT)) / np.float32(step)).astype(np.int64), 0, _N_BINS - 1)
        self._all += np.bincount(bins.ravel(), minlength=_N_BINS)
        self._active += np.bincount(bins[active], minlength=_N_BINS)

    def cut_for_recall(self, recall: float) -> float:
        """The highest cut at which at least this share of the active entries lies above it.

        1 and more gives the lowest cut there is; where nothing is active, the highest.
        """
        above = self._active[::-1].cumsum()[::-1]  # active entries in this bin or a higher one
        enough = np.flatnonzero(above >= recall * above[0])
        return float(self._edges[enough[-1]])

    def at(self, cut: float) -> tuple[float, float]:
        """(recall, predicted share) at a cut."""
        first = int(np.clip(np.searchsorted(self._edges, cut), 0, _N_BINS))
        n_active, n_all = int(self._active.sum()), int(self._all.sum())
        recall = self._active[first:].sum() / n_active if n_active else 1.0
        return float(recall), float(self._all[first:].sum() / max(n_all, 1))


class GivesLogits(Protocol):
    """Something that tells active neurons from others by logits."""

    def logits(self, z: F32) -> F32:
        """float32 [n_tokens, n_neurons]."""
        ...


def cut_curve(fit: GivesLogits, data: TrainingData) -> CutCurve:
    """Curve of a fit over all pieces."""
    curve = CutCurve()
    for index in range(data.n_pieces):
        z, active = data.piece(index)
        curve.add(fit.logits(z), active)
    return curve


class Fits(Protocol):
    """Predictors of one layer, prepared for some ranks."""

    def fit(self, rank: int) -> LowRankFit:
        """The predictor of a rank."""
        ...


class Fitter(Protocol):
    """A way to fit: prepares what the fits of all ranks up to `largest_rank` share."""

    def __call__(
        self, train: TrainingData, validation: TrainingData, largest_rank: int, options: TrainingOptions
    ) -> Fits:
        """`validation` only tells when to stop. Raises ValueError if there is no token to learn from."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class RankChoice:
    """A fit with its curve on validation text, weighed if it was asked for.

    `cost_bytes` is what a token reads with it at the recall asked for.
    """

    fit: LowRankFit
    curve: CutCurve
    cost_bytes: float


def choose_rank(
    train: TrainingData,
    validation: TrainingData,
    ranks: Sequence[int],
    *,
    recall: float,
    bundle_stride: int,
    options: TrainingOptions,
    fitter: Fitter,
    weigh: Callable[[LowRankFit], GivesLogits] | None = None,
) -> RankChoice:
    """Fit ranks in ascending order for as long as a higher one pays, and return the best.

    It pays if predictor and predicted bundles together have fewer bytes: both are read for each token.

    Parameters
    ----------
    recall : at which the predicted share counts.
    bundle_stride : bytes of one bundle.
    fitter : how to fit.
    weigh : gives the logits that are cut in place of a fit's own.

    Raises
    ------
    ValueError
        If there is no rank, or no token to learn from.
    """
    if not ranks:
        raise ValueError("there is no rank to try")
    fits = fitter(train, validation, max(ranks), options)
    best: RankChoice | None = None
    for rank in sorted(ranks):
        fit = fits.fit(rank).rounded()
        curve = cut_curve(weigh(fit) if weigh is not None else fit, validation)
        n_neurons, d_model = len(fit.up), fit.down.shape[1]
        _, predicted = curve.at(curve.cut_for_recall(recall))
        cost = 2.0 * rank * (n_neurons + d_model) + predicted * n_neurons * bundle_stride
        if best is not None and cost >= best.cost_bytes:
            break
        best = RankChoice(fit, curve, cost)
    if best is None:
        raise ValueError("no rank has a finite cost")
    return best
