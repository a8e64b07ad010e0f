"""Where a fit begins: reduced-rank regression of activity on z, every neuron scaled to unit variance.

In whitened coordinates the best approximation of rank r of all regressions together is their truncated SVD (Izenman
1975). Dividing a neuron's coefficients by the variance p (1 - p) of its activity gives those of the linear
discriminant, whose scale is that of logits. The matrix of all coefficients is never formed: its leading directions are
found by multiplying it with a few random vectors (Halko, Martinsson and Tropp 2011), in passes over the text, so that
memory is that of ``d_model ** 2`` numbers and of the predictor's own size.

Knows: activations and active sets in pieces. Does not know: the loss, files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, cast

import numpy as np
import numpy.typing as npt

from reference_engine.predictor_training import F32, F64, Mask, TrainingData

_BIAS_LIMIT: Final = 12.0
_RIDGE: Final = 1e-3  # of the mean variance: directions that hardly occur must not be blown up
_OVERSAMPLING: Final = 16
_SLAB_TOKENS: Final = 1024  # multiplied at once: BLAS wants more than one piece


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Means and covariances over a text, float64.

    `mean` and `scale` (standard deviation) of z are [d_model]; `correlation` [d_model, d_model] is of z standardised;
    `active_share` is [n_neurons].
    """

    mean: F64
    scale: F64
    correlation: F64
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
    n_tokens = 0
    sums, squares, counts = np.zeros(1), np.zeros((1, 1)), np.zeros(1)
    for z, active in slabs(data):
        n_tokens += len(z)
        sums = sums + z.sum(axis=0, dtype=np.float64)
        squares = squares + z.T @ z
        counts = counts + active.sum(axis=0, dtype=np.float64)
    if n_tokens == 0:
        raise ValueError("there are no tokens to learn from")
    mean = sums / n_tokens
    covariance = squares / n_tokens - np.outer(mean, mean)
    scale = np.sqrt(np.maximum(np.diag(covariance), 0))
    scale[scale < 1e-6 * max(scale.max(), 1e-30)] = 1.0
    covariance /= np.outer(scale, scale)
    return Moments(mean, scale, covariance, counts / n_tokens, n_tokens)


class RegressionStart:
    """Parameters to begin with, prepared once for all ranks up to `largest_rank`.

    Parameters
    ----------
    of : ``moments(data)``.
    n_iterations : of the search for directions; each costs two more passes over the text.
    """

    def __init__(
        self, data: TrainingData, of: Moments, largest_rank: int, *, n_iterations: int = 1, seed: int = 0
    ) -> None:
        d, n = len(of.mean), len(of.active_share)
        share = np.clip(of.active_share, 1 / (of.n_tokens + 2), 1 - 1 / (of.n_tokens + 2))
        self._share = share
        self._spread = np.sqrt(share * (1 - share))
        self._log_balance = float(np.log(of.weights()[0] / of.weights()[1]))
        self._data, self._of = data, of
        ridge = _RIDGE * max(np.trace(of.correlation) / d, 1e-12)
        covariance = of.correlation.copy()
        covariance[np.diag_indices(d)] += ridge
        self._whiten = np.linalg.inv(np.linalg.cholesky(covariance)).astype(np.float32)  # (d, d)
        del covariance
        k = min(largest_rank + _OVERSAMPLING, d)
        drawn = np.random.default_rng(seed).standard_normal((n, k), np.float32)
        basis = _orthonormal(self._times(drawn))  # (d, k)
        for _ in range(n_iterations):
            basis = _orthonormal(self._times(_orthonormal(self._transposed_times(basis))))
        explained = self._transposed_times(basis)  # (n, k)
        _, rotation = np.linalg.eigh((explained.T @ explained).astype(np.float64))
        rotation = rotation[:, ::-1].astype(np.float32)  # strongest direction first
        self._down = (basis @ rotation).T @ self._whiten  # (k, d)
        self._up = (explained @ rotation) / self._spread[:, None].astype(np.float32)  # (n, k)

    def parameters(self, rank: int) -> tuple[F32, F32, F32]:
        """(down [rank, d_model], up [n_neurons, rank], bias [n_neurons]) for standardised z; copies."""
        down, up, share = self._down[:rank], self._up[:, :rank], self._share
        reach = np.square(up, dtype=np.float64).sum(axis=1)
        bias = np.log(share / (1 - share)) + self._log_balance - 0.5 * (1 - 2 * share) * reach
        bias = np.clip(bias, -_BIAS_LIMIT, _BIAS_LIMIT)
        return np.array(down, np.float32), np.array(up, np.float32), bias.astype(np.float32)

    def _times(self, right: F32) -> F32:
        """Whitened coefficients [d_model, n_neurons] times [n_neurons, k]."""
        scaled = right / self._spread[:, None].astype(np.float32)
        shift = self._of.active_share.astype(np.float32) @ scaled
        product = np.zeros((len(self._of.mean), right.shape[1]), np.float32)
        for z, active in self._standard():
            product += cast(F32, z.T @ (active.astype(np.float32) @ scaled - shift))
        return cast(F32, self._whiten @ (product / np.float32(self._of.n_tokens)))

    def _transposed_times(self, left: F32) -> F32:
        """The same matrix transposed, times [d_model, k]."""
        narrow = cast(F32, self._whiten.T @ left)
        product = np.zeros((len(self._share), left.shape[1]), np.float32)
        sums = np.zeros(left.shape[1], np.float32)
        for z, active in self._standard():
            projected = z @ narrow
            sums += projected.sum(axis=0)
            product += active.astype(np.float32).T @ projected
        product -= np.outer(self._of.active_share.astype(np.float32), sums)
        product /= self._spread[:, None].astype(np.float32) * np.float32(self._of.n_tokens)
        return product

    def _standard(self) -> Iterator[tuple[F32, Mask]]:
        """(standardised z, active) of some tokens at a time."""
        mean, scale = self._of.mean.astype(np.float32), self._of.scale.astype(np.float32)
        for z, active in slabs(self._data):
            np.subtract(z, mean, out=z)
            np.divide(z, scale, out=z)
            yield z, active


def slabs(data: TrainingData) -> Iterator[tuple[F32, Mask]]:
    """All pieces in order, put together to at least `_SLAB_TOKENS` tokens where there are that many; copies."""
    waiting: list[tuple[F32, Mask]] = []
    for index in range(data.n_pieces):
        waiting.append(data.piece(index))
        if index == data.n_pieces - 1 or sum(len(z) for z, _ in waiting) >= _SLAB_TOKENS:
            yield np.concatenate([z for z, _ in waiting]), np.concatenate([active for _, active in waiting])
            waiting.clear()


def _orthonormal(columns: npt.NDArray[np.float32]) -> F32:
    q: F32 = np.linalg.qr(columns)[0]
    return q
