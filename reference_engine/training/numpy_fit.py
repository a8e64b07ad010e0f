"""Fitting in numpy: a start by reduced-rank regression, then Adam on the balanced loss.

Knows: a layer's training data. Does not know: where it comes from, files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, cast

import numpy as np

from reference_engine.predictor_training import (
    F32,
    LowRankFit,
    Mask,
    TrainingData,
    TrainingOptions,
    balanced_loss,
    learning_rate,
    minibatches,
    n_steps_of,
)
from reference_engine.training.regression_start import RegressionStart, moments

BETAS: Final = (0.9, 0.99)
EPSILON: Final = 1e-8
STOPPING_TOKENS: Final = 2048  # of validation text, that tell whether an epoch was worth it
_SATURATED: Final = np.float32(60)


class NumpyFit:
    """Fits predictors of any rank up to `largest_rank` to one layer; `Fits`.

    Raises
    ------
    ValueError
        If there is no token to learn from.
    """

    def __init__(
        self, train: TrainingData, validation: TrainingData, largest_rank: int, options: TrainingOptions
    ) -> None:
        self._train = train
        self._options = options
        self._of = moments(train)
        self._start = RegressionStart(train, self._of, largest_rank, seed=options.seed)
        self._checked = sample(validation, STOPPING_TOKENS)

    def fit(self, rank: int) -> LowRankFit:
        """For z as it is: standardisation is folded into the matrices.

        The parameters are those after the epoch with the least loss on validation text, the start included.
        """
        of, options = self._of, self._options
        mean, scale = of.mean.astype(np.float32), of.scale.astype(np.float32)
        parameters = list(self._start.parameters(rank))
        best, least = [p.copy() for p in parameters], self._loss(parameters)
        optimiser, weights = _Adam(parameters), of.weights()
        n_steps, step = n_steps_of(of.n_tokens, options), 0
        rng = np.random.default_rng(options.seed)
        for _ in range(options.epochs):
            for z, active in minibatches(self._train, options.batch_tokens, rng):
                down, up, bias = parameters
                standard = (z - mean) / scale
                narrow = standard @ down.T  # (n, rank)
                logits = narrow @ up.T
                logits += bias
                slope = balanced_slope(logits, active, weights)
                gradients = [(slope @ up).T @ standard, slope.T @ narrow, slope.sum(axis=0)]
                optimiser.step(gradients, learning_rate(step / n_steps, options))
                step += 1
            loss = self._loss(parameters)
            if loss >= least:
                break
            best, least = [p.copy() for p in parameters], loss
        down, up, bias = best
        folded = cast(F32, down / scale)
        return LowRankFit(folded, up, bias - up @ (folded @ mean))

    def _loss(self, parameters: Sequence[F32]) -> float:
        """Balanced loss on some validation text."""
        down, up, bias = parameters
        mean, scale = self._of.mean.astype(np.float32), self._of.scale.astype(np.float32)
        total, (z, active) = 0.0, self._checked
        for first in range(0, len(z), self._options.batch_tokens):
            rows = slice(first, first + self._options.batch_tokens)
            logits = cast(F32, ((z[rows] - mean) / scale @ down.T) @ up.T + bias)
            total += balanced_loss(logits, active[rows], self._of.weights()) * len(logits)
        return total / len(z)


def sample(data: TrainingData, n_tokens: int) -> tuple[F32, Mask]:
    """About `n_tokens` tokens, in pieces spread over all of the data."""
    first = data.piece(0)
    n_pieces = min(data.n_pieces, max(1, n_tokens // max(len(first[0]), 1)))
    pieces = [data.piece(i * data.n_pieces // n_pieces) for i in range(n_pieces)]
    return np.concatenate([z for z, _ in pieces]), np.concatenate([active for _, active in pieces])


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


class _Adam:
    """Adam (Kingma and Ba 2015) on arrays in place."""

    def __init__(self, parameters: list[F32]) -> None:
        self._parameters = parameters
        self._means = [np.zeros_like(p) for p in parameters]
        self._squares = [np.zeros_like(p) for p in parameters]
        self._n_steps = 0

    def step(self, gradients: Sequence[F32], rate: float) -> None:
        """One step downhill; overwrites the gradients."""
        self._n_steps += 1
        first, second = BETAS
        corrected = np.float32(rate * np.sqrt(1 - second**self._n_steps) / (1 - first**self._n_steps))
        for parameter, mean, square, gradient in zip(
            self._parameters, self._means, self._squares, gradients, strict=True
        ):
            np.multiply(mean, np.float32(first), out=mean)
            np.add(mean, np.float32(1 - first) * gradient, out=mean)
            np.multiply(square, np.float32(second), out=square)
            np.multiply(gradient, gradient, out=gradient)
            np.multiply(gradient, np.float32(1 - second), out=gradient)
            np.add(square, gradient, out=square)
            np.sqrt(square, out=gradient)
            np.add(gradient, np.float32(EPSILON), out=gradient)
            np.divide(mean, gradient, out=gradient)
            np.multiply(gradient, corrected, out=gradient)
            np.subtract(parameter, gradient, out=parameter)
