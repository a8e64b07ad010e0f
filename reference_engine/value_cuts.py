"""Where to cut values that are never exactly zero: thresholds for a share of active neurons, from a sample of values.

Knows: samples of exact values. Does not know: predictors, files.
"""

from __future__ import annotations

import math
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from flashfmt.manifest import Activation, ActivationKind
from reference_engine.models.weights import TapPoint
from reference_engine.observation import NONZERO, Cut

F32 = npt.NDArray[np.float32]

SPARSE_ACTIVATIONS: Final[frozenset[ActivationKind]] = frozenset({"relu", "relu2", "fatrelu"})
"""Activations that give exact zeros."""

_DRAWN_PER_CHUNK: Final = 8192


class ValueSample:
    """An observer that keeps random values of each layer: pairs of the activation's argument and of h.

    Parameters
    ----------
    d_ff : neurons of a layer.
    activation : of the FFN.
    """

    def __init__(self, n_layers: int, d_ff: int, activation: Activation, seed: int = 0) -> None:
        self._activation = activation
        self._share = min(1.0, _DRAWN_PER_CHUNK / d_ff)
        self._rng = np.random.default_rng(seed)
        self._drawn: list[list[tuple[F32, F32]]] = [[] for _ in range(n_layers)]

    def tap(self, layer: int, point: TapPoint, x: F32) -> None:
        """Nothing."""

    def begin(self, layer: int) -> None:
        """Nothing."""

    def neurons(self, layer: int, neurons: slice, tested: F32, h: F32) -> None:
        """Draw some of the entries."""
        places = self._rng.integers(0, tested.size, math.ceil(self._share * tested.shape[1]))
        self._drawn[layer].append((tested.ravel()[places], h.ravel()[places]))

    def end(self, layer: int) -> None:
        """Nothing."""

    def cut(self, layer: int, value: Literal["h", "activated"], share: float) -> Cut:
        """Cut by size that about this share of a layer's neurons passes; `share` 1 passes all that are not zero."""
        if share >= 1:
            return NONZERO if value == "h" else Cut(value, 0.0, magnitude=True)
        values = Cut(value, 0.0, magnitude=True).values(*self._values(layer), self._activation)
        return Cut(value, float(np.quantile(values, 1 - share)), magnitude=True)

    def nonzero_share(self, layer: int) -> float:
        """Share of a layer's values h that are not zero."""
        return float(np.count_nonzero(self._values(layer)[1]) / len(self._values(layer)[1]))

    def tested_cut(self, layer: int, share: float) -> Cut:
        """Cut of the activation's argument, of its value or of its size: whichever keeps more of the sum of h²."""
        tested, h = self._values(layer)
        if share >= 1:
            return Cut("tested", float(-2 * np.abs(tested).max() - 1), magnitude=False)
        best: tuple[float, Cut] | None = None
        for magnitude in (False, True):
            threshold = float(np.quantile(np.abs(tested) if magnitude else tested, 1 - share))
            cut = Cut("tested", threshold, magnitude=magnitude)
            kept = float(np.square(h, dtype=np.float64)[cut.passes(tested, h, self._activation)].sum())
            if best is None or kept > best[0]:
                best = kept, cut
        if best is None:
            raise ValueError("nothing was sampled")
        return best[1]

    def _values(self, layer: int) -> tuple[F32, F32]:
        drawn = self._drawn[layer]
        if not drawn:
            raise ValueError("nothing was sampled")
        return np.concatenate([pair[0] for pair in drawn]), np.concatenate([pair[1] for pair in drawn])


def natural_cut(activation: Activation) -> Cut | None:
    """Test of the activation's argument that says whether its value is zero; None where it hardly ever is."""
    if activation.kind not in SPARSE_ACTIVATIONS:
        return None
    return Cut("tested", activation.threshold if activation.kind == "fatrelu" else 0.0, magnitude=False)
