"""The steps of a calibration, in order (see the package).

Knows: which step needs what. Does not know: how any step is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

import flashfmt
from flashfmt import FlashModel
from flashfmt.errors import FlashError, FlashWriteError, PromptError
from flashfmt.manifest import InputTap, Measured, Statistics
from reference_engine.calibration.activity import ActivityStatistics
from reference_engine.calibration.choosing import (
    Choice,
    choose_gate_cuts,
    choose_gate_encoding,
    choose_gate_share,
    choose_low_rank,
    fit_layers,
    measure,
)
from reference_engine.calibration.costs import PerplexityRuns
from reference_engine.calibration.division import Division, Ranges, divide, located, n_tokens_of
from reference_engine.calibration.options import CalibrationOptions, CalibrationReport, KindChoice
from reference_engine.calibration.output import write_calibrated
from reference_engine.calibration.recording import record_text
from reference_engine.calibration.scratch import Scratch, Section
from reference_engine.engine import PREFILL_TOKENS, EngineOptions
from reference_engine.fitted_predictor import FittedPredictor
from reference_engine.observation import NONZERO, Cut, ObservedModel
from reference_engine.step_progress import StepProgress
from reference_engine.token_text import TokenText, read_texts
from reference_engine.tokenizer import Tokenizer, load_tokenizer
from reference_engine.value_cuts import SPARSE_ACTIVATIONS, ValueSample, natural_cut

F32 = npt.NDArray[np.float32]

_WINDOW_TOKENS: Final = 512
_SAMPLED_TOKENS: Final = 2048
_MAX_NAME: Final = 400


def calibrate(
    model: str | os.PathLike[str],
    texts: Sequence[str | os.PathLike[str]] | TokenText,
    target: str | os.PathLike[str],
    *,
    options: CalibrationOptions | None = None,
    engine: EngineOptions | None = None,
    overwrite: bool = False,
    keep_scratch: bool = False,
    progress: StepProgress | None = None,
) -> CalibrationReport:
    """Write a copy of a model with predictors and statistics, fitted to and measured on a text.

    An interrupted call leaves ``<target>.calibration``; the same call goes on from there. The last part of the text is
    never fitted to: it is what predictors are measured on and statistics are made of (rule FF-WR-3).

    Parameters
    ----------
    model : a flash file or directory with a tokenizer.
    texts : UTF-8 files, or a text in the model's tokens.
    engine : memory ceiling and backend of the model's runs; the ceiling does not cover the fit. Its context is ignored.
    keep_scratch : leave the recorded activations on disk.

    Raises
    ------
    PromptError
        If the text is too short, or the options do not suit the model.
    FlashWriteError
        If the target exists and `overwrite` is false, or something cannot be written.
    FlashError
        If the model cannot be used.
    """
    options = options or CalibrationOptions()
    path = Path(target)
    if path.exists() and not overwrite:
        raise FlashWriteError("exists already", path=path)
    with flashfmt.open(model) as opened:
        kind = _check(opened, options)
        window = _window(opened, options)
    options = replace(options, kind=kind)
    tokenizers: list[Tokenizer] = []
    engine = replace(engine or EngineOptions(), context_tokens=window)
    with ObservedModel(
        Path(model), engine, loaded_before_plan=lambda opened: tokenizers.append(load_tokenizer(opened))
    ) as observed:
        text = texts if isinstance(texts, TokenText) else read_texts([Path(part) for part in texts], tokenizers[0])
        text = text.first(options.n_tokens)
        report = progress or (lambda *_: None)
        run = _Run(observed, text, options, window=window, target=path, progress=report)
        return run.perform(overwrite=overwrite, keep_scratch=keep_scratch)


class _Run:
    """One calibration."""

    def __init__(
        self,
        model: ObservedModel,
        text: TokenText,
        options: CalibrationOptions,
        *,
        window: int,
        target: Path,
        progress: StepProgress,
    ) -> None:
        self._model = model
        self._text = text
        self._options = options
        self._target = target
        self._progress = progress
        self._division: Division = divide(len(text.token_ids), window, options.held_out)
        self._fingerprint = self._identity()
        d = model.model.decoder
        self._taps = [InputTap(layer=max(0, i - options.ahead), point=options.tap) for i in range(d.n_layers)]
        self._held_out: Ranges = ((self._division.held_out, self._division.n_tokens),)
        # gates need no training text: only what choices and measurements are made on is recorded
        every: Ranges = ((0, self._division.n_tokens),)
        self._recorded = every if options.kind == "low_rank" else (*self._division.validation, *self._held_out)
        self._scratch = Scratch(
            target.with_name(target.name + ".calibration"),
            self._fingerprint,
            n_layers=d.n_layers,
            n_tokens=n_tokens_of(self._recorded),
            d_model=d.d_model,
            d_ff=d.ffn.d_ff,
            chunk_tokens=min(PREFILL_TOKENS, window),
        )
        self._runs = PerplexityRuns(model, self._scratch, text.token_ids, window, progress)

    def perform(self, *, overwrite: bool, keep_scratch: bool) -> CalibrationReport:
        """All steps."""
        started = time.monotonic()
        choice = self._choose()
        scores = self._runs.paired("held-out text", self._held_out, "predicted", choice.predictors)
        measured, activity, statistics_tokens = self._measure(choice.predictors, scores.ratio)
        exact, predicted = scores.exact_perplexity, scores.predicted_perplexity
        n_held_out = n_tokens_of(self._held_out)
        statistics = Statistics(
            n_tokens=n_held_out,
            text=f"{self._held_out_name()}; perplexity {exact:.4g}, with predictors {predicted:.4g} "
            f"({100 * (scores.ratio - 1):+.2f} %)",
            window_tokens=statistics_tokens,
        )
        total = sum(p.nbytes for p in measured) + self._model.model.verify_nbytes
        copied = _Counter(lambda done: self._progress("writing", done, max(total, done)))
        write_calibrated(
            self._model.model,
            self._target,
            measured,
            statistics,
            activity,
            fingerprint=self._fingerprint,
            overwrite=overwrite,
            progress=copied.add,
        )
        report = CalibrationReport(
            target=self._target,
            predictors=tuple(p.description for p in measured),
            n_train_tokens=n_tokens_of(self._division.train),
            n_held_out_tokens=n_held_out,
            perplexity=exact,
            predicted_perplexity=predicted,
            predictor_nbytes=sum(p.nbytes for p in measured),
            target_met=choice.target_met,
            seconds=time.monotonic() - started,
            resumed=self._scratch.resumed,
        )
        if not keep_scratch:
            self._scratch.remove()
        return report

    def _choose(self) -> Choice:
        options = self._options
        if options.kind == "low_rank":
            self._record([NONZERO] * len(self._taps))
            fitted_layers = _Counter(lambda n: self._progress("fitting layers", n, len(self._taps)))
            fitted = fit_layers(self._model, self._scratch, self._fit_sections, options, fitted_layers.add)
            return choose_low_rank(fitted, self._taps, options, self._cost)
        sample = None if natural_cut(self._model.model.decoder.ffn.activation) else self._sample()
        if options.target.metric == "perplexity" and sample is not None:
            choice = choose_gate_share(self._model, sample, self._taps, options, self._cost)
            self._record([p.active for p in choice.predictors])
            return choice
        cuts = choose_gate_cuts(self._model, sample, options.active_share)
        self._record(cuts)
        if options.target.metric == "recall":
            return choose_gate_encoding(self._model, cuts, self._taps, self._validation, options.target.value)
        choice = choose_gate_encoding(self._model, cuts, self._taps, self._validation, 0.0)
        return Choice(choice.predictors, self._cost("gate", choice.predictors) <= options.target.value)

    def _sample(self) -> ValueSample:
        """Values of the first tokens that are neither validation nor held out."""
        d = self._model.model.decoder
        sample = ValueSample(d.n_layers, d.ffn.d_ff, d.ffn.activation, self._options.seed)
        window = self._division.window
        starts = [start for first, last in self._division.train for start in range(first, last, window)]
        starts = starts[: -(-_SAMPLED_TOKENS // window)]
        for index, start in enumerate(starts):
            self._model.run(self._text.token_ids[start : start + window], sample)
            self._progress("sampling values", index, len(starts))
        return sample

    def _record(self, cuts: Sequence[Cut]) -> None:
        ids = [token for first, last in self._recorded for token in self._text.token_ids[first:last]]
        counter = _Counter(lambda done: self._progress("recording activity", done, len(ids)))
        record_text(
            self._model,
            self._scratch,
            ids,
            window=self._division.window,
            cuts=cuts,
            point=self._options.tap,
            progress=counter.add,
        )

    def _section(self, layer: int, ranges: Ranges) -> Section:
        return Section(self._scratch, layer, self._taps[layer].layer, located(ranges, self._recorded))

    def _fit_sections(self, layer: int) -> tuple[Section, Section]:
        return self._section(layer, self._division.train), self._validation(layer)

    def _validation(self, layer: int) -> Section:
        return self._section(layer, self._division.validation)

    def _measure(
        self, predictors: Sequence[FittedPredictor], perplexity_ratio: float
    ) -> tuple[list[FittedPredictor], dict[int, tuple[F32, F32]], int]:
        """Predictors with their quality, statistics by layer, and the length of the aggregated window curve."""
        measured: list[FittedPredictor] = []
        activity: dict[int, tuple[F32, F32]] = {}
        window = min(self._options.statistics_window, n_tokens_of(self._held_out))
        for layer, predictor in enumerate(predictors):
            section = self._section(layer, self._held_out)
            tally = measure(predictor, section, self._model.backend)
            quality = Measured(
                recall=tally.recall,
                precision=tally.precision,
                predicted_fraction=tally.computed_share,
                n_tokens=tally.n_tokens,
                text=self._held_out_name(),
                perplexity_ratio=perplexity_ratio,
            )
            measured.append(predictor.with_measured(quality))
            statistics = ActivityStatistics(predictor.n_neurons, window)
            for index in range(section.n_pieces):
                statistics.add(section.piece(index)[1])
            activity[layer] = statistics.firing_frequency(), statistics.aggregated_window()
            self._progress("measuring layers", layer + 1, len(predictors))
        return measured, activity, window

    def _cost(self, name: str, predictors: Sequence[FittedPredictor]) -> float:
        """Relative loss of perplexity to be expected of held-out text at worst, from validation text."""
        scores = self._runs.paired("validation text", self._division.validation, name, predictors)
        return scores.loss_bound(n_tokens_of(self._held_out) // self._division.window)

    def _held_out_name(self) -> str:
        d = self._division
        return f"{self._text.name[:_MAX_NAME]}: tokens {d.held_out} to {d.n_tokens} of {len(self._text.token_ids)}"

    def _identity(self) -> str:
        facts = {
            "model": self._model.model.manifest.metadata_crc32c,
            "text": self._text.sha256,
            "options": asdict(self._options),
            "division": asdict(self._division),
            "writer": flashfmt.__version__,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class _Counter:
    """Adds up steps and reports the sum."""

    def __init__(self, report: Callable[[int], None]) -> None:
        self._report = report
        self._done = 0

    def add(self, n: int) -> None:
        """`n` more are done."""
        self._done += n
        self._report(self._done)


def _check(model: FlashModel, options: CalibrationOptions) -> KindChoice:
    """Refuse options that do not suit the model; returns the kind of predictor."""
    activation = model.decoder.ffn.activation.kind
    sparse = activation in SPARSE_ACTIVATIONS
    kind: KindChoice = options.kind if options.kind != "auto" else "low_rank" if sparse else "low_bit_gate"
    if kind == "low_rank" and not sparse:
        raise PromptError(
            f"low_rank predictors tell zeros from other values, and {activation} gives no zeros; use low_bit_gate",
            path=model.path,
        )
    d = model.decoder
    if options.rank is not None and not 1 <= options.rank <= min(d.d_model, d.ffn.d_ff):
        raise PromptError("no such rank", expected=f"1 to {min(d.d_model, d.ffn.d_ff)}", actual=options.rank)
    if not 0 < options.held_out < 1 or not 0 < options.active_share <= 1 or options.ahead < 0:
        raise FlashError("shares lie between 0 and 1, and predictors read no later layer")
    return kind


def _window(model: FlashModel, options: CalibrationOptions) -> int:
    """Tokens of a window: a multiple of the tokens that are computed together, or less than that."""
    window = min(options.window or _WINDOW_TOKENS, model.decoder.context_tokens)
    if window < 2:
        raise PromptError("no such window", expected="at least 2 tokens", actual=window)
    return window - window % PREFILL_TOKENS if window > PREFILL_TOKENS else window
