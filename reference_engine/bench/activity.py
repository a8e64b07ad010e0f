"""Synthetic activity: which neurons a token uses, drawn so that published statistics of a real model come out.

Every neuron of a layer has a probability of its own to be active, and tokens are independent of each other. A share of
the neurons is always active, the probabilities of the others follow a beta distribution. Then the aggregated use of k
tokens (LLM in a flash, section 3.1: s_agg(k), the share of neurons that any of them uses) has a closed form, and the
three parameters follow from three published figures.

Knows: probabilities and ids. Does not know: who replays them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from reference_engine.neuron_window import Ids

_LEAST_SPREAD: Final = 1e-3
_MOST_SPREAD: Final = 1e6
_N_HALVINGS: Final = 60
_MAX_MEASURED_TOKENS: Final = 64


@dataclass(frozen=True, slots=True)
class ActivityStatistics:
    """Shares of the neurons of a layer, 0 to 1.

    Attributes
    ----------
    active_share : that a token uses.
    window_tokens, held_share : that any of so many tokens in a row uses: s_agg(k).
    incremental_share : that a token uses and none of the k before it: s_agg(k + 1) - s_agg(k).
    """

    active_share: float
    window_tokens: int
    held_share: float
    incremental_share: float

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)


PUBLISHED: Final = ActivityStatistics(active_share=0.10, window_tokens=5, held_share=0.24, incremental_share=0.024)
"""OPT-6.7B as its predictors see it (LLM in a flash, arXiv:2312.11514, section 3 and figure 4)."""


@dataclass(frozen=True, slots=True)
class Popularity:
    """Probabilities of the neurons of a layer: `always` of them 1, the others drawn from Beta(`a`, `b`)."""

    always: float
    a: float
    b: float

    def aggregated(self, n_tokens: int) -> float:
        """Expected s_agg(`n_tokens`)."""
        steps = np.arange(n_tokens)
        unused = float(np.prod((self.b + steps) / (self.a + self.b + steps)))
        return 1 - (1 - self.always) * unused

    def draw(self, n_neurons: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """Probabilities of the neurons of a layer, in no order; float32 [n_neurons]."""
        chances = np.ones(n_neurons, np.float32)
        n_always = round(self.always * n_neurons)
        chances[n_always:] = rng.beta(self.a, self.b, n_neurons - n_always)
        rng.shuffle(chances)
        return chances


def fit(target: ActivityStatistics) -> Popularity:
    """The popularity whose expected statistics are `target`.

    Raises
    ------
    ValueError
        If independent tokens cannot have these statistics.
    """
    active, k, held = target.active_share, target.window_tokens, target.held_share
    if not 0 < active < held < 1 or k < 2 or 1 - (1 - active) ** k < held:
        raise ValueError(f"no activity has {target}")
    # With more neurons always active than this, even equal popularity of the others would leave the window too small.
    low, high = 0.0, 1 - ((1 - active) ** k / (1 - held)) ** (1 / (k - 1))
    ends = [_increment(_with_core(share, target), k) for share in (low, high)]
    if not ends[0] <= target.incremental_share <= ends[1]:
        raise ValueError(f"no activity has {target}: a token adds {ends[0]:.2%} to {ends[1]:.2%}")
    for _ in range(_N_HALVINGS):
        middle = (low + high) / 2
        if _increment(_with_core(middle, target), k) < target.incremental_share:
            low = middle
        else:
            high = middle
    return _with_core((low + high) / 2, target)


def _with_core(always: float, target: ActivityStatistics) -> Popularity:
    """Popularity with the active and held shares of `target`, and `always` of the neurons in every token."""
    mean = (target.active_share - always) / (1 - always)
    low, high = _LEAST_SPREAD, _MOST_SPREAD
    for _ in range(_N_HALVINGS):
        spread = (low * high) ** 0.5
        if Popularity(always, mean * spread, (1 - mean) * spread).aggregated(target.window_tokens) < target.held_share:
            low = spread
        else:
            high = spread
    return Popularity(always, mean * high, (1 - mean) * high)


def _increment(popularity: Popularity, n_tokens: int) -> float:
    return popularity.aggregated(n_tokens + 1) - popularity.aggregated(n_tokens)


class SyntheticActivity:
    """Active sets of `n_tokens` tokens in every layer, drawn at once; behind the last token comes the first again."""

    def __init__(self, popularity: Popularity, n_layers: int, n_neurons: int, n_tokens: int, seed: int = 0) -> None:
        self.n_neurons = n_neurons
        self._id_type = np.uint16 if n_neurons <= 1 << 16 else np.int32
        self._layers: list[list[npt.NDArray[Any]]] = []
        for layer in range(n_layers):
            rng = np.random.default_rng((seed, layer))
            chances = popularity.draw(n_neurons, rng)
            self._layers.append(
                [
                    np.flatnonzero(rng.random(n_neurons, np.float32) < chances).astype(self._id_type)
                    for _ in range(n_tokens)
                ]
            )

    @property
    def n_tokens(self) -> int:
        """Tokens until it begins anew."""
        return len(self._layers[0])

    @property
    def n_layers(self) -> int:
        """Layers there is activity for."""
        return len(self._layers)

    def active(self, layer: int, first: int, n_tokens: int = 1) -> Ids:
        """Neurons that any of the tokens ``[first, first + n_tokens)`` uses; sorted int32."""
        sets = self._layers[layer]
        if n_tokens == 1:
            return sets[first % len(sets)].astype(np.int32)
        is_active = np.zeros(self.n_neurons, np.bool_)
        for token in range(first, first + min(n_tokens, len(sets))):
            is_active[sets[token % len(sets)]] = True
        return np.flatnonzero(is_active).astype(np.int32)

    def statistics(self, window_tokens: int) -> ActivityStatistics:
        """What came of the draw, means over the layers and the first tokens.

        Raises
        ------
        ValueError
            If there are no more tokens than `window_tokens`.
        """
        if self.n_tokens <= window_tokens:
            raise ValueError(f"{self.n_tokens} tokens say nothing about windows of {window_tokens}")
        figures = [_measured(sets[:_MAX_MEASURED_TOKENS], self.n_neurons, window_tokens) for sets in self._layers]
        active, held, incremental = np.mean(figures, axis=0).tolist()
        return ActivityStatistics(active, window_tokens, held, incremental)


def _measured(sets: Sequence[npt.NDArray[Any]], n_neurons: int, k: int) -> tuple[float, float, float]:
    """(active, held by k tokens, added by the next one) of one layer."""
    is_active = np.zeros((len(sets), n_neurons), np.bool_)
    for token, ids in enumerate(sets):
        is_active[token, ids] = True
    # windows[t]: what the k tokens from t on use
    windows: npt.NDArray[np.bool_] = np.asarray(np.lib.stride_tricks.sliding_window_view(is_active, k, axis=0).any(-1))
    added = is_active[k:] & ~windows[:-1]
    return float(is_active.mean()), float(windows.mean()), float(added.mean())
