"""Choosing a selector by a short text, and making it for every layer of a model.

======================  =====================================================================================
``file``                the predictor that the file carries; all neurons in layers without one
``threshold:T``         cut the exact gate at T (`Threshold`)
``lowbit:q4``           cut a copy of the gating projection in few bits, made while loading (`LowBitGate`);
                        ``lowbit:q8``, and ``lowbit:q4:T`` for another cut than 0
``oracle``              what is really active (`Oracle`); ``oracle:E`` what exceeds E
``all``                 every neuron
``trace:FILE``          what a recorded run used
======================  =====================================================================================

``@`` and a place at the end make it look ahead, from an activation that is known earlier: ``lowbit:q4@previous`` (the
FFN input of the layer before), ``@attention_input``, ``@attention_output``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from flashfmt import FlashModel
from flashfmt.encodings import Encoding
from flashfmt.errors import PromptError
from flashfmt.manifest import InputTap
from reference_engine.activity_trace import read_header, read_trace
from reference_engine.backends import Backend
from reference_engine.bundle_checksums import Verify
from reference_engine.neuron_window import Ids
from reference_engine.residents import load_tensors, tensors_nbytes
from reference_engine.selectors.exact import Oracle, Threshold
from reference_engine.selectors.predictors import LowBitGate, selector_from_file
from reference_engine.selectors.protocol import F32, Selector
from reference_engine.selectors.resident_parts import Progress, load_parts, part_nbytes
from reference_engine.selectors.simple import Everything, Trace

SelectorKind = Literal["file", "threshold", "lowbit", "oracle", "all", "trace"]
TapChoice = Literal["ffn_input", "previous", "attention_input", "attention_output"]
_TAP_CHOICES: Final[tuple[TapChoice, ...]] = get_args(TapChoice)
_CUT_AT_ZERO: Final = ("relu", "relu2", "fatrelu")


@dataclass(frozen=True, slots=True)
class SelectorChoice:
    """A parsed choice. `threshold` is None where the text gives none; `encoding` belongs to ``lowbit`` alone."""

    kind: SelectorKind
    threshold: float | None = None
    encoding: Encoding | None = None
    trace: Path | None = None
    tap: TapChoice = "ffn_input"


@dataclass(frozen=True, slots=True)
class TappedSelector:
    """A selector of one layer, and the activation it looks at: of this layer, or of an earlier one to look ahead."""

    tap: InputTap
    selector: Selector


def parse_selector(text: str) -> SelectorChoice:
    """Understand a choice such as ``threshold:0.1`` or ``lowbit:q4@previous``.

    Raises
    ------
    ValueError
        If the text is no choice.
    """
    kind, _, rest = text.partition(":")
    if kind == "trace":
        if not rest:
            raise ValueError("trace needs a file: trace:FILE")
        return SelectorChoice("trace", trace=Path(rest))
    text, has_tap, tap = text.partition("@")
    kind, *values = text.split(":")
    choice = _parse_values(kind, values)
    if not has_tap:
        return choice
    if kind in ("file", "all"):
        raise ValueError(f"{kind} does not take an activation to look at")
    return dataclasses.replace(choice, tap=_tap_choice(tap))


def _tap_choice(text: str) -> TapChoice:
    for choice in _TAP_CHOICES:
        if choice == text:
            return choice
    raise ValueError(f"{text!r} is no activation to look at: {', '.join(_TAP_CHOICES)}")


def _parse_values(kind: str, values: list[str]) -> SelectorChoice:
    match kind, values:
        case (("file" | "all" | "oracle"), []):
            return SelectorChoice(kind)
        case (("oracle" | "threshold"), [value]):
            return SelectorChoice(kind, threshold=_number(value))
        case "lowbit", [("q4" | "q8") as encoding, *value] if len(value) <= 1:
            return SelectorChoice("lowbit", _number(value[0]) if value else None, Encoding(encoding))
    known = "file, threshold:T, lowbit:q4, lowbit:q8, oracle, all, trace:FILE"
    raise ValueError(f"{':'.join([kind, *values])!r} is no selector: {known}")


def selectors_nbytes(model: FlashModel, choice: SelectorChoice) -> int:
    """DRAM that the selectors of all layers take.

    Raises
    ------
    FlashError
        If the choice does not go with the model.
    """
    _require_fit(model, choice)
    if choice.kind == "file":
        return tensors_nbytes(model, _predictor_names(model))
    parts = len(_parts(model, choice))
    return sum(parts * part_nbytes(info, choice.encoding) for info in model.layers) if parts else 0


def selectors_load_nbytes(model: FlashModel, choice: SelectorChoice) -> int:
    """Bytes that `load_selectors` reports to its progress callback."""
    if choice.kind == "file":
        return sum(model.tensors[name].extent.nbytes for name in _predictor_names(model))
    return sum(info.geometry.index_offset for info in model.layers) if _parts(model, choice) else 0


def load_selectors(
    model: FlashModel,
    choice: SelectorChoice,
    backend: Backend,
    *,
    verify: Verify = "first",
    progress: Progress | None = None,
) -> list[TappedSelector]:
    """Make the selector of every layer.

    Raises
    ------
    FlashReadError, ChecksumError
        If what it needs cannot be read.
    FlashError
        If the choice does not go with the model.
    """
    _require_fit(model, choice)
    n_neurons = model.decoder.ffn.d_ff
    match choice.kind:
        case "file":
            return _load_predictors(model, backend, verify, progress)
        case "all":
            return [TappedSelector(InputTap(layer=layer), Everything(n_neurons)) for layer in _layers(model)]
        case "trace":
            replay = _Replay(_require_path(choice), model)
            return [TappedSelector(InputTap(layer=layer), Trace(replay.layer(layer))) for layer in _layers(model)]
    return [
        TappedSelector(
            _tap(choice.tap, layer),
            _load_computing(model, choice, layer, backend, verify=verify, progress=progress),
        )
        for layer in _layers(model)
    ]


def _load_computing(
    model: FlashModel,
    choice: SelectorChoice,
    layer: int,
    backend: Backend,
    *,
    verify: Verify,
    progress: Progress | None,
) -> Selector:
    """A selector that computes with copies of parts of the bundles."""
    names = _parts(model, choice)
    parts = load_parts(model, layer, names, encoding=choice.encoding, verify=verify, progress=progress)
    ffn = model.decoder.ffn
    biases = {name: _bias(model, layer, name) for name in names}
    if choice.kind == "oracle":
        return Oracle(
            parts["up"],
            biases["up"],
            ffn.activation,
            gate=parts.get("gate"),
            gate_bias=biases.get("gate"),
            up_activation=ffn.up_activation,
            epsilon=choice.threshold or 0.0,
            backend=backend,
        )
    gate, bias = parts[names[0]], biases[names[0]]
    if choice.kind == "threshold":
        return Threshold(gate, bias, ffn.activation, choice.threshold or 0.0, backend)
    signed = ffn.activation.kind in _CUT_AT_ZERO
    cut = ffn.activation.threshold if choice.threshold is None else choice.threshold
    return LowBitGate(gate, bias, cut, backend, signed=signed)


def _load_predictors(
    model: FlashModel, backend: Backend, verify: Verify, progress: Progress | None
) -> list[TappedSelector]:
    stored = load_tensors(model, _predictor_names(model), verify=verify != "never", progress=progress)
    taps = {predictor.layer: predictor.tap for predictor in model.manifest.predictors}
    everything = Everything(model.decoder.ffn.d_ff)
    selectors = []
    for layer in _layers(model):
        selector = selector_from_file(model, layer, backend, stored) or everything
        selectors.append(TappedSelector(taps.get(layer, InputTap(layer=layer)), selector))
    return selectors


def _require_fit(model: FlashModel, choice: SelectorChoice) -> None:
    if choice.kind == "file" and not model.manifest.predictors:
        raise PromptError("the file carries no predictors", path=model.path)
    if choice.kind == "lowbit" and choice.threshold is None and model.decoder.ffn.activation.kind not in _CUT_AT_ZERO:
        raise PromptError(
            f"the gate of this model ({model.decoder.ffn.activation.kind}) is not zero below 0: say where to cut it, "
            f"as in lowbit:{choice.encoding}:0.1",
            path=model.path,
        )
    if choice.kind == "trace":
        path = _require_path(choice)
        header, n_layers, n_neurons = read_header(path), model.decoder.n_layers, model.decoder.ffn.d_ff
        if (header.n_layers, header.n_neurons) != (n_layers, n_neurons):
            raise PromptError(
                "the trace was recorded from a model of another shape",
                path=path,
                expected=f"{n_layers} layers of {n_neurons} neurons",
                actual=f"{header.n_layers} of {header.n_neurons}",
            )


def _require_path(choice: SelectorChoice) -> Path:
    if choice.trace is None:
        raise ValueError("a recorded trace is a file")
    return choice.trace


def _parts(model: FlashModel, choice: SelectorChoice) -> tuple[str, ...]:
    """Parts of the bundles that a selector keeps copies of."""
    gated = model.decoder.ffn.kind == "gated"
    match choice.kind:
        case "oracle":
            return ("gate", "up") if gated else ("up",)
        case "threshold" | "lowbit":
            return ("gate",) if gated else ("up",)
    return ()


def _tap(choice: TapChoice, layer: int) -> InputTap:
    if choice == "previous":  # the first layer has none before it
        return InputTap(layer=max(layer - 1, 0))
    return InputTap(layer=layer, point=choice)


def _bias(model: FlashModel, layer: int, part: str) -> F32 | None:
    name = f"layers/{layer}/ffn/{part}_bias"
    return model.tensor(name).decode().copy() if name in model.tensors else None


def _predictor_names(model: FlashModel) -> list[str]:
    return [name for name in model.tensors if name.startswith("layers/") and name.split("/")[2] == "predictor"]


def _layers(model: FlashModel) -> range:
    return range(model.decoder.n_layers)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number") from None
    if not value >= 0:
        raise ValueError(f"a threshold is not negative: {text}")
    return value


class _Replay:
    """Hands the passes of a recorded trace to the layers, each at its own pace; read once, layer by layer."""

    def __init__(self, path: Path, model: FlashModel) -> None:
        self._path = path
        self._passes = read_trace(path)
        self._waiting: list[list[Ids]] = [[] for _ in _layers(model)]

    def layer(self, layer: int) -> Iterator[Ids]:
        """Active sets of a layer, pass after pass."""
        waiting = self._waiting[layer]
        while True:
            if not waiting:
                recorded = next(self._passes, None)
                if recorded is None:
                    raise PromptError("the recorded trace has no more tokens", path=self._path)
                for queue, ids in zip(self._waiting, recorded.active, strict=True):
                    queue.append(ids)
            yield waiting.pop(0)
