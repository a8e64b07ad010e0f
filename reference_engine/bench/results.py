"""What a benchmark found, as plain values, and the arithmetic on them. Seconds, bytes, shares of 1."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from reference_engine.bench.activity import ActivityStatistics
from reference_engine.bench.decoding import SECONDS, Costs

REPORT_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class RunResult:
    """One setting, measured over one or more sequences.

    Attributes
    ----------
    first_token_seconds : of each sequence.
    token_seconds : of every measured token behind the first ones, sequence after sequence.
    costs : of these tokens in all.
    peak_memory_bytes : most that the process held.
    plan : the memory plan; empty where there is none.
    """

    prompt_tokens: int
    first_token_seconds: tuple[float, ...]
    token_seconds: tuple[float, ...]
    costs: Costs
    peak_memory_bytes: int
    plan: dict[str, Any]

    @property
    def n_tokens(self) -> int:
        """Tokens measured."""
        return len(self.token_seconds)

    @property
    def seconds_per_token(self) -> float:
        """Mean latency."""
        return sum(self.token_seconds) / self.n_tokens

    @property
    def bytes_per_token(self) -> float:
        """Flash bytes read for each token."""
        return self.costs.bytes_read / self.n_tokens

    @property
    def requests_per_token(self) -> float:
        """Read requests for each token."""
        return self.costs.n_requests / self.n_tokens

    @property
    def hit_rate(self) -> float | None:
        """Share of the active neurons that were held already; None where no neurons are selected."""
        return self.costs.n_hits / self.costs.n_active if self.costs.n_active else None

    def percentile(self, percent: float) -> float:
        """Latency that so many of a hundred tokens stay below."""
        return float(np.percentile(self.token_seconds, percent))

    def split(self) -> dict[str, float]:
        """Seconds of a token by what they went into; ``rest`` is attention, norms, logits, FFNs held whole, Python."""
        parts = {name: getattr(self.costs, name) / self.n_tokens for name in SECONDS}
        return {**parts, "rest": self.seconds_per_token - sum(parts.values())}

    def as_dict(self) -> dict[str, Any]:
        """Figures for programs."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "n_tokens": self.n_tokens,
            "n_sequences": len(self.first_token_seconds),
            "tokens_per_second": 1 / self.seconds_per_token,
            "seconds_per_token": self.seconds_per_token,
            "p50_seconds": self.percentile(50),
            "p99_seconds": self.percentile(99),
            "first_token_seconds": float(np.median(self.first_token_seconds)),
            "bytes_per_token": self.bytes_per_token,
            "requests_per_token": self.requests_per_token,
            "hit_rate": self.hit_rate,
            "active_per_token": self.costs.n_active / self.n_tokens,
            "missing_per_token": self.costs.n_missing / self.n_tokens,
            "peak_memory_bytes": self.peak_memory_bytes,
            "split_seconds": self.split(),
            "token_seconds": list(self.token_seconds),
            "plan": self.plan,
        }


@dataclass(frozen=True, slots=True)
class Floor:
    """The least that a token could take on this machine, by what it reads and what it touches.

    Attributes
    ----------
    read_bytes : that a token has to read from flash.
    read_bandwidth : bytes a second of the device at requests of `request_bytes`, `pattern` of them.
    memory_bytes : weights and cached values that a token touches once.
    memory_bandwidth : bytes a second of plain reading from memory.
    """

    read_bytes: float
    request_bytes: int
    pattern: str
    read_bandwidth: float
    memory_bytes: float
    memory_bandwidth: float

    @property
    def read_seconds(self) -> float:
        """Of reading alone."""
        return self.read_bytes / self.read_bandwidth

    @property
    def memory_seconds(self) -> float:
        """Of touching memory alone."""
        return self.memory_bytes / self.memory_bandwidth

    @property
    def seconds(self) -> float:
        """With perfect overlap: the longer of the two."""
        return max(self.read_seconds, self.memory_seconds)

    def as_dict(self, seconds_per_token: float) -> dict[str, Any]:
        """Figures for programs, and how often the floor fits into what was measured."""
        return {
            **asdict(self),
            "read_seconds": self.read_seconds,
            "memory_seconds": self.memory_seconds,
            "floor_seconds": self.seconds,
            "measured_over_floor": seconds_per_token / self.seconds,
        }


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """A row of the paper's table 2: OPT-6.7B, 16 bits, Apple M1 Max. Its first two rows are computed, not run."""

    dram_gb: float
    transferred_gb: float
    gb_per_second: float
    io_ms: float


@dataclass(frozen=True, slots=True)
class AblationRow:
    """One row of an ablation.

    Attributes
    ----------
    kept_bytes : weights that stay in memory from token to token; computed from what the engine holds.
    keeps : whether bundles stay from token to token.
    waits : whether all reads are waited for before anything is computed with, so that reading has a time of its own.
    model_bytes, n_neurons : size of the file, and neurons of all its layers.
    """

    name: str
    label: str
    encoding: str
    model_bytes: int
    n_neurons: int
    kept_bytes: int
    keeps: bool
    waits: bool
    n_warm_up: int
    run: RunResult
    published: PublishedRow | None
    floor: Floor | None = None

    @property
    def held_share(self) -> float | None:
        """Share of the neurons that there are slots for; None where none are kept."""
        share: float | None = self.run.plan.get("held_share") if self.keeps else None
        return share

    @property
    def has_no_window(self) -> bool:
        """Whether there are fewer slots than neurons that a token uses."""
        n_active = self.run.costs.n_active / self.run.n_tokens
        return self.held_share is not None and self.held_share * self.n_neurons < n_active

    @property
    def io_seconds(self) -> float:
        """Seconds of a token in which computing stood still for reading."""
        split = self.run.split()
        return split["issue"] + split["wait"]

    @property
    def upkeep_seconds(self) -> float:
        """Seconds of a token for keeping windows and caches."""
        return self.run.split()["upkeep"]

    @property
    def compute_seconds(self) -> float:
        """All other seconds of a token."""
        return self.run.seconds_per_token - self.io_seconds - self.upkeep_seconds

    @property
    def bytes_per_second(self) -> float | None:
        """Speed of reading; None where reading has no time of its own."""
        return self.run.bytes_per_token / self.io_seconds if self.waits and self.io_seconds > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """Figures for programs."""
        return {
            "name": self.name,
            "label": self.label,
            "encoding": self.encoding,
            "model_bytes": self.model_bytes,
            "kept_bytes": self.kept_bytes,
            "held_share": self.held_share,
            "bytes_per_token": self.run.bytes_per_token,
            "requests_per_token": self.run.requests_per_token,
            "bytes_per_second": self.bytes_per_second,
            "io_seconds": self.io_seconds,
            "upkeep_seconds": self.upkeep_seconds,
            "compute_seconds": self.compute_seconds,
            "seconds_per_token": self.run.seconds_per_token,
            "n_warm_up": self.n_warm_up,
            "run": self.run.as_dict(),
            "published": None if self.published is None else asdict(self.published),
            "floor": None if self.floor is None else self.floor.as_dict(self.run.seconds_per_token),
        }


@dataclass(frozen=True, slots=True)
class ActivityReport:
    """What synthetic activity was to look like, and what it does look like."""

    published: ActivityStatistics
    achieved: ActivityStatistics


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that one call of the benchmark found; a single `run`, or `rows` of an ablation.

    Attributes
    ----------
    machine, settings : what it ran on, and what was asked for.
    model, model_bytes : name and size of the file.
    is_synthetic : whether the weights are random.
    activity : None where neurons are selected by looking, or not at all.
    notes : what a reader of the rows should know: which are missing, and why.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    model: str
    model_bytes: int
    is_synthetic: bool
    activity: ActivityReport | None
    run: RunResult | None = None
    floor: Floor | None = None
    rows: tuple[AblationRow, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        found: dict[str, Any] = {
            "flashfmt_bench": REPORT_VERSION,
            "machine": self.machine,
            "settings": self.settings,
            "model": {"name": self.model, "bytes": self.model_bytes, "synthetic_weights": self.is_synthetic},
            "synthetic_activity": None if self.activity is None else asdict(self.activity),
        }
        if self.run is not None:
            found["run"] = self.run.as_dict()
            floor = self.floor
            found["floor"] = None if floor is None else floor.as_dict(self.run.seconds_per_token)
        if self.rows:
            found["rows"] = [row.as_dict() for row in self.rows]
            found["notes"] = list(self.notes)
        return found
