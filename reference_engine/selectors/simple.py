"""Selectors that look at nothing: all neurons, and a recorded trace."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from reference_engine.selectors.protocol import F32, Ids


class Everything:
    """Every neuron, every time: exact mode."""

    def __init__(self, n_neurons: int) -> None:
        self._ids: Ids = np.arange(n_neurons, dtype=np.int32)

    def select(self, x: F32) -> Ids:
        """All neurons of the layer."""
        return self._ids


class Trace:
    """Replays recorded active sets, one a call, whatever the activation."""

    def __init__(self, active_sets: Iterable[Ids]) -> None:
        self._active_sets = iter(active_sets)

    def select(self, x: F32) -> Ids:
        """Next recorded set.

        Raises
        ------
        LookupError
            If the recording is over.
        """
        try:
            return next(self._active_sets)
        except StopIteration:
            raise LookupError("the recorded trace has no more tokens") from None
