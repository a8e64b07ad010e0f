"""A benchmark from request to report: files, activity, prompt, then one run or the rows of an ablation.

Knows: the order of these steps. Does not know: options of a command, how anything is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import flashfmt
from flashfmt import Decoder
from flashfmt.encodings import Encoding
from reference_engine.bench.ablation import ROWS, WARM_UP_TOKENS, RowName, RowSpec, Subjects, run_row
from reference_engine.bench.activity import PUBLISHED, SyntheticActivity, fit
from reference_engine.bench.floor import Machine, dense_floor, sparse_floor
from reference_engine.bench.machine_description import describe_machine
from reference_engine.bench.replay import replaying
from reference_engine.bench.results import AblationRow, ActivityReport, Floor, Report, RunResult
from reference_engine.bench.single import Effort, measure_engine, prompt_ids, with_room
from reference_engine.bench.synthetic_files import SyntheticFiles
from reference_engine.engine import EngineOptions
from reference_engine.machine import usable_cores
from reference_engine.neuron_window import WindowChoice
from reference_engine.residents import resident_matrices
from reference_engine.selectors import SelectorChoice
from reference_engine.sizes import format_size
from reference_engine.sparse_mode import SparseOptions
from reference_engine.step_progress import StepProgress

_MIN_ACTIVITY_TOKENS: Final = 64
_MAX_ACTIVITY_TOKENS: Final = 512


@dataclass(frozen=True, slots=True)
class Ceiling:
    """A memory ceiling: `nbytes`, or a `share` of the model's own bytes; automatic with neither."""

    nbytes: int | None = None
    share: float | None = None

    def of(self, model_bytes: int) -> int | None:
        """Bytes for a model of this size."""
        return self.nbytes if self.share is None else int(self.share * model_bytes)


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be measured.

    Parameters
    ----------
    options : of the engine; `memory` and `context_tokens` are filled in. `sparse` None selects no neurons, or by
        activity.
    window : which bundles stay, where activity is replayed, and in the rows of an ablation that are not the paper's.
    n_tokens, seconds, n_sequences : see `Effort`.
    rows : of an ablation; None measures one run.
    with_activity : replay synthetic activity.
    floor_seconds : measure what the machine allows, so long for each way to read; None to leave it.
    """

    options: EngineOptions
    ceiling: Ceiling
    window: WindowChoice
    prompt_tokens: int
    n_tokens: int
    seconds: float
    n_sequences: int = 1
    text: Path | None = None
    rows: Sequence[RowName] | None = None
    with_activity: bool = False
    floor_seconds: float | None = None
    seed: int = 0

    @property
    def effort(self) -> Effort:
        """How much of it."""
        return Effort(self.n_tokens, self.seconds, self.n_sequences)


def perform(request: Request, source: Path | SyntheticFiles, encoding: Encoding, progress: StepProgress) -> Report:
    """Measure what is asked for.

    Parameters
    ----------
    source : a model; or files of a synthetic one, of which the one in `encoding` is the model.

    Raises
    ------
    BudgetError
        If the ceiling is below the floor.
    FlashError
        If a file cannot be made or read, or the request does not go with the model.
    """
    path = source if isinstance(source, Path) else source.path(encoding)
    with flashfmt.open(path) as model:
        decoder, manifest, model_bytes = model.decoder, model.manifest, model.nbytes
        stored_residents = frozenset(info.encoding for info in resident_matrices(model))
    prompt = prompt_ids(path, request.prompt_tokens, text=request.text, seed=request.seed)
    n_fed = len(prompt) + request.n_tokens + (0 if request.rows is None else WARM_UP_TOKENS)
    memory = request.ceiling.of(model_bytes)
    options = with_room(path, dataclasses.replace(request.options, memory=memory), n_fed)
    activity = _activity(request, decoder, n_fed) if request.with_activity else None
    selector = SelectorChoice("file" if manifest.predictors or activity is None else "all")
    machine = None
    if request.floor_seconds is not None:
        machine = Machine(options.n_threads or usable_cores(), request.floor_seconds)
    report = Report(
        machine=describe_machine(path),
        settings=_settings(request, options),
        model=manifest.name,
        model_bytes=model_bytes,
        is_synthetic=manifest.provenance.source_format == "synthetic",
        activity=None if activity is None else ActivityReport(PUBLISHED, activity.statistics(PUBLISHED.window_tokens)),
    )
    if request.rows is None:
        if activity is not None:
            sparse = SparseOptions(selector, window=request.window, substitute=replaying(activity))
            options = dataclasses.replace(options, sparse=sparse)
        run, floor = _single(path, options, prompt, request.effort, machine=machine, progress=progress)
        return dataclasses.replace(report, run=run, floor=floor)
    asked = options.sparse or SparseOptions(selector)
    subjects = Subjects(
        path=lambda wanted: path if wanted is None or isinstance(source, Path) else source.path(wanted),
        encodings=() if isinstance(source, Path) else tuple(Encoding),
        selector=asked.selector,
        prefetch=asked.prefetch,
        activity=activity,
        stored_residents=stored_residents,
    )
    wanted = [spec for spec in ROWS if spec.name in request.rows]
    rows = tuple(
        run_row(
            spec,
            subjects,
            dataclasses.replace(options, sparse=None),
            prompt,
            request.effort,
            window=request.window,
            machine=machine,
            report=progress,
        )
        for spec in wanted
        if subjects.why_not(spec) is None
    )
    if machine is not None:
        bandwidth = machine.memory_bandwidth()
        rows = tuple(_with_memory(row, bandwidth) for row in rows)
    notes = (*_left_out(wanted, subjects), *_without_window(rows))
    return dataclasses.replace(report, rows=rows, notes=notes)


def _activity(request: Request, decoder: Decoder, n_tokens: int) -> SyntheticActivity:
    """Activity for sequences of `n_tokens`, enough of it to tell its statistics."""
    n_drawn = min(max(n_tokens * request.n_sequences, _MIN_ACTIVITY_TOKENS), _MAX_ACTIVITY_TOKENS)
    return SyntheticActivity(fit(PUBLISHED), decoder.n_layers, decoder.ffn.d_ff, n_drawn, request.seed)


def _with_memory(row: AblationRow, bandwidth: float) -> AblationRow:
    """`row` with the bandwidth of memory that was the best in all of the run."""
    if row.floor is None:
        return row
    return dataclasses.replace(row, floor=dataclasses.replace(row.floor, memory_bandwidth=bandwidth))


def _left_out(wanted: Sequence[RowSpec], subjects: Subjects) -> Iterator[str]:
    for spec in wanted:
        reason = subjects.why_not(spec)
        if reason is not None:
            yield f"left out: {spec.label}: {reason}"


def _without_window(rows: Sequence[AblationRow]) -> Iterator[str]:
    starved = [(row.name, row.held_share) for row in rows if row.held_share is not None and row.has_no_window]
    if starved:
        shares = [share for _, share in starved]
        yield (
            f"in the rows {', '.join(name for name, _ in starved)} the ceiling leaves slots for {min(shares):.1%} to "
            f"{max(shares):.1%} of the neurons, fewer than a token uses, so that no window can be held: give more "
            "memory, or --residents q8"
        )


def _single(
    path: Path,
    options: EngineOptions,
    prompt: Sequence[int],
    effort: Effort,
    *,
    machine: Machine | None,
    progress: StepProgress,
) -> tuple[RunResult, Floor | None]:
    run = measure_engine(path, options, prompt, effort, label="decoding", report=progress)
    if machine is None:
        return run, None
    with flashfmt.open(path) as model:
        if options.sparse is not None:
            return run, sparse_floor(machine, model, run, options, options.sparse.selector)
        streamed = run.plan["streamed_bytes_per_token"]
        return run, dense_floor(machine, model, run, options, read_bytes=streamed)


def _settings(request: Request, options: EngineOptions) -> dict[str, Any]:
    """What was asked for, for the report."""
    window = f"{request.window.rule} {request.window.n_tokens or ''}".strip()
    if request.rows is not None:
        how = "rows of an ablation"
    elif request.with_activity:
        how = f"synthetic activity, window {window}"
    elif options.sparse is not None:
        how = f"selector {options.sparse.selector.kind}, window {window}"
    else:
        how = "exact: all neurons"
    ceiling = "" if options.memory is None else f"ceiling {format_size(options.memory)}, "
    return {
        "summary": f"{ceiling}{how}",
        "memory_bytes": options.memory,
        "memory_share": request.ceiling.share,
        "context_tokens": options.context_tokens,
        "kv": options.kv_type,
        "backend": options.backend,
        "n_threads": options.n_threads,
        "verify": options.verify,
        "device": options.device,
        "window": window,
        "prompt_tokens": request.prompt_tokens,
        "n_tokens": request.n_tokens,
        "seconds": request.seconds,
        "n_sequences": request.n_sequences,
        "text": None if request.text is None else request.text.name,
        "seed": request.seed,
    }
