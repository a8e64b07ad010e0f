"""Which neurons of a layer stay in DRAM from token to token. Pure: ids in, ids out; no bytes, no I/O.

A window is fed the active neurons of one token after another (or of one prefill chunk) and says what has to be
loaded and what leaves. Three rules with one interface:

- `RecentTokens`, the reference: the paper's sliding window (LLM in a flash, section 3.1): keep what the last k tokens
  used, evict a neuron as soon as it leaves the window.
- `LeastRecent`: keep everything until room is needed, then evict the least recently active.
- `DecayedFrequency`, the default: the same, but evict what was active least often, where long ago counts little. On
  recorded activity it misses a fifth less than `LeastRecent` (benchmarks/window_policies.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
_LARGEST_UNIT: Final = 1e100


@dataclass(frozen=True, slots=True)
class WindowStep:
    """What one token changes: sorted, unique int32 neuron ids.

    `hits` were held and are active; `missing` are active and must be loaded; `evicted` leave.
    """

    hits: Ids
    missing: Ids
    evicted: Ids


class NeuronWindow(Protocol):
    """A rule for one layer."""

    def step(self, active: Ids) -> WindowStep:
        """Take the next token's active neurons (sorted, unique) and update what is held."""
        ...

    def forget(self, ids: Ids) -> None:
        """No longer count `ids` as held, because loading them failed."""
        ...

    def held(self) -> Ids:
        """Neurons held now, sorted."""
        ...


class RecentTokens:
    """The paper's rule: hold the union of the active neurons of the last `k` tokens, k >= 1.

    Where that union outgrows `capacity`, the least recently active of it leave early; None sets no limit.
    """

    def __init__(self, n_neurons: int, k: int, capacity: int | None = None) -> None:
        if k < 1:
            raise ValueError(f"a window holds at least one token, not {k}")
        self._capacity = n_neurons if capacity is None else capacity
        self._last_active = np.full(n_neurons, -1, np.int64)  # index of the token that used a neuron last
        self._held = np.zeros(n_neurons, np.bool_)
        self._recent: deque[Ids] = deque(maxlen=k)
        self._token = 0

    def step(self, active: Ids) -> WindowStep:
        """Evicted are the held neurons that none of the last k tokens, this one included, used.

        Raises
        ------
        ValueError
            If more neurons are active than there is room for; feed them in parts.
        """
        _require_room(active, self._capacity)
        leaving = self._recent[0] if len(self._recent) == self._recent.maxlen else active[:0]
        is_held = self._held[active]
        oldest = self._token - len(self._recent)
        self._last_active[active] = self._token
        evicted = leaving[(self._last_active[leaving] == oldest) & self._held[leaving]]
        self._recent.append(active)
        self._token += 1
        self._held[active] = True
        self._held[evicted] = False
        n_held = int(np.count_nonzero(self._held))
        if n_held > self._capacity:
            excess = _least(self._held, self._last_active, n_held - self._capacity)
            self._held[excess] = False
            evicted = np.sort(np.concatenate((evicted, excess)))
        return WindowStep(active[is_held], active[~is_held], evicted)

    def forget(self, ids: Ids) -> None:
        """No longer count `ids` as held."""
        self._held[ids] = False

    def held(self) -> Ids:
        """Neurons held now, sorted."""
        return np.flatnonzero(self._held).astype(np.int32)


class LeastRecent:
    """Hold up to `capacity` neurons; make room by evicting the least recently active, lowest id first among equals."""

    def __init__(self, n_neurons: int, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a window has room for at least one neuron, not {capacity}")
        self.capacity = capacity
        self._last_active = np.full(n_neurons, -1, np.int64)
        self._held = np.zeros(n_neurons, np.bool_)
        self._n_held = 0
        self._token = 0

    def step(self, active: Ids) -> WindowStep:
        """Evicted are as few held, inactive neurons as make room.

        Raises
        ------
        ValueError
            If more neurons are active than there is room for; feed them in parts.
        """
        _require_room(active, self.capacity)
        is_held = self._held[active]
        missing = active[~is_held]
        self._last_active[active] = self._token
        self._token += 1
        evicted = _least(self._held, self._last_active, self._n_held + len(missing) - self.capacity)
        self._held[evicted] = False
        self._held[missing] = True
        self._n_held += len(missing) - len(evicted)
        return WindowStep(active[is_held], missing, evicted)

    def forget(self, ids: Ids) -> None:
        """No longer count `ids` as held."""
        self._n_held -= int(np.count_nonzero(self._held[ids]))
        self._held[ids] = False

    def held(self) -> Ids:
        """Neurons held now, sorted."""
        return np.flatnonzero(self._held).astype(np.int32)


class DecayedFrequency:
    """Hold up to `capacity` neurons; make room by evicting those with the least activity.

    The activity of a neuron is the number of its active tokens, of which one `half_life` tokens ago counts half (as
    in LRFU, Lee et al. 2001). Lowest id first among equals.

    Parameters
    ----------
    half_life : in tokens, above 0.
    """

    def __init__(self, n_neurons: int, capacity: int, half_life: float) -> None:
        if capacity < 1:
            raise ValueError(f"a window has room for at least one neuron, not {capacity}")
        if not half_life > 0:
            raise ValueError(f"a half-life is positive, not {half_life}")
        self.capacity = capacity
        self._growth = 2.0 ** (1.0 / half_life)
        self._unit = 1.0  # what one active token counts: it grows, instead of all older ones shrinking
        self._activity = np.zeros(n_neurons)
        self._held = np.zeros(n_neurons, np.bool_)
        self._n_held = 0

    def step(self, active: Ids) -> WindowStep:
        """Evicted are as few held, inactive neurons as make room.

        Raises
        ------
        ValueError
            If more neurons are active than there is room for; feed them in parts.
        """
        _require_room(active, self.capacity)
        is_held = self._held[active]
        missing = active[~is_held]
        self._activity[active] += self._unit
        n_leaving = self._n_held + len(missing) - self.capacity
        evicted = active[:0]
        if n_leaving > 0:
            self._held[active] = False  # what is active stays, however rarely it is
            evicted = _least(self._held, self._activity, n_leaving)
            self._held[evicted] = False
        self._held[active] = True
        self._n_held += len(missing) - len(evicted)
        self._unit *= self._growth
        if self._unit > _LARGEST_UNIT:
            self._activity /= self._unit
            self._unit = 1.0
        return WindowStep(active[is_held], missing, evicted)

    def forget(self, ids: Ids) -> None:
        """No longer count `ids` as held."""
        self._n_held -= int(np.count_nonzero(self._held[ids]))
        self._held[ids] = False

    def held(self) -> Ids:
        """Neurons held now, sorted."""
        return np.flatnonzero(self._held).astype(np.int32)


def fitting_parts(active: Ids, capacity: int, is_held: npt.NDArray[np.bool_] | None = None) -> Iterator[Ids]:
    """Neurons in parts that fit in the slots: all at once, else those that are held, then the others.

    These pass through the slots that the held ones leave, at least half of all. A window that knows what is needed
    often then keeps some of it, while parts in the order of the neurons would each evict the next before its turn.

    Parameters
    ----------
    is_held : bool [len(active)]; None for parts in the order of the neurons.
    """
    if len(active) <= capacity:
        yield active
        return
    rest, room = active, capacity
    if is_held is not None:
        rest = active[~is_held]
        room = max(capacity - (len(active) - len(rest)), capacity // 2, 1)
        yield active[is_held]
    for first in range(0, len(rest), room):
        yield rest[first : first + room]


def _require_room(active: Ids, capacity: int) -> None:
    if len(active) > capacity:
        raise ValueError(f"{len(active)} active neurons exceed the capacity of {capacity}")


def _least(is_held: npt.NDArray[np.bool_], worth: npt.NDArray[Any], n: int) -> Ids:
    """The `n` held neurons of the least worth, lowest id first among equals; sorted."""
    held = np.flatnonzero(is_held).astype(np.int32)
    if n <= 0:
        return held[:0]
    if n < len(held):
        of_held = worth[held]
        limit = np.partition(of_held, n - 1)[n - 1]  # everything below this goes, and some of exactly this worth
        below, equal = held[of_held < limit], held[of_held == limit]
        held = np.concatenate((below, equal[: n - len(below)]))
    held.sort()
    return held


@dataclass(frozen=True, slots=True)
class WindowChoice:
    """A parsed rule: ``paper:K``, ``lru``, or ``frequency:H`` with a half-life of H tokens."""

    rule: Literal["paper", "lru", "frequency"]
    n_tokens: int = 0

    def build(self, n_neurons: int, capacity: int) -> NeuronWindow:
        """The window of a layer with `capacity` slots."""
        if self.rule == "paper":
            return RecentTokens(n_neurons, self.n_tokens, capacity)
        if self.rule == "lru":
            return LeastRecent(n_neurons, capacity)
        return DecayedFrequency(n_neurons, capacity, self.n_tokens)


DEFAULT_WINDOW: Final = WindowChoice("frequency", 64)


def parse_window(text: str) -> WindowChoice:
    """Understand ``paper:5`` (keep what the last 5 tokens used), ``lru``, ``frequency`` or ``frequency:64``.

    Raises
    ------
    ValueError
        If the text is none of them.
    """
    if text == "lru":
        return WindowChoice("lru")
    if text == "frequency":
        return DEFAULT_WINDOW
    rule, _, n_tokens = text.partition(":")
    if n_tokens.isascii() and n_tokens.isdigit() and int(n_tokens) >= 1:
        if rule == "paper":
            return WindowChoice("paper", int(n_tokens))
        if rule == "frequency":
            return WindowChoice("frequency", int(n_tokens))
    raise ValueError(f"{text!r} is no rule for the window: paper:K with K of at least 1, lru, or frequency:H")
