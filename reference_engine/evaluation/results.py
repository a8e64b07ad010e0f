"""What an evaluation found, as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from reference_engine.operating_points import Tally


@dataclass(frozen=True, slots=True)
class LayerResult:
    """One layer at an operating point. Shares of 1; `active_share` is of what counts as active for the selector."""

    layer: int
    recall: float
    precision: float
    computed_share: float
    active_share: float

    @classmethod
    def of(cls, layer: int, tally: Tally) -> LayerResult:
        """From counts."""
        return cls(layer, tally.recall, tally.precision, tally.computed_share, tally.active_share)


@dataclass(frozen=True, slots=True)
class PointResult:
    """One operating point. `cost` is the relative loss of perplexity against ``dense``.

    Recall, precision and shares are of all layers together, over all tokens run; None where nothing is left out by
    rule (``dense`` and ``exact``).
    """

    selector: str
    setting: str
    perplexity: float
    cost: float
    recall: float | None
    precision: float | None
    computed_share: float
    active_share: float | None
    layers: tuple[LayerResult, ...]

    @property
    def label(self) -> str:
        """Name for people."""
        return f"{self.selector} {self.setting}".strip()


@dataclass(frozen=True, slots=True)
class WindowResult:
    """A simulated neuron window, all layers together.

    `rule` is ``paper`` (the last k tokens; `size` is k), ``lru`` or ``frequency`` (`size` is the capacity as a share of
    all neurons). `held_share` is what it holds on average, `missing_share` what a token loads: shares, too.
    """

    rule: str
    size: float
    hit_rate: float
    held_share: float
    missing_share: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All that was measured. `windows` are simulated on what the point `simulated` computed for the first tokens.

    `residents` is the encoding that resident matrices were held in, or ``stored``.
    """

    model: str
    residents: str
    text: str
    n_tokens: int
    n_scored_tokens: int
    window: int
    stride: int
    points: tuple[PointResult, ...]
    simulated: str | None
    n_simulated_tokens: int
    windows: tuple[WindowResult, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)
