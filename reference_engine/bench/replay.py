"""Selectors that replay given activity, whatever the activations. The predictors they stand for are computed, too.

Random weights make no model: their predictors predict noise, but they take the time of real ones.
"""

from __future__ import annotations

from collections.abc import Callable

from flashfmt.manifest import InputTap
from reference_engine.bench.activity import SyntheticActivity
from reference_engine.neuron_window import Ids
from reference_engine.selectors import Everything, Selector, TappedSelector
from reference_engine.selectors.protocol import F32


class Replay:
    """`Selector` of one layer that gives the next tokens' active sets.

    Parameters
    ----------
    predictor : computed at each call, its choice thrown away; None for none.
    """

    def __init__(self, activity: SyntheticActivity, layer: int, predictor: Selector | None) -> None:
        self._activity = activity
        self._layer = layer
        self._predictor = predictor
        self._token = 0

    def select(self, x: F32) -> Ids:
        """What any of the next ``len(x)`` tokens uses."""
        if self._predictor is not None:
            self._predictor.select(x)
        first = self._token
        self._token += len(x)
        return self._activity.active(self._layer, first, len(x))


def replaying(
    activity: SyntheticActivity, *, ahead: bool = False
) -> Callable[[list[TappedSelector]], list[TappedSelector]]:
    """What puts a replay in the place of every layer's selector, for `SparseOptions.substitute`.

    Parameters
    ----------
    ahead : let the predictors look at the FFN input of the layer before, as soon as it is known; the first layer has
        none before it. Otherwise they look at what they looked at before.
    """

    def substitute(selectors: list[TappedSelector]) -> list[TappedSelector]:
        found = []
        for layer, tapped in enumerate(selectors):
            predictor = None if isinstance(tapped.selector, Everything) else tapped.selector
            tap = InputTap(layer=max(layer - 1, 0)) if ahead else tapped.tap
            found.append(TappedSelector(tap, Replay(activity, layer, predictor)))
        return found

    return substitute
