"""Measuring a decode: a prompt, then one token after another, each timed, and what its time went into.

Knows: what can be fed and what figures it keeps. Does not know: what kind of run it is.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from reference_engine.bench.bundle_readers import Clock
from reference_engine.bench.naive import NaiveModel
from reference_engine.engine import Engine
from reference_engine.flash_io import IoCounters
from reference_engine.selectors.protocol import F32
from reference_engine.telemetry import SparseTotals

MIN_TOKENS: Final = 2


@dataclass(frozen=True, slots=True)
class Costs:
    """What decoding has cost so far; two of them subtract.

    Attributes
    ----------
    bytes_read, n_requests : of flash, gaps that are read through included.
    n_active, n_hits, n_missing : neurons of all layers; 0 in exact mode.
    select, issue, wait, ffn, upkeep, check : seconds in selectors, in beginning reads, in waiting for them, in the
        arithmetic of FFNs whose bundles are fetched (those held whole are computed in one call with what is around
        them), in keeping windows and caches, in comparing checksums.
    """

    bytes_read: int = 0
    n_requests: int = 0
    n_active: int = 0
    n_hits: int = 0
    n_missing: int = 0
    select: float = 0.0
    issue: float = 0.0
    wait: float = 0.0
    ffn: float = 0.0
    upkeep: float = 0.0
    check: float = 0.0

    def __sub__(self, earlier: Costs) -> Costs:
        return Costs(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(earlier), strict=True)))

    def __add__(self, other: Costs) -> Costs:
        return Costs(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


SECONDS: Final = ("select", "issue", "wait", "ffn", "upkeep", "check")


class Subject(Protocol):
    """Something that decodes and keeps account of it."""

    def start(self) -> None:
        """Begin a new sequence."""
        ...

    def feed(self, token_ids: Sequence[int]) -> F32:
        """Append tokens; returns float32 [vocab_size]."""
        ...

    def costs(self) -> Costs:
        """What it has cost so far."""
        ...


class EngineSubject:
    """A loaded engine. `clock` has the seconds that beginning reads took."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._session = engine.start()

    def start(self) -> None:
        """Begin a new sequence; what is in memory stays."""
        self._session = self._engine.start()

    def feed(self, token_ids: Sequence[int]) -> F32:
        """Append tokens."""
        return self._session.feed(token_ids)

    def costs(self) -> Costs:
        """What it has cost so far."""
        sparse, exact, io = self._engine.sparse, self._engine.exact, self._engine.counters()
        if sparse is not None:
            return _sparse_costs(sparse.totals, io, self._clock)
        ffn = exact.compute_seconds if exact is not None else 0.0
        return Costs(io.bytes_read, io.n_requests, wait=io.wait_seconds, ffn=ffn)


class NaiveSubject:
    """A model of which nothing is held."""

    def __init__(self, model: NaiveModel, clock: Clock) -> None:
        self._model = model
        self._clock = clock

    def start(self) -> None:
        """Begin a new sequence."""
        self._model.restart()

    def feed(self, token_ids: Sequence[int]) -> F32:
        """Append tokens."""
        return self._model.feed(token_ids)

    def costs(self) -> Costs:
        """What it has cost so far."""
        found = _sparse_costs(self._model.bundles.totals, self._model.counters(), self._clock)
        return dataclasses.replace(found, wait=found.wait + self._model.tensors.seconds)


def _sparse_costs(totals: SparseTotals, io: IoCounters, clock: Clock) -> Costs:
    return Costs(
        bytes_read=io.bytes_read,
        n_requests=io.n_requests,
        n_active=int(totals.total("n_active")),
        n_hits=int(totals.total("n_hits")),
        n_missing=int(totals.total("n_missing")),
        select=totals.total("select_seconds"),
        issue=clock.seconds,
        wait=totals.total("wait_seconds"),
        ffn=totals.total("compute_seconds"),
        upkeep=totals.total("upkeep_seconds"),
        check=totals.total("check_seconds"),
    )


@dataclass(frozen=True, slots=True)
class Decode:
    """One sequence: seconds to the first token, seconds of each of the tokens behind it, and what these cost in all."""

    first_token_seconds: float
    token_seconds: tuple[float, ...]
    costs: Costs


def decode(
    subject: Subject,
    prompt: Sequence[int],
    *,
    n_tokens: int,
    seconds: float,
    n_warm_up: int = 0,
    progress: Callable[[int], None] = lambda n: None,
) -> Decode:
    """Feed `prompt`, then tokens greedily, and measure.

    Parameters
    ----------
    n_tokens, seconds : stop after so many tokens, or after so long, but not before there are `MIN_TOKENS`.
    n_warm_up : tokens behind the first that are not measured.
    progress : called with the number of tokens after each.
    """
    subject.start()
    began = time.perf_counter()
    token = _likeliest(subject.feed(prompt))
    first_token_seconds = time.perf_counter() - began
    progress(0)
    for _ in range(n_warm_up):
        token = _likeliest(subject.feed([token]))
    before = subject.costs()
    times: list[float] = []
    while len(times) < n_tokens and (len(times) < MIN_TOKENS or sum(times) < seconds):
        began = time.perf_counter()
        token = _likeliest(subject.feed([token]))
        times.append(time.perf_counter() - began)
        progress(len(times))
    return Decode(first_token_seconds, tuple(times), subject.costs() - before)


def _likeliest(logits: F32) -> int:
    return int(np.argmax(logits))
