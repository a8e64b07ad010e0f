"""One setting measured: an engine is loaded, fed a prompt, and decodes, once or several times."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import flashfmt
from flashfmt.errors import PromptError
from reference_engine.bench.bundle_readers import Clock, timed
from reference_engine.bench.decoding import Costs, Decode, EngineSubject, Subject, decode
from reference_engine.bench.results import RunResult
from reference_engine.engine import Engine, EngineOptions
from reference_engine.machine import forget_peak, peak_resident_nbytes, trim_heap
from reference_engine.sparse_mode import bundle_opener
from reference_engine.step_progress import StepProgress
from reference_engine.token_text import read_texts
from reference_engine.tokenizer import load_tokenizer

Look = Callable[[Engine, RunResult], object]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured.

    Parameters
    ----------
    n_tokens, seconds : of each sequence; what is reached first ends it, but not before two tokens.
    n_sequences : one after the other; what is in memory stays.
    n_warm_up : tokens behind the first that are not measured, in the first sequence.
    """

    n_tokens: int
    seconds: float
    n_sequences: int = 1
    n_warm_up: int = 0


def prompt_ids(path: Path, n_tokens: int, *, text: Path | None, seed: int) -> list[int]:
    """At most `n_tokens` token ids: the beginning of a text file, or random ones without.

    Raises
    ------
    FlashError
        If the text cannot be read, or there is no tokenizer for it.
    """
    with flashfmt.open(path) as model:
        if text is None:
            ids = np.random.default_rng(seed).integers(0, model.decoder.vocab_size, n_tokens)
            return [int(i) for i in ids]
        return list(read_texts([text], load_tokenizer(model)).token_ids[:n_tokens])


def with_room(path: Path, options: EngineOptions, n_tokens: int) -> EngineOptions:
    """`options` with a context for `n_tokens`, where they do not say another one.

    Raises
    ------
    PromptError
        If the model, or the context asked for, has no room for so many.
    """
    with flashfmt.open(path) as model:
        most = options.context_tokens or model.decoder.context_tokens
    if n_tokens > most:
        raise PromptError("prompt and tokens do not fit in the context", expected=f"at most {most}", actual=n_tokens)
    return dataclasses.replace(options, context_tokens=options.context_tokens or n_tokens)


def with_clock(path: Path, options: EngineOptions, clock: Clock) -> EngineOptions:
    """`options` with readers that tell how long beginning reads took; as they are where a device does the reading."""
    sparse = options.sparse
    if sparse is None or options.device != "cpu":
        return options
    opener = sparse.open_reader
    if opener is None:
        with flashfmt.open(path) as model:
            opener = bundle_opener(model)
    return dataclasses.replace(options, sparse=dataclasses.replace(sparse, open_reader=timed(opener, clock)))


def measure_engine(
    path: Path,
    options: EngineOptions,
    prompt: Sequence[int],
    effort: Effort,
    *,
    label: str,
    report: StepProgress,
    look: Look = lambda engine, result: None,
) -> RunResult:
    """Load an engine and measure it.

    Parameters
    ----------
    label : for the progress.
    look : called with engine and result before the engine is closed.

    Raises
    ------
    BudgetError
        If the ceiling is below the floor.
    FlashError
        If the model cannot be read, or the prompt does not fit.
    """
    settle()
    clock = Clock()
    with Engine(path, with_clock(path, options, clock)) as engine:
        loaded, total = 0, engine.load_nbytes

        def progress(n: int) -> None:
            nonlocal loaded
            loaded += n
            report(f"loading {label}", loaded, total)

        engine.load(progress)
        result = measure_subject(
            EngineSubject(engine, clock), prompt, effort, plan=engine.plan.as_dict(), label=label, report=report
        )
        look(engine, result)
    return result


def measure_subject(
    subject: Subject,
    prompt: Sequence[int],
    effort: Effort,
    *,
    plan: Mapping[str, object],
    label: str,
    report: StepProgress,
) -> RunResult:
    """Measure what is loaded already."""
    total = effort.n_sequences * effort.n_tokens

    def sequence(number: int) -> Decode:
        return decode(
            subject,
            prompt,
            n_tokens=effort.n_tokens,
            seconds=effort.seconds,
            n_warm_up=effort.n_warm_up if number == 0 else 0,
            progress=lambda n: report(label, number * effort.n_tokens + n, total),
        )

    sequences = [sequence(number) for number in range(effort.n_sequences)]
    return RunResult(
        prompt_tokens=len(prompt),
        first_token_seconds=tuple(sequence.first_token_seconds for sequence in sequences),
        token_seconds=tuple(seconds for sequence in sequences for seconds in sequence.token_seconds),
        costs=sum((sequence.costs for sequence in sequences), Costs()),
        peak_memory_bytes=peak_resident_nbytes(),
        plan=dict(plan),
    )


def settle() -> None:
    """Release what earlier runs have left, so that memory is measured anew."""
    gc.collect()
    trim_heap()
    forget_peak()
