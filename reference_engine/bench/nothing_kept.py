"""The neuron window that keeps nothing: what a token needs is read for it, though the token before needed it, too."""

from __future__ import annotations

import numpy as np

from reference_engine.neuron_window import Ids, NeuronWindow, WindowStep


class NothingKept:
    """`NeuronWindow` without memory: nothing is a hit, all that was held leaves.

    A neuron that leaves and comes in one step is read anew, into whichever slot is free.
    """

    def __init__(self) -> None:
        self._held: Ids = np.empty(0, np.int32)

    def step(self, active: Ids) -> WindowStep:
        """All of `active` is missing."""
        evicted, self._held = self._held, active
        return WindowStep(active[:0], active, evicted)

    def forget(self, ids: Ids) -> None:
        """No longer count `ids` as held."""
        self._held = np.setdiff1d(self._held, ids, assume_unique=True)

    def held(self) -> Ids:
        """Neurons of the last step, sorted."""
        return self._held


class KeepNothing:
    """Builds `NothingKept`, in the place of a `WindowChoice`."""

    def build(self, n_neurons: int, capacity: int) -> NeuronWindow:
        """The window of a layer, whatever its sizes."""
        return NothingKept()
