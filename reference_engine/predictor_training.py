"""Fitting low-rank predictors in numpy: reduced-rank regression to begin with, then Adam on the balanced loss.

The model is the one that a file stores (SPEC.md section "Predictors"): ``logit = up (down z) + bias``. It is fitted to
the binary cross-entropy of "neuron i is active", with active and inactive entries of a layer weighted to count the
same in all. The weights are those of the layer and not of each neuron, because the file has one threshold a layer: for
any share of predicted neurons the most active ones are found by cutting one probability scale that all neurons share.

Knows: activations and active sets in minibatches. Does not know: where they come from, files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, cast

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

LOGIT_LIMIT: Final = 20.0
_N_BINS: Final = 4000
_BIAS_LIMIT: Final = 12.0
_SATURATED: Final = np.float32(60)
_RIDGE: Final = 1e-3  # of the mean variance: directions that hardly occur must not be blown up
_BETAS: Final = (0.9, 0.99)
_EPSILON: Final = 1e-8


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
    """How to fit: passes over the data, tokens of a minibatch, the first step size of Adam (it falls to zero)."""

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


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Means and covariances over a text, float64.

    `mean` and `scale` (standard deviation) of z are [d_model]; `correlation` [d_model, d_model] is of z standardised;
    `cross` [d_model, n_neurons] its covariance with activity; `active_share` [n_neurons].
    """

    mean: F64
    scale: F64
    correlation: F64
    cross: F64
    active_share: F64
    n_tokens: int

    def weights(self) -> tuple[float, float]:
        """Loss weights of an active and of an inactive entry; each kind counts one half in all."""
        share = float(np.clip(self.active_share.mean(), 1e-6, 1 - 1e-6))
        return 0.5 / share, 0.5 / (1 - share)


def moments(data: TrainingData) -> Moments:
    """One pass over all pieces.

    Raises
    ------
    ValueError
        If there is no token.
    """
    n_tokens, sums, squares, cross, counts = 0, None, None, None, None
    for index in range(data.n_pieces):
        z, active = data.piece(index)
        y = active.astype(np.float32)
        n_tokens += len(z)
        parts = (z.sum(axis=0, dtype=np.float64), z.T @ z, z.T @ y, y.sum(axis=0, dtype=np.float64))
        if sums is None or squares is None or cross is None or counts is None:
            sums, squares, cross, counts = (part.astype(np.float64) for part in parts)
        else:
            sums += parts[0]
            squares += parts[1]
            cross += parts[2]
            counts += parts[3]
    if sums is None or squares is None or cross is None or counts is None or n_tokens == 0:
        raise ValueError("there are no tokens to learn from")
    mean, active_share = sums / n_tokens, counts / n_tokens
    covariance = squares / n_tokens - np.outer(mean, mean)
    scale = np.sqrt(np.maximum(np.diag(covariance), 0))
    scale[scale < 1e-6 * max(scale.max(), 1e-30)] = 1.0
    return Moments(
        mean=mean,
        scale=scale,
        correlation=covariance / np.outer(scale, scale),
        cross=(cross / n_tokens - np.outer(mean, active_share)) / scale[:, None],
        active_share=active_share,
        n_tokens=n_tokens,
    )


class RegressionStart:
    """Reduced-rank regression of activity on z, every neuron scaled to unit variance; prepared once for all ranks.

    In whitened coordinates the best approximation of rank r of all regressions together is their truncated SVD
    (Izenman 1975). Dividing a neuron's coefficients by the variance p (1 - p) of its activity gives those of the
    linear discriminant, whose scale is that of logits.
    """

    def __init__(self, of: Moments) -> None:
        d = len(of.mean)
        values, vectors = np.linalg.eigh(of.correlation)
        ridge = _RIDGE * max(np.trace(of.correlation) / d, 1e-12)
        self._whiten = (vectors / np.sqrt(np.maximum(values, 0) + ridge)) @ vectors.T  # (d, d), symmetric
        share = np.clip(of.active_share, 1 / (of.n_tokens + 2), 1 - 1 / (of.n_tokens + 2))
        self._spread = np.sqrt(share * (1 - share))
        self._scaled = self._whiten @ (of.cross / self._spread)  # (d, n_neurons)
        _, basis = np.linalg.eigh(self._scaled @ self._scaled.T)
        self._basis = basis[:, ::-1]  # strongest direction first
        self._share = share
        self._log_balance = float(np.log(of.weights()[0] / of.weights()[1]))

    def parameters(self, rank: int) -> tuple[F32, F32, F32]:
        """(down, up, bias) for standardised z."""
        basis = self._basis[:, :rank]
        down = (self._whiten @ basis).T
        explained = basis.T @ self._scaled  # (rank, n_neurons)
        up = (explained / self._spread).T
        reach = np.square(up).sum(axis=1)
        bias = np.log(self._share / (1 - self._share)) + self._log_balance - 0.5 * (1 - 2 * self._share) * reach
        bias = np.clip(bias, -_BIAS_LIMIT, _BIAS_LIMIT)
        return _f32(down), _f32(up), _f32(bias)


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


def balanced_slope(logits: F32, active: Mask, weights: tuple[float, float]) -> F32:
    """Derivative of `balanced_loss` by the logits, which it overwrites: float32 [n_tokens, n_neurons]."""
    slope = np.clip(logits, -_SATURATED, _SATURATED, out=logits)  # exp must not overflow
    np.negative(slope, out=slope)
    np.exp(slope, out=slope)
    slope += np.float32(1)
    np.reciprocal(slope, out=slope)
    slope -= active
    by_activity = np.array([weights[1], weights[0]], np.float32) / np.float32(slope.size)
    slope *= by_activity[active.view(np.uint8)]
    return slope


def fit_low_rank(
    data: TrainingData, rank: int, of: Moments, start: RegressionStart, options: TrainingOptions
) -> LowRankFit:
    """Fit a predictor of one rank.

    Parameters
    ----------
    of, start : from `moments(data)`.

    Returns
    -------
    For z as it is: standardisation is folded into the matrices.
    """
    rng = np.random.default_rng(options.seed)
    mean, scale = of.mean.astype(np.float32), of.scale.astype(np.float32)
    parameters = list(start.parameters(rank))
    optimiser = _Adam(parameters)
    weights = of.weights()
    n_steps = max(1, options.epochs * -(-of.n_tokens // options.batch_tokens))
    for step, (z, active) in enumerate(_minibatches(data, options, rng)):
        down, up, bias = parameters
        standard = (z - mean) / scale
        narrow = standard @ down.T  # (n, rank)
        slope = balanced_slope(narrow @ up.T + bias, active, weights)
        gradients = [(slope @ up).T @ standard, slope.T @ narrow, slope.sum(axis=0)]
        progress = min(step / n_steps, 1.0)
        optimiser.step(gradients, options.learning_rate * 0.5 * (1 + np.cos(np.pi * progress)))
    down, up, bias = parameters
    folded = cast(F32, down / scale)
    return LowRankFit(folded, up, bias - up @ (folded @ mean))


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


def cut_curve(fit: LowRankFit, data: TrainingData) -> CutCurve:
    """Curve of a fit over all pieces."""
    curve = CutCurve()
    for index in range(data.n_pieces):
        z, active = data.piece(index)
        curve.add(fit.logits(z), active)
    return curve


@dataclass(frozen=True, slots=True, eq=False)
class RankChoice:
    """A fit with its curve on validation text; `cost_bytes` is what a token reads with it at the recall asked for."""

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
) -> RankChoice:
    """Fit ranks in ascending order for as long as a higher one pays, and return the best.

    It pays if predictor and predicted bundles together have fewer bytes: both are read for each token.

    Parameters
    ----------
    recall : at which the predicted share counts.
    bundle_stride : bytes of one bundle.

    Raises
    ------
    ValueError
        If there is no rank, or no token to learn from.
    """
    of = moments(train)
    start = RegressionStart(of)
    best: RankChoice | None = None
    for rank in sorted(ranks):
        fit = fit_low_rank(train, rank, of, start, options).rounded()
        curve = cut_curve(fit, validation)
        n_neurons, d_model = len(fit.up), fit.down.shape[1]
        _, predicted = curve.at(curve.cut_for_recall(recall))
        cost = 2.0 * rank * (n_neurons + d_model) + predicted * n_neurons * bundle_stride
        if best is not None and cost >= best.cost_bytes:
            break
        best = RankChoice(fit, curve, cost)
    if best is None:
        raise ValueError("there is no rank to try")
    return best


def _f32(array: F64) -> F32:
    return np.ascontiguousarray(array, np.float32)


class _Adam:
    """Adam (Kingma and Ba 2015) on arrays in place."""

    def __init__(self, parameters: list[F32]) -> None:
        self._parameters = parameters
        self._means = [np.zeros_like(p) for p in parameters]
        self._squares = [np.zeros_like(p) for p in parameters]
        self._n_steps = 0

    def step(self, gradients: Sequence[F32], learning_rate: float) -> None:
        """One step downhill."""
        self._n_steps += 1
        first, second = _BETAS
        rate = np.float32(learning_rate * np.sqrt(1 - second**self._n_steps) / (1 - first**self._n_steps))
        for i, gradient in enumerate(gradients):
            self._means[i] += np.float32(1 - first) * (gradient - self._means[i])
            self._squares[i] += np.float32(1 - second) * (gradient * gradient - self._squares[i])
            self._parameters[i] -= rate * self._means[i] / (np.sqrt(self._squares[i]) + np.float32(_EPSILON))


def _minibatches(data: TrainingData, options: TrainingOptions, rng: np.random.Generator) -> Iterator[tuple[F32, Mask]]:
    """Tokens in random order, all of them once an epoch: pieces are mixed a few at a time."""
    n_mixed = 16
    for _ in range(options.epochs):
        order = rng.permutation(data.n_pieces)
        for first in range(0, len(order), n_mixed):
            pieces = [data.piece(int(index)) for index in order[first : first + n_mixed]]
            z = np.concatenate([piece[0] for piece in pieces])
            active = np.concatenate([piece[1] for piece in pieces])
            tokens = rng.permutation(len(z))
            for start in range(0, len(tokens), options.batch_tokens):
                batch = tokens[start : start + options.batch_tokens]
                yield z[batch], active[batch]
