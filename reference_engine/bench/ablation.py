"""The rows of the paper's table 2 and what this engine adds: each one truly run, each on top of the one before.

Rows up to bundling wait for every read before they compute, merge no requests but adjacent ones and use the paper's
window; from there on the engine is as it is. All have the same ceiling in bytes, the same prompt and the same activity.

Knows: what tells one row from the next. Does not know: how a decode is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import flashfmt
from flashfmt import FlashModel
from flashfmt.encodings import Encoding
from reference_engine.active_bundles import OpenReader
from reference_engine.bench.activity import SyntheticActivity
from reference_engine.bench.bundle_readers import Clock, timed, unbundled
from reference_engine.bench.decoding import NaiveSubject
from reference_engine.bench.floor import Machine, dense_floor, sparse_floor
from reference_engine.bench.naive import NaiveModel
from reference_engine.bench.nothing_kept import KeepNothing
from reference_engine.bench.replay import replaying
from reference_engine.bench.results import AblationRow, Floor, PublishedRow, RunResult
from reference_engine.bench.single import Effort, measure_engine, measure_subject, settle
from reference_engine.engine import Engine, EngineOptions
from reference_engine.flash_io import load_profile
from reference_engine.neuron_window import WindowChoice
from reference_engine.resident_encoding import ResidentsChoice
from reference_engine.residents import residents_nbytes
from reference_engine.selectors import SelectorChoice, selectors_nbytes
from reference_engine.sparse_bundles import SparseBundles
from reference_engine.sparse_mode import BuildsWindow, SparseOptions, bundle_opener
from reference_engine.step_progress import StepProgress

RowName = Literal[
    "naive",
    "attention",
    "predictor",
    "window",
    "bundling",
    "own_window",
    "overlap",
    "look_ahead",
    "q8",
    "q4",
    "q8_residents",
]
PUBLISHED_MODEL: Final = "opt-6.7b"
PAPER_WINDOW: Final = WindowChoice("paper", 5)
WARM_UP_TOKENS: Final = 48  # until a window has settled, and slots for half of the neurons are full
_FIRST_TOKENS: Final = {"naive": 0, "dense": 0, "sparse": 2}  # without a window: memory is touched for the first time


@dataclass(frozen=True, slots=True)
class RowSpec:
    """What a row does. `encoding` is of the bundles, None for the model's own.

    `residents` says what attention and other resident matrices are held in.
    `published` are the paper's figures for `PUBLISHED_MODEL`.
    `kind`: ``naive`` keeps nothing, ``dense`` keeps all but the FFN and computes all of it, ``sparse`` selects neurons.
    `keeps` says by whose rule bundles stay from token to token: nobody's, the paper's, or the one asked for.
    """

    name: RowName
    label: str
    kind: Literal["naive", "dense", "sparse"] = "sparse"
    keeps: Literal["nothing", "paper", "own"] = "own"
    bundled: bool = True
    waits: bool = False
    ahead: bool = False
    encoding: Encoding | None = None
    residents: ResidentsChoice = "stored"
    published: PublishedRow | None = None


ROWS: Final = (
    RowSpec("naive", "naive: the whole model read for every token", "naive", "nothing", waits=True,
            published=PublishedRow(0.0, 13.4, 6.10, 2196)),
    RowSpec("attention", "+ resident attention: the FFN read for every token", "dense", "nothing", waits=True,
            published=PublishedRow(6.7, 6.7, 6.10, 1090)),
    RowSpec("predictor", "+ predictor: active neurons read, in two requests", "sparse", "nothing", bundled=False,
            waits=True, published=PublishedRow(4.8, 0.9, 1.25, 738)),
    RowSpec("window", "+ window of 5 tokens", "sparse", "paper", bundled=False, waits=True,
            published=PublishedRow(6.5, 0.2, 1.25, 164)),
    RowSpec("bundling", "+ bundling: one request a neuron", "sparse", "paper", waits=True,
            published=PublishedRow(6.5, 0.2, 2.25, 87)),
    RowSpec("own_window", "+ {window} window in all slots", waits=True),
    RowSpec("overlap", "+ overlap: hits computed while misses land"),
    RowSpec("look_ahead", "+ look-ahead: the layer before selects", ahead=True),
    RowSpec("q8", "+ q8 bundles", ahead=True, encoding=Encoding.Q8),
    RowSpec("q4", "+ q4 bundles", ahead=True, encoding=Encoding.Q4),
    RowSpec("q8_residents", "+ q8 residents, re-encoded while loading", ahead=True, encoding=Encoding.Q4,
            residents="q8"),
)  # fmt: skip
ROW_NAMES: Final[tuple[RowName, ...]] = tuple(row.name for row in ROWS)


@dataclass(frozen=True, slots=True)
class Subjects:
    """What the rows are run on.

    Parameters
    ----------
    path : gives the file with bundles in an encoding, None for the model's own.
    encodings : that there are, or can be made, beside the model's own.
    selector, prefetch : of the rows that select neurons.
    activity : replayed in the selector's place; None to let it decide.
    stored_residents : encodings of the resident matrices, as the files have them.
    """

    path: Callable[[Encoding | None], Path]
    encodings: Sequence[Encoding]
    selector: SelectorChoice
    prefetch: SelectorChoice | None
    activity: SyntheticActivity | None
    stored_residents: frozenset[Encoding]

    def why_not(self, spec: RowSpec) -> str | None:
        """Why a row cannot be run on this; None where it can."""
        if spec.encoding is not None and spec.encoding not in self.encodings:
            return "needs the model in another encoding: use --like"
        if spec.residents != "stored" and self.stored_residents <= {Encoding.Q8, Encoding.Q4}:
            return "residents are stored as narrowly"
        if spec.ahead and self.activity is None and self.prefetch is None:
            return "needs --prefetch, such as lowbit:q4@previous"
        return None


def run_row(
    spec: RowSpec,
    subjects: Subjects,
    options: EngineOptions,
    prompt: Sequence[int],
    effort: Effort,
    *,
    window: WindowChoice,
    machine: Machine | None,
    report: StepProgress,
) -> AblationRow:
    """Run one row.

    Parameters
    ----------
    options : of every row; what `spec` decides is put into them.
    window : the engine's own rule.
    machine : measures the floor; None for none.

    Raises
    ------
    BudgetError
        If the ceiling is below the floor.
    FlashError
        If a file cannot be made or read.
    """
    path = subjects.path(spec.encoding)
    label = spec.label.format(window=window.rule)
    settles = spec.keeps != "nothing"
    effort = dataclasses.replace(effort, n_warm_up=WARM_UP_TOKENS if settles else _FIRST_TOKENS[spec.kind])
    with flashfmt.open(path) as model:
        opener = _opener(model, spec)
        kept = 0
        if spec.kind == "naive":
            run = _run_naive(path, opener, options, prompt, effort, label=label, report=report)
        else:
            sparse = _sparse_options(spec, subjects, opener, window)
            slots = 0

            def look(engine: Engine, result: RunResult) -> None:
                nonlocal slots
                if isinstance(engine.sparse, SparseBundles) and settles:
                    slots = engine.sparse.n_held * model.layers[0].geometry.stride

            run = measure_engine(
                path,
                dataclasses.replace(options, sparse=sparse, residents=spec.residents),
                prompt,
                effort,
                label=label,
                report=report,
                look=look,
            )
            residents = residents_nbytes(model, None if spec.residents == "stored" else Encoding(spec.residents))
            kept = residents + slots + sum(selectors_nbytes(model, each) for each in sparse.choices)

        def floor(machine: Machine) -> Floor:
            if spec.kind == "sparse":
                return sparse_floor(machine, model, run, options, subjects.selector)
            return dense_floor(machine, model, run, options, read_bytes=run.bytes_per_token)

        return AblationRow(
            name=spec.name,
            label=label,
            encoding=str(model.layers[0].encoding),
            model_bytes=model.nbytes,
            n_neurons=sum(info.geometry.n_neurons for info in model.layers),
            kept_bytes=kept,
            keeps=settles,
            waits=spec.waits,
            n_warm_up=effort.n_warm_up,
            run=run,
            published=spec.published if PUBLISHED_MODEL in model.manifest.name else None,
            floor=None if machine is None else floor(machine),
        )


def _opener(model: FlashModel, spec: RowSpec) -> OpenReader:
    """Readers as the device likes them, or, up to bundling, such that only adjacent ranges become one request."""
    if spec.keeps == "own":
        return bundle_opener(model)
    info = model.layers[0]
    opener = bundle_opener(model, dataclasses.replace(load_profile(info.extent.path).tuning, gap_bytes=0))
    return opener if spec.bundled else unbundled(opener, len(info.parts))


def _sparse_options(spec: RowSpec, subjects: Subjects, opener: OpenReader, window: BuildsWindow) -> SparseOptions:
    rules: dict[str, BuildsWindow] = {"nothing": KeepNothing(), "paper": PAPER_WINDOW, "own": window}
    if spec.kind == "dense":
        return SparseOptions(
            SelectorChoice("all"), window=rules[spec.keeps], open_reader=opener, overlap=False, preload=False
        )
    activity = subjects.activity
    return SparseOptions(
        subjects.selector,
        prefetch=subjects.prefetch if spec.ahead and activity is None else None,
        window=rules[spec.keeps],
        open_reader=opener,
        overlap=not spec.waits,
        preload=spec.keeps == "own",
        substitute=None if activity is None else replaying(activity, ahead=spec.ahead),
    )


def _run_naive(
    path: Path,
    opener: OpenReader,
    options: EngineOptions,
    prompt: Sequence[int],
    effort: Effort,
    *,
    label: str,
    report: StepProgress,
) -> RunResult:
    settle()
    clock = Clock()
    with closing(NaiveModel(path, options, timed(opener, clock))) as model:
        return measure_subject(NaiveSubject(model, clock), prompt, effort, plan={}, label=label, report=report)
