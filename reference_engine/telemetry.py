"""What sparse inference did and what it cost, layer by layer: values that are handed on, never printed here.

A pass is one token, or one chunk of a prompt. `LayerStep` is one layer of one pass, `SparseTotals` the sum of many.

Knows: figures and their names. Does not know: who measures them, who looks at them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from reference_engine.neuron_window import Ids


@dataclass(slots=True)
class Costs:
    """Seconds spent waiting for reads, comparing checksums, and keeping window and cache; requests and bytes read."""

    wait_seconds: float = 0.0
    check_seconds: float = 0.0
    upkeep_seconds: float = 0.0
    n_requests: int = 0
    bytes_read: int = 0

    def __add__(self, other: Costs) -> Costs:
        return Costs(
            self.wait_seconds + other.wait_seconds,
            self.check_seconds + other.check_seconds,
            self.upkeep_seconds + other.upkeep_seconds,
            self.n_requests + other.n_requests,
            self.bytes_read + other.bytes_read,
        )


@dataclass(slots=True)
class LayerFigures:
    """Counts and seconds of one layer in one pass.

    Attributes
    ----------
    n_active : neurons computed. Those of the cache are `n_hits`, those that had to be read `n_missing`.
    n_prefetched : read ahead on a hint; what was used of them counts as hits.
    n_evicted : neurons that left the cache.
    bytes_read, n_requests : reads, neighbours merged and gaps included.
    select_seconds : the selectors.
    wait_seconds : compute stood still for reads.
    check_seconds : comparing checksums.
    upkeep_seconds : window and cache.
    compute_seconds : FFN arithmetic.
    """

    n_active: int = 0
    n_hits: int = 0
    n_missing: int = 0
    n_prefetched: int = 0
    n_evicted: int = 0
    bytes_read: int = 0
    n_requests: int = 0
    select_seconds: float = 0.0
    wait_seconds: float = 0.0
    check_seconds: float = 0.0
    upkeep_seconds: float = 0.0
    compute_seconds: float = 0.0

    def add(self, costs: Costs) -> None:
        """Count what a fetch cost."""
        self.wait_seconds += costs.wait_seconds
        self.check_seconds += costs.check_seconds
        self.upkeep_seconds += costs.upkeep_seconds
        self.n_requests += costs.n_requests
        self.bytes_read += costs.bytes_read

    def as_dict(self) -> dict[str, int | float]:
        """All figures by name."""
        return dataclasses.asdict(self)


FIGURES: Final = tuple(field.name for field in dataclasses.fields(LayerFigures))


@dataclass(frozen=True, slots=True)
class LayerStep:
    """One layer of a pass: its active neurons (sorted ids) and figures."""

    active: Ids
    figures: LayerFigures


@dataclass(frozen=True, slots=True)
class PassRecord:
    """All layers of a pass of `n_tokens` tokens, in order."""

    n_tokens: int
    layers: tuple[LayerStep, ...]


class SparseTotals:
    """Sums of figures by layer, over prompt chunks and over single tokens apart."""

    def __init__(self, n_layers: int) -> None:
        self.n_tokens = 0
        self.n_passes = 0
        self._sums = np.zeros((n_layers, len(FIGURES)))

    def add(self, record: PassRecord) -> None:
        """Count a pass."""
        self.n_passes += 1
        self.n_tokens += record.n_tokens
        self._sums += [[getattr(step.figures, name) for name in FIGURES] for step in record.layers]

    def by_layer(self, figure: str) -> npt.NDArray[np.float64]:
        """Sum of one of `FIGURES`, float64 [n_layers], a copy."""
        return self._sums[:, FIGURES.index(figure)].copy()

    def total(self, figure: str) -> float:
        """Sum of one of `FIGURES` over all layers."""
        return float(self._sums[:, FIGURES.index(figure)].sum())

    @property
    def hit_rate(self) -> float:
        """Share of active neurons that were held already, 0 to 1; 0 where none was active."""
        return _ratio(self.total("n_hits"), self.total("n_active"))

    def as_dict(self) -> dict[str, object]:
        """Sums over all layers, and of each layer, for JSON."""
        layers = [dict(zip(FIGURES, row.tolist(), strict=True)) for row in self._sums]
        return {
            "n_passes": self.n_passes,
            "n_tokens": self.n_tokens,
            "hit_rate": self.hit_rate,
            **{name: self.total(name) for name in FIGURES},
            "layers": layers,
        }

    def columns(self) -> tuple[str, ...]:
        """Headings of `rows`."""
        return ("layer", "active", "hits", "missing", "KiB read", "requests", "select", "wait", "check", "upkeep",
                "compute")  # fmt: skip

    def rows(self, n_neurons: int) -> list[tuple[str, ...]]:
        """A line for each layer and one for all, means of a pass, for people; times in microseconds."""
        lines = [self._row(str(layer), sums, n_neurons) for layer, sums in enumerate(self._sums)]
        return [*lines, self._row("all", self._sums.sum(axis=0), n_neurons * len(self._sums))]

    def _row(self, label: str, sums: npt.NDArray[np.float64], n_neurons: int) -> tuple[str, ...]:
        mean = dict(zip(FIGURES, (sums / max(self.n_passes, 1)).tolist(), strict=True))
        return (
            label,
            f"{_ratio(mean['n_active'], n_neurons):.1%}",
            f"{_ratio(mean['n_hits'], mean['n_active']):.1%}",
            f"{mean['n_missing']:.1f}",
            f"{mean['bytes_read'] / 1024:.0f}",
            f"{mean['n_requests']:.1f}",
            *(f"{mean[name] * 1e6:.0f}" for name in FIGURES if name.endswith("_seconds")),
        )


def _ratio(amount: float, per: float) -> float:
    return amount / per if per > 0 else 0.0
