"""Writing down what happens in a model: inputs of FFNs, active neurons and their sizes, into a scratch store.

Knows: observers. Does not know: what the records are for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from flashfmt.manifest import Activation
from reference_engine.calibration.scratch import Scratch
from reference_engine.models.weights import TapPoint
from reference_engine.observation import Cut, ObservedModel

F32 = npt.NDArray[np.float32]


class ActivityRecorder:
    """An observer that writes the tapped activation, the active sets and sums of |h| of every layer.

    Parameters
    ----------
    point : which activation is recorded.
    cuts : by layer: what counts as active.
    first_token : place in the store of the next token that comes; tokens come in the store's chunks.
    """

    def __init__(
        self, scratch: Scratch, point: TapPoint, cuts: Sequence[Cut], activation: Activation, first_token: int
    ) -> None:
        self._scratch = scratch
        self._point = point
        self._cuts = cuts
        self._activation = activation
        self._first = first_token
        self._active = np.zeros((0, scratch.d_ff), np.bool_)
        self._sizes = np.zeros(scratch.d_ff, np.float32)

    def tap(self, layer: int, point: TapPoint, x: F32) -> None:
        """Record the activation, if it is the one asked for."""
        if point == self._point:
            self._scratch.write(layer, self._first, inputs=x)

    def begin(self, layer: int) -> None:
        """A new layer."""
        self._active = self._active[:0]

    def neurons(self, layer: int, neurons: slice, tested: F32, h: F32) -> None:
        """Take up the active ones; all of them are computed with."""
        if len(self._active) != len(tested):
            self._active = np.zeros((len(tested), self._scratch.d_ff), np.bool_)
        self._sizes[neurons] = np.abs(h).sum(axis=0)
        self._active[:, neurons] = self._cuts[layer].passes(tested, h, self._activation)

    def end(self, layer: int) -> None:
        """Write active sets and sums; after the last layer go on to the next tokens."""
        self._scratch.write(layer, self._first, active=self._active, sizes=self._sizes)
        if layer == len(self._cuts) - 1:
            self._first += len(self._active)


def record_text(
    model: ObservedModel,
    scratch: Scratch,
    token_ids: Sequence[int],
    *,
    window: int,
    cuts: Sequence[Cut],
    point: TapPoint,
    progress: Callable[[int], None],
) -> None:
    """Record a text in windows of `window` tokens, each from an empty context; goes on where it was interrupted.

    Parameters
    ----------
    token_ids : as many as the store has room for, a multiple of `window`.
    progress : called with the tokens just recorded.
    """
    n_done = int(scratch.done("recorded_tokens") or 0)
    progress(n_done)
    for first in range(n_done, len(token_ids), window):
        ids = token_ids[first : first + window]
        model.run(ids, ActivityRecorder(scratch, point, cuts, model.model.decoder.ffn.activation, first))
        scratch.finish("recorded_tokens", first + len(ids))
        progress(len(ids))
