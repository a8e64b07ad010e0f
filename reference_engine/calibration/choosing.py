"""Choosing predictors on validation text for a target: recall layer by layer, or perplexity of the whole model.

Knows: candidates and the order in which they are tried. Does not know: recording, files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from flashfmt import FlashModel
from flashfmt.encodings import QUANTISED_ROW_MULTIPLE, Encoding
from flashfmt.manifest import InputTap
from reference_engine.backends import Backend
from reference_engine.calibration.options import RANKS, CalibrationOptions
from reference_engine.calibration.scratch import Scratch, Section
from reference_engine.fitted_predictor import FittedPredictor
from reference_engine.neuron_weights import NeuronWeights, WeighedFit
from reference_engine.observation import Cut, ObservedModel
from reference_engine.operating_points import OperatingPoint, Tally
from reference_engine.predictor_training import CutCurve, LowRankFit, TrainingOptions, choose_rank, cut_curve
from reference_engine.training import load_fitter
from reference_engine.value_cuts import ValueSample, natural_cut

RECALLS: Final = tuple(round(1 - 0.5 * 0.8**i, 5) for i in range(31))  # 0.5 to 0.9994
SHARES: Final = tuple(round(0.05 * i, 2) for i in range(2, 20))
_BLOCK_NEURONS: Final = 1024
_RANKING_RECALL: Final = 0.95  # at which ranks are compared where the target is perplexity


@dataclass(frozen=True, slots=True)
class Choice:
    """Predictors of all layers, and whether they reach the target on validation text."""

    predictors: tuple[FittedPredictor, ...]
    target_met: bool


Costs = Callable[[str, Sequence[FittedPredictor]], float]
"""(name of a candidate, its predictors) -> relative loss of perplexity that is not to exceed what is allowed."""


def fit_layers(
    model: ObservedModel,
    scratch: Scratch,
    sections: Callable[[int], tuple[Section, Section]],
    options: CalibrationOptions,
    progress: Callable[[int], None],
) -> list[tuple[WeighedFit, CutCurve]]:
    """Fit a low-rank predictor for each layer, or take up those that an interrupted run has fitted.

    Neurons are weighed by what they add to the layer's output on training text.

    Parameters
    ----------
    sections : training and validation data of a layer.
    progress : called after each layer with 1.
    """
    training = TrainingOptions(epochs=options.epochs, learning_rate=options.learning_rate, seed=options.seed)
    d = model.model.decoder
    largest = min(d.d_model, d.ffn.d_ff)
    ranks = [options.rank] if options.rank is not None else [r for r in RANKS if r < largest] or [largest]
    recall = options.target.value if options.target.metric == "recall" else _RANKING_RECALL
    fitted = []
    for layer, info in enumerate(model.model.layers):
        train, validation = sections(layer)
        weights = neuron_weights(model.model, train)
        name = f"fit-{layer}"
        if scratch.done(name) is None:
            stride = info.geometry.stride
            choice = choose_rank(
                train.in_memory(),
                validation.in_memory(),
                ranks,
                recall=recall,
                bundle_stride=stride,
                options=training,
                fitter=load_fitter(options.fit),
                weigh=weights.apply,
            )
            fit, curve = choice.fit, choice.curve
            scratch.save_arrays(name, {"down": fit.down, "up": fit.up, "bias": fit.bias})
            scratch.finish(name)
        else:
            fit = LowRankFit(**scratch.load_arrays(name))
            curve = cut_curve(weights.apply(fit), validation)
        fitted.append((weights.apply(fit), curve))
        progress(1)
    return fitted


def neuron_weights(model: FlashModel, section: Section) -> NeuronWeights:
    """What the neurons of a recorded layer are worth."""
    bundles, d_ff = model.bundles(section.layer), model.decoder.ffn.d_ff
    norms = np.concatenate(
        [
            np.linalg.norm(bundles.decode(range(first, min(first + _BLOCK_NEURONS, d_ff)))[:, -1], axis=1)
            for first in range(0, d_ff, _BLOCK_NEURONS)
        ]
    )
    n_active = np.zeros(d_ff, np.int64)
    for index in range(section.n_pieces):
        n_active += section.piece(index)[1].sum(axis=0)
    return NeuronWeights.of(n_active, section.sizes() * norms, section.n_tokens)


def choose_low_rank(
    fitted: Sequence[tuple[WeighedFit, CutCurve]], taps: Sequence[InputTap], options: CalibrationOptions, cost: Costs
) -> Choice:
    """Cut the logits of every layer for a recall: the one asked for, or the least that keeps the perplexity."""

    def candidate(recall: float) -> tuple[FittedPredictor, ...]:
        cuts = [curve.cut_for_recall(recall) for _, curve in fitted]
        return tuple(
            FittedPredictor.low_rank(layer, taps[layer], fit.at_cut(cut), cut, options.encoding)
            for layer, ((fit, _), cut) in enumerate(zip(fitted, cuts, strict=True))
        )

    if options.target.metric == "recall":
        predictors = candidate(options.target.value)
        reached = [
            curve.at(curve.cut_for_recall(options.target.value))[0] >= options.target.value for _, curve in fitted
        ]
        return Choice(predictors, all(reached))
    return _cheapest(RECALLS, candidate, "recall", options.target.value, cost)


def choose_gate_cuts(model: ObservedModel, sample: ValueSample | None, share: float) -> list[Cut]:
    """What counts as active in each layer: zero or not where the activation tells, else a share of the neurons.

    Raises
    ------
    ValueError
        If there is no sample where one is needed.
    """
    activation = model.model.decoder.ffn.activation
    natural = natural_cut(activation)
    if natural is not None:
        return [natural] * model.model.decoder.n_layers
    if sample is None:
        raise ValueError("a sample of values is needed")
    return [sample.tested_cut(layer, share) for layer in range(model.model.decoder.n_layers)]


def gates(
    model: ObservedModel, cuts: Sequence[Cut], taps: Sequence[InputTap], encoding: Encoding
) -> tuple[FittedPredictor, ...]:
    """Low-bit gates of all layers."""
    return tuple(
        FittedPredictor.low_bit_gate(model.model, layer, taps[layer], cut, encoding) for layer, cut in enumerate(cuts)
    )


def gate_encodings(d_model: int) -> tuple[Encoding, ...]:
    """Encodings of a low-bit gate from the smallest to the most exact."""
    quantised = (Encoding.Q4, Encoding.Q8) if d_model % QUANTISED_ROW_MULTIPLE == 0 else ()
    return (*quantised, Encoding.F16)


def choose_gate_share(
    model: ObservedModel, sample: ValueSample, taps: Sequence[InputTap], options: CalibrationOptions, cost: Costs
) -> Choice:
    """The smallest share of active neurons that keeps the perplexity, with the smallest gate."""
    encoding = gate_encodings(model.model.decoder.d_model)[0]

    def candidate(share: float) -> tuple[FittedPredictor, ...]:
        return gates(model, choose_gate_cuts(model, sample, share), taps, encoding)

    return _cheapest(SHARES, candidate, "share", options.target.value, cost)


def choose_gate_encoding(
    model: ObservedModel,
    cuts: Sequence[Cut],
    taps: Sequence[InputTap],
    validation: Callable[[int], Section],
    recall: float,
) -> Choice:
    """The smallest gate whose mean recall over layers reaches the target; else the most exact one."""
    choice: Choice | None = None
    for encoding in gate_encodings(model.model.decoder.d_model):
        predictors = gates(model, cuts, taps, encoding)
        tallies = [measure(p, validation(layer), model.backend) for layer, p in enumerate(predictors)]
        choice = Choice(predictors, bool(np.mean([tally.recall for tally in tallies]) >= recall))
        if choice.target_met:
            break
    if choice is None:
        raise ValueError("there is no encoding to try")
    return choice


def measure(predictor: FittedPredictor, section: Section, backend: Backend) -> Tally:
    """Compare what is predicted with what is active."""
    tally = Tally(n_neurons=predictor.n_neurons)
    for index in range(section.n_pieces):
        z, active = section.piece(index)
        predicted: npt.NDArray[np.bool_] = predictor.predict(z, backend)
        tally.add(predicted, active)
        tally.n_tokens += len(z)
    return tally


def operating_point(predictors: Sequence[FittedPredictor], backend: Backend) -> OperatingPoint:
    """Computing what these predictors say, layer by layer."""
    return OperatingPoint("file", "", tuple(predictor.rule(backend) for predictor in predictors))


def _cheapest(
    grid: Sequence[float],
    candidate: Callable[[float], tuple[FittedPredictor, ...]],
    name: str,
    allowed: float,
    cost: Costs,
) -> Choice:
    """The first of an ascending grid whose loss is allowed, by bisection; the last where none is."""
    low, high = 0, len(grid) - 1
    met = False
    while low < high:
        middle = (low + high) // 2
        if cost(f"{name} {grid[middle]:g}", candidate(grid[middle])) <= allowed:
            high, met = middle, True
        else:
            low = middle + 1
    predictors = candidate(grid[low])
    return Choice(predictors, met or cost(f"{name} {grid[low]:g}", predictors) <= allowed)
