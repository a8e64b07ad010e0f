"""Which operating points a selector's name stands for.

The names are those that an engine runs with (`reference_engine.selectors.choice`), each one point: ``file``,
``threshold:0.1``, ``lowbit:q4``, ``oracle``. Further names give cuts by share, made for each layer from a sample of its
values, and several points at once:

====================  ==============================================================================================
``threshold:40%``     cut the activated gate so that about 40 % of the neurons of each layer remain
``oracle:40%``        the same by the exact product that the down projection is multiplied with: the best cut by size
``lowbit:q4:40%``     the same by a low-bit copy of the gate
``threshold``         a few shares, of the neurons that are not zero where the activation gives zeros
``lowbit:q4``         where the activation gives no zeros: a few shares
``file:sweep``        low-rank predictors with other thresholds, from cautious to bold
``dense``             every neuron
``exact``             every neuron, in the engine's exact mode
====================  ==============================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final

from flashfmt import FlashModel
from flashfmt.encodings import Encoding
from flashfmt.errors import PromptError
from flashfmt.manifest import InputTap
from reference_engine.fitted_predictor import FittedPredictor, logit, sigmoid
from reference_engine.observation import NONZERO, Cut, ObservedModel
from reference_engine.operating_points import LayerRule, OperatingPoint
from reference_engine.selectors.choice import SelectorChoice, load_selectors, parse_selector
from reference_engine.value_cuts import ValueSample, natural_cut

SHARES: Final = (0.25, 0.4, 0.5, 0.6, 0.75)
LOGIT_OFFSETS: Final = (-2.0, -1.0, 1.0, 2.0)

_SHARE: Final = re.compile(r"(threshold|oracle|lowbit:q4|lowbit:q8):(\d*\.?\d+)%")

Sample = Callable[[], ValueSample]


def default_selectors(model: FlashModel) -> tuple[str, ...]:
    """What is worth comparing in a model."""
    carried = ("file", "file:sweep") if model.manifest.predictors else ()
    return ("dense", *carried, "oracle", "threshold", *(("lowbit:q4",) if model.decoder.d_model % 64 == 0 else ()))


def check_names(names: Sequence[str]) -> None:
    """Refuse names that mean nothing, before a model is loaded.

    Raises
    ------
    ValueError
        Naming what is known.
    """
    for name in names:
        if name not in ("dense", "exact", "threshold", "file:sweep") and _SHARE.fullmatch(name) is None:
            choice = parse_selector(name)
            if choice.kind == "trace":
                raise ValueError("a recorded trace belongs to the text it was recorded on; it cannot be evaluated")


def operating_points(model: ObservedModel, name: str, sample: Sample) -> list[OperatingPoint]:
    """The points of one name; ``exact`` has none.

    Parameters
    ----------
    sample : makes a sample of values where one is needed.

    Raises
    ------
    PromptError
        If the name does not go with the model.
    """
    n_layers = model.model.decoder.n_layers
    by_share = _SHARE.fullmatch(name)
    if name == "dense":
        return [OperatingPoint("dense", "", (LayerRule(),) * n_layers)]
    if by_share is not None:
        share = float(by_share[2]) / 100
        if not 0 < share <= 1:
            raise PromptError("no such share of the neurons", actual=name)
        return [_by_share(model, by_share[1], share, sample())]
    if name == "file:sweep":
        return _sweep(model)
    natural = natural_cut(model.model.decoder.ffn.activation)
    if name == "threshold" or (name in ("lowbit:q4", "lowbit:q8") and natural is None):
        return [_by_share(model, name, share, sample(), of_nonzero=natural is not None) for share in SHARES]
    return [_as_run(model, name, parse_selector(name))]


def _as_run(model: ObservedModel, name: str, choice: SelectorChoice) -> OperatingPoint:
    """What an engine computes under this name."""
    selector, _, setting = name.partition(":")
    n_layers = model.model.decoder.n_layers
    if choice.kind in ("oracle", "threshold") and choice.tap == "ffn_input":  # no copies of the weights are needed
        threshold = choice.threshold or 0.0
        keep = Cut("h" if choice.kind == "oracle" else "activated", threshold, magnitude=True)
        return OperatingPoint(selector, setting, (LayerRule(keep=keep),) * n_layers)
    tapped = load_selectors(model.model, choice, model.backend)
    rules = tuple(
        LayerRule(_active(model, choice, i), selector=each.selector, tap=each.tap) for i, each in enumerate(tapped)
    )
    return OperatingPoint(selector, setting, rules)


def _active(model: ObservedModel, choice: SelectorChoice, layer: int) -> Cut:
    """What the choice of a selector is measured against."""
    if choice.kind == "file":
        carried = FittedPredictor.from_file(model.model, layer)
        return NONZERO if carried is None else carried.active
    if choice.kind == "lowbit" and choice.threshold is not None:
        sparse = natural_cut(model.model.decoder.ffn.activation) is not None
        return Cut("tested", choice.threshold, magnitude=not sparse)
    return NONZERO


def _by_share(
    model: ObservedModel, name: str, share: float, sample: ValueSample, *, of_nonzero: bool = False
) -> OperatingPoint:
    selector, _, encoding = name.partition(":")
    setting = f"{encoding} {share:.0%}{' of nonzero' if of_nonzero else ''}".strip()
    rules = []
    for layer in range(model.model.decoder.n_layers):
        if selector != "lowbit":
            kept = share * sample.nonzero_share(layer) if of_nonzero else share
            cut = sample.cut(layer, "h" if selector == "oracle" else "activated", kept)
            rules.append(LayerRule(keep=cut))
            continue
        cut = sample.tested_cut(layer, share)
        tap = InputTap(layer=layer)
        gate = FittedPredictor.low_bit_gate(model.model, layer, tap, cut, Encoding(encoding))
        rules.append(gate.rule(model.backend))
    return OperatingPoint(selector, setting, tuple(rules))


def _sweep(model: ObservedModel) -> list[OperatingPoint]:
    """The file's low-rank predictors with their cuts moved."""
    carried = [FittedPredictor.from_file(model.model, layer) for layer in range(model.model.decoder.n_layers)]
    if not any(p is not None and p.description.kind == "low_rank" for p in carried):
        return []
    points = []
    for offset in LOGIT_OFFSETS:
        rules = []
        for predictor in carried:
            if predictor is None:
                rules.append(LayerRule())
                continue
            p = predictor.description
            if p.kind == "low_rank":
                predictor = predictor.with_threshold(sigmoid(logit(p.threshold) + offset))  # noqa: PLW2901
            rules.append(predictor.rule(model.backend))
        points.append(OperatingPoint("file", f"logit {offset:+g}", tuple(rules)))
    return points
