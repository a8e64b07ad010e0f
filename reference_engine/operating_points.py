"""Operating points: for each layer a rule that says which neurons a token computes, and an observer that applies it.

Every token gets the set that it would get if tokens came one by one, also where many are computed at once.

Knows: rules and counts. Does not know: texts, reports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from flashfmt.manifest import Activation, InputTap
from reference_engine.models.weights import TapPoint
from reference_engine.observation import NONZERO, Cut
from reference_engine.selectors import Selector

F32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class LayerRule:
    """What is computed in a layer: what passes `keep`; or what is chosen by the tapped activation; or all.

    `selector` chooses for one token after another. `predict` does the same for many tokens at once: from float32
    [n_tokens, d_model] to bool [n_tokens, n_neurons]. `active` says which neurons the choice is measured against.
    """

    active: Cut = NONZERO
    selector: Selector | None = None
    predict: Callable[[F32], Mask] | None = None
    tap: InputTap | None = None
    keep: Cut | None = None


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """A rule for every layer; `setting` tells points of one selector apart."""

    selector: str
    setting: str
    rules: tuple[LayerRule, ...]

    @property
    def label(self) -> str:
        """Name for people."""
        return f"{self.selector} {self.setting}".strip()


@dataclass(slots=True)
class Tally:
    """Counts of entries (a neuron for a token): computed, active, both; and the tokens."""

    n_tokens: int = 0
    n_neurons: int = 0
    computed: int = 0
    active: int = 0
    both: int = 0

    def add(self, computed: Mask, active: Mask) -> None:
        """Count entries [n_tokens, n] of some neurons."""
        self.computed += int(np.count_nonzero(computed))
        self.active += int(np.count_nonzero(active))
        self.both += int(np.count_nonzero(computed & active))

    @property
    def recall(self) -> float:
        """Share of the active entries that were computed; 1 where none was active."""
        return self.both / self.active if self.active else 1.0

    @property
    def precision(self) -> float:
        """Share of the computed entries that were active; 1 where none was computed."""
        return self.both / self.computed if self.computed else 1.0

    @property
    def computed_share(self) -> float:
        """Computed neurons as a share of all, averaged over tokens."""
        return self.computed / max(self.n_tokens * self.n_neurons, 1)

    @property
    def active_share(self) -> float:
        """Active neurons as a share of all, averaged over tokens."""
        return self.active / max(self.n_tokens * self.n_neurons, 1)


def total(tallies: Sequence[Tally]) -> Tally:
    """Counts of several layers as one."""
    return Tally(
        n_tokens=max((t.n_tokens for t in tallies), default=0),
        n_neurons=sum(t.n_neurons for t in tallies),
        computed=sum(t.computed for t in tallies),
        active=sum(t.active for t in tallies),
        both=sum(t.both for t in tallies),
    )


@dataclass(slots=True)
class ActiveSets:
    """Computed sets of the first tokens of a text, for every layer, bit-packed; at most `limit` tokens."""

    n_layers: int
    n_neurons: int
    limit: int
    _packed: list[list[npt.NDArray[np.uint8]]] = field(init=False)
    _n_tokens: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._packed = [[] for _ in range(self.n_layers)]
        self._n_tokens = [0] * self.n_layers

    def add(self, layer: int, computed: Mask) -> None:
        """Take the next tokens of a layer, bool [n_tokens, n_neurons], as far as there is room."""
        room = self.limit - self._n_tokens[layer]
        if room > 0:
            self._packed[layer].append(np.packbits(computed[:room], axis=1))
            self._n_tokens[layer] += min(room, len(computed))

    def layer(self, layer: int) -> Mask:
        """bool [n_tokens, n_neurons]."""
        if not self._packed[layer]:
            return np.zeros((0, self.n_neurons), np.bool_)
        return np.unpackbits(np.concatenate(self._packed[layer]), axis=1, count=self.n_neurons).view(np.bool_)


class Masking:
    """An observer that computes with the neurons of an operating point and counts them.

    Parameters
    ----------
    sets : where the computed sets are kept as well, or None.
    """

    def __init__(
        self, point: OperatingPoint, d_ff: int, activation: Activation, sets: ActiveSets | None = None
    ) -> None:
        self.point = point
        self.tallies = [Tally(n_neurons=d_ff) for _ in point.rules]
        self._activation = activation
        self._d_ff = d_ff
        self._sets = sets
        self._wanted = {(rule.tap.layer, rule.tap.point) for rule in point.rules if rule.tap is not None}
        self._tapped: dict[tuple[int, str], F32] = {}
        self._computed: Mask | None = None

    def tap(self, layer: int, point: TapPoint, x: F32) -> None:
        """Keep the activation if a selector reads it."""
        if (layer, point) in self._wanted:
            self._tapped[layer, point] = x.copy()

    def begin(self, layer: int) -> None:
        """Choose by the tapped activation."""
        rule = self.point.rules[layer]
        self._computed = None
        if rule.tap is None:
            return
        z = self._tapped[rule.tap.layer, rule.tap.point]
        if rule.predict is not None:
            self._computed = rule.predict(z)
        elif rule.selector is not None:
            self._computed = np.zeros((len(z), self._d_ff), np.bool_)
            for token, computed in enumerate(self._computed):
                computed[rule.selector.select(z[token : token + 1])] = True

    def neurons(self, layer: int, neurons: slice, tested: F32, h: F32) -> Mask:
        """What counts of these neurons."""
        rule = self.point.rules[layer]
        if self._computed is None:
            self._computed = np.ones((len(tested), self._d_ff), np.bool_)
        if rule.keep is not None:
            self._computed[:, neurons] = rule.keep.passes(tested, h, self._activation)
        computed = self._computed[:, neurons]
        self.tallies[layer].add(computed, rule.active.passes(tested, h, self._activation))
        return computed

    def end(self, layer: int) -> None:
        """Count the tokens."""
        if self._computed is not None:
            self.tallies[layer].n_tokens += len(self._computed)
            if self._sets is not None:
                self._sets.add(layer, self._computed)
