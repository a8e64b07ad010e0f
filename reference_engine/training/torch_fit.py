"""Fitting with torch: the same start and the same steps as `numpy_fit`, on a GPU where there is one.

Matrix products run in bfloat16 on a GPU, with float32 parameters, and in float32 on a CPU. The device gets the text in
minibatches and never holds more of it.

The only file that imports torch (the extra ``train``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reference_engine.predictor_training import (
    F32,
    LowRankFit,
    Mask,
    TrainingData,
    TrainingOptions,
    learning_rate,
    minibatches,
    n_steps_of,
)
from reference_engine.training.numpy_fit import BETAS, EPSILON, STOPPING_TOKENS, sample
from reference_engine.training.regression_start import RegressionStart, moments


def has_gpu() -> bool:
    """Whether torch finds a GPU."""
    return torch.cuda.is_available()


class TorchFit:
    """Fits predictors of any rank up to `largest_rank` to one layer; `Fits`.

    Parameters
    ----------
    device : None takes a GPU where there is one.
    dtype : of matrix products; None takes bfloat16 on a GPU and float32 elsewhere.

    Raises
    ------
    ValueError
        If there is no token to learn from.
    """

    def __init__(
        self,
        train: TrainingData,
        validation: TrainingData,
        largest_rank: int,
        options: TrainingOptions,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._device = torch.device(device or ("cuda" if has_gpu() else "cpu"))
        self._dtype = dtype or (torch.bfloat16 if self._device.type == "cuda" else torch.float32)
        self._train = train
        self._options = options
        self._of = moments(train)
        self._start = RegressionStart(train, self._of, largest_rank, seed=options.seed)
        self._mean, self._scale = (self._on_device(v.astype(np.float32)) for v in (self._of.mean, self._of.scale))
        self._checked = sample(validation, STOPPING_TOKENS)

    @torch.no_grad()
    def fit(self, rank: int) -> LowRankFit:
        """For z as it is; of the epoch with the least loss on validation text, as `NumpyFit.fit`."""
        options = self._options
        parameters = [self._on_device(p) for p in self._start.parameters(rank)]
        best, least = [p.clone() for p in parameters], self._loss(parameters)
        optimiser = torch.optim.Adam(parameters, lr=options.learning_rate, betas=BETAS, eps=EPSILON)
        n_steps, step = n_steps_of(self._of.n_tokens, options), 0
        rng = np.random.default_rng(options.seed)
        for _ in range(options.epochs):
            for z, active in minibatches(self._train, options.batch_tokens, rng):
                for parameter, gradient in zip(parameters, self._gradients(parameters, z, active), strict=True):
                    parameter.grad = gradient
                optimiser.param_groups[0]["lr"] = learning_rate(step / n_steps, options)
                optimiser.step()
                step += 1
            loss = self._loss(parameters)
            if loss >= least:
                break
            best, least = [p.clone() for p in parameters], loss
        down, up, bias = best
        folded = down / self._scale
        bias = bias - up @ (folded @ self._mean)
        return LowRankFit(*(p.cpu().numpy() for p in (folded, up, bias)))

    def _gradients(self, parameters: Sequence[Tensor], z: F32, active: Mask) -> list[Tensor]:
        """Of the balanced loss, by down, up and bias."""
        down, up, bias = parameters
        standard, y = self._batch(z, active)
        narrow_up, narrow_down = up.to(self._dtype), down.to(self._dtype)
        narrow = standard @ narrow_down.T  # (n, rank)
        logits = (narrow @ narrow_up.T).float() + bias
        slope = torch.sigmoid(logits) - y
        slope *= self._weights(y) / slope.numel()
        low = slope.to(self._dtype)
        return [((low @ narrow_up).T @ standard).float(), (low.T @ narrow).float(), slope.sum(dim=0)]

    def _loss(self, parameters: Sequence[Tensor]) -> float:
        """Balanced loss on some validation text."""
        down, up, bias = parameters
        total, (z, active) = 0.0, self._checked
        for first in range(0, len(z), self._options.batch_tokens):
            rows = slice(first, first + self._options.batch_tokens)
            standard, y = self._batch(z[rows], active[rows])
            logits = ((standard @ down.to(self._dtype).T) @ up.to(self._dtype).T).float() + bias
            loss = torch.nn.functional.softplus(torch.where(y > 0, -logits, logits))
            total += float((loss * self._weights(y)).sum(dtype=torch.float64))
        return total / active.size

    def _batch(self, z: F32, active: Mask) -> tuple[Tensor, Tensor]:
        """(standardised z in the type of products, activity as 0 and 1 in float32), on the device."""
        standard = (self._on_device(z) - self._mean) / self._scale
        return standard.to(self._dtype), torch.from_numpy(active).to(self._device).float()

    def _weights(self, y: Tensor) -> Tensor:
        active, inactive = self._of.weights()
        return y * (active - inactive) + inactive

    def _on_device(self, array: F32) -> Tensor:
        return torch.from_numpy(array).to(self._device)
