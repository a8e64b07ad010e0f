"""Which neurons of a layer stay in DRAM from token to token. Pure: ids in, ids out; no bytes, no I/O.

A window is fed the active neurons of one token after another (or of one prefill chunk) and says what has to be
loaded and what leaves. Two rules with one interface:

- `RecentTokens`, the reference: the paper's sliding window (LLM in a flash, section 3.1): keep what the last k tokens
  used, evict a neuron as soon as it leaves the window.
- `LeastRecent`, the default: keep everything until room is needed, then evict the least recently active.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]


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
            excess = _least_recent(self._held, self._last_active, n_held - self._capacity)
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
        evicted = _least_recent(self._held, self._last_active, self._n_held + len(missing) - self.capacity)
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


def _require_room(active: Ids, capacity: int) -> None:
    if len(active) > capacity:
        raise ValueError(f"{len(active)} active neurons exceed the capacity of {capacity}")


def _least_recent(is_held: npt.NDArray[np.bool_], last_active: npt.NDArray[np.int64], n: int) -> Ids:
    """The `n` held neurons that were active longest ago, lowest id first among equals; sorted."""
    held = np.flatnonzero(is_held).astype(np.int32)
    if n <= 0:
        return held[:0]
    age = last_active[held]
    if n < len(held):
        limit = np.partition(age, n - 1)[n - 1]  # every neuron older than this goes, and some of exactly this age
        older, equal = held[age < limit], held[age == limit]
        held = np.concatenate((older, equal[: n - len(older)]))
    held.sort()
    return held


@dataclass(frozen=True, slots=True)
class WindowChoice:
    """A parsed rule: ``paper:K``, or ``lru``."""

    rule: Literal["paper", "lru"]
    k: int = 0

    def build(self, n_neurons: int, capacity: int) -> NeuronWindow:
        """The window of a layer with `capacity` slots."""
        if self.rule == "paper":
            return RecentTokens(n_neurons, self.k, capacity)
        return LeastRecent(n_neurons, capacity)


LRU: Final = WindowChoice("lru")
DEFAULT_WINDOW: Final = "lru"


def parse_window(text: str) -> WindowChoice:
    """Understand ``paper:5`` (keep what the last 5 tokens used) or ``lru``.

    Raises
    ------
    ValueError
        If the text is neither.
    """
    if text == "lru":
        return LRU
    rule, _, k = text.partition(":")
    if rule == "paper" and k.isascii() and k.isdigit() and int(k) >= 1:
        return WindowChoice("paper", int(k))
    raise ValueError(f"{text!r} is no rule for the window: paper:K with K of at least 1, or lru")
