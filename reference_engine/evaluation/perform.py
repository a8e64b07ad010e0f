"""Running a text at every operating point. Knows: the order of the steps. Does not know: what the points compute."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import flashfmt
from flashfmt.errors import PromptError
from reference_engine.engine import EngineOptions
from reference_engine.evaluation.points import check_names, default_selectors, operating_points
from reference_engine.evaluation.results import Evaluation, LayerResult, PointResult, WindowResult
from reference_engine.evaluation.window_simulation import simulate_windows
from reference_engine.observation import ObservedModel
from reference_engine.operating_points import ActiveSets, Mask, Masking, OperatingPoint, total
from reference_engine.perplexity import Score, TextWindow, score_text, text_windows
from reference_engine.step_progress import StepProgress
from reference_engine.token_text import TokenText, read_texts
from reference_engine.tokenizer import Tokenizer, load_tokenizer
from reference_engine.value_cuts import ValueSample

_WINDOW_TOKENS: Final = 1024
_SAMPLED_TOKENS: Final = 1024


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """How to evaluate.

    Parameters
    ----------
    selectors : names (`reference_engine.evaluation.points`); none stands for what is worth comparing in the model.
    window, stride : tokens of a window and from one to the next. None: the model's context, at most 1024; half of that.
    n_tokens : most tokens of text to run.
    last_share : run only the last part of the text, such as the one that a calibration held out.
    simulated_tokens : tokens whose sets are fed to simulated neuron windows, at most one window; 0 for none.
    k_tokens, capacities : sizes of the simulated windows: tokens, shares of all neurons.
    """

    selectors: tuple[str, ...] = ()
    window: int | None = None
    stride: int | None = None
    n_tokens: int | None = 8192
    last_share: float | None = None
    simulated_tokens: int = 1024
    k_tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    capacities: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
    seed: int = 0


def evaluate(
    model: str | os.PathLike[str],
    texts: Sequence[str | os.PathLike[str]],
    *,
    options: EvaluationOptions | None = None,
    engine: EngineOptions | None = None,
    progress: StepProgress | None = None,
) -> Evaluation:
    """Measure perplexity, recall, precision and shares of a model at several operating points.

    Neuron windows are simulated on the sets of the file's own predictors where they are among the points, else on those
    of the first point that leaves something out.

    Parameters
    ----------
    texts : UTF-8 files.
    engine : memory ceiling and backend of the runs; its context is ignored.

    Raises
    ------
    ValueError
        If a selector's name or the stride means nothing.
    PromptError
        If the text is too short, or a selector does not go with the model.
    FlashError
        If the model cannot be used.
    """
    options = options or EvaluationOptions()
    check_names(options.selectors)
    report = progress or (lambda *_: None)
    with flashfmt.open(model) as opened:
        names = options.selectors or default_selectors(opened)
        window = min(options.window or _WINDOW_TOKENS, opened.decoder.context_tokens)
    stride = options.stride or max(1, window // 2)
    tokenizers: list[Tokenizer] = []
    engine = replace(engine or EngineOptions(), context_tokens=window)
    with ObservedModel(
        Path(model), engine, loaded_before_plan=lambda opened: tokenizers.append(load_tokenizer(opened))
    ) as observed:
        text = read_texts([Path(part) for part in texts], tokenizers[0])
        if options.last_share is not None:
            text = text.last(options.last_share)
        text = text.first(options.n_tokens)
        windows = text_windows(len(text.token_ids), window=window, stride=stride)
        if not windows:
            raise PromptError("the text is too short to score", expected="at least 2 tokens")
        return _Run(observed, text, windows, options, report).perform(names, window, stride)


class _Run:
    """One evaluation."""

    def __init__(
        self,
        model: ObservedModel,
        text: TokenText,
        windows: Sequence[TextWindow],
        options: EvaluationOptions,
        progress: StepProgress,
    ) -> None:
        self._model = model
        self._text = text
        self._windows = windows
        self._options = options
        self._progress = progress
        self._values: ValueSample | None = None
        self._sets: ActiveSets | None = None
        self._simulated: OperatingPoint | None = None

    def perform(self, names: Sequence[str], window: int, stride: int) -> Evaluation:
        """All steps."""
        dense = self._score("dense", None)
        points: list[PointResult] = []
        for name in names:
            if name == "exact":
                points.append(_everything("exact", dense, dense))
                continue
            points += [self._run(point, dense) for point in operating_points(self._model, name, self._sample)]
        layers = [] if self._sets is None else [self._sets.layer(i) for i in range(self._sets.n_layers)]
        self._progress("simulating neuron windows", 0, 1)
        return Evaluation(
            model=self._model.model.manifest.name,
            residents=self._model.residents,
            text=self._text.name,
            n_tokens=len(self._text.token_ids),
            n_scored_tokens=dense.n_tokens,
            window=window,
            stride=stride,
            points=tuple(points),
            simulated=None if self._simulated is None else self._simulated.label,
            n_simulated_tokens=len(layers[0]) if layers else 0,
            windows=self._simulate(layers),
        )

    def _simulate(self, layers: Sequence[Mask]) -> tuple[WindowResult, ...]:
        if not layers:
            return ()
        stored = [self._model.model.statistics(layer) for layer in range(len(layers))]
        return simulate_windows(
            layers,
            k_tokens=self._options.k_tokens,
            capacities=self._options.capacities,
            aggregated_windows=[s["aggregated_window"] for s in stored if s is not None] or None,
        )

    def _run(self, point: OperatingPoint, dense: Score) -> PointResult:
        d = self._model.model.decoder
        sets = self._new_sets(point)
        masking = Masking(point, d.ffn.d_ff, d.ffn.activation, sets)
        score = self._score(point.label, masking)
        if sets is not None:
            self._sets, self._simulated = sets, point
        if point.selector == "dense":
            return _everything("dense", score, dense)
        tally = total(masking.tallies)
        return PointResult(
            selector=point.selector,
            setting=point.setting,
            perplexity=score.perplexity,
            cost=score.perplexity / dense.perplexity - 1,
            recall=tally.recall,
            precision=tally.precision,
            computed_share=tally.computed_share,
            active_share=tally.active_share,
            layers=tuple(LayerResult.of(layer, tally) for layer, tally in enumerate(masking.tallies)),
        )

    def _new_sets(self, point: OperatingPoint) -> ActiveSets | None:
        """Where to keep the sets of a point that windows are to be simulated on."""
        is_first = self._simulated is None
        is_better = point.label == "file" and self._simulated is not None
        if self._options.simulated_tokens < 1 or point.selector == "dense" or not (is_first or is_better):
            return None
        d = self._model.model.decoder
        n_tokens = min(self._options.simulated_tokens, self._windows[0].last)
        return ActiveSets(d.n_layers, d.ffn.d_ff, n_tokens)

    def _score(self, what: str, masking: Masking | None) -> Score:
        n_run = sum(window.last - window.first for window in self._windows)
        done = 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            self._progress(what, done, n_run)

        return score_text(self._model.watched(masking), self._text.token_ids, self._windows, advance)

    def _sample(self) -> ValueSample:
        """Values of the first tokens, for cuts by share."""
        if self._values is None:
            d = self._model.model.decoder
            self._values = ValueSample(d.n_layers, d.ffn.d_ff, d.ffn.activation, self._options.seed)
            window = self._windows[0]
            self._model.run(self._text.token_ids[: min(_SAMPLED_TOKENS, window.last)], self._values)
        return self._values


def _everything(name: str, score: Score, dense: Score) -> PointResult:
    """A point at which nothing is left out."""
    cost = score.perplexity / dense.perplexity - 1
    return PointResult(name, "", score.perplexity, cost, None, None, 1.0, None, ())
