"""Selectors on a device: scores and their cut stay there, only the active ids come back.

The same decisions as `selectors`, whose numbers they share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from flashfmt import FlashModel, StoredTensor
from flashfmt.errors import PromptError
from flashfmt.manifest import InputTap
from reference_engine.backends import Matrix
from reference_engine.backends.cupy_backend import CupyBackend
from reference_engine.backends.cupy_protocol import DeviceArray
from reference_engine.bundle_checksums import Verify
from reference_engine.selectors import Everything, SelectorChoice, TappedSelector, load_selectors
from reference_engine.selectors.protocol import F32, Ids, Selector
from reference_engine.selectors.resident_parts import load_parts

_CUT_AT_ZERO: Final = ("relu", "relu2", "fatrelu")


class ScoreCut:
    """Active are the neurons whose score exceeds a cut for any token.

    Parameters
    ----------
    scores : float32 [n_tokens, n_neurons] of an activation, both on the device.
    magnitude : compare the size of the scores.
    """

    def __init__(
        self, backend: CupyBackend, scores: Callable[[DeviceArray], DeviceArray], cut: float, *, magnitude: bool = False
    ) -> None:
        self._backend = backend
        self._scores = scores
        self._cut = cut
        self._magnitude = magnitude

    def select(self, x: F32) -> Ids:
        """See `Selector.select`; `x` lies on the device, the ids on the host."""
        return self._backend.active_ids(self._scores(x), self._cut, magnitude=self._magnitude)


def load_device_selectors(
    model: FlashModel,
    choice: SelectorChoice,
    backend: CupyBackend,
    *,
    verify: Verify = "first",
    progress: Callable[[int], None] | None = None,
) -> list[TappedSelector]:
    """The selector of every layer: ``file``, ``all``, ``trace``, or ``lowbit``.

    Raises
    ------
    FlashReadError, ChecksumError
        If what it needs cannot be read.
    PromptError
        If a device has no such selector.
    """
    layers = range(model.decoder.n_layers)
    if choice.kind == "file":
        taps = {predictor.layer: predictor.tap for predictor in model.manifest.predictors}
        everything = Everything(model.decoder.ffn.d_ff)
        return [
            TappedSelector(taps.get(layer, InputTap(layer=layer)), _predictor(model, layer, backend) or everything)
            for layer in layers
        ]
    if choice.kind == "lowbit":
        return [
            TappedSelector(
                _tap(choice, layer), _low_bit_gate(model, layer, choice, backend, verify=verify, progress=progress)
            )
            for layer in layers
        ]
    if choice.kind in ("all", "trace"):
        return load_selectors(model, choice, backend, verify=verify, progress=progress)
    raise PromptError("a device has no such selector", expected="file, all, lowbit or trace", actual=choice.kind)


def _predictor(model: FlashModel, layer: int, backend: CupyBackend) -> Selector | None:
    """The selector that a file carries for a layer, or None."""
    stored = model.predictor(layer)
    if stored is None:
        return None
    predictor, tensors = stored

    def matrix(tensor: StoredTensor) -> Matrix:
        return _uploaded(Matrix(tensor.encoding, tensor.shape[0], tensor.shape[1], tensor.data), backend)

    if predictor.kind == "low_rank":
        down, up = matrix(tensors["down"]), matrix(tensors["up"])
        bias = backend.device.upload(tensors["bias"].decode()) if predictor.bias else None
        cut = _logit(predictor.threshold)
        return ScoreCut(backend, lambda x: backend.matmul(up, backend.matmul(down, x), bias=bias), cut)
    gate, gate_bias = matrix(tensors["gate"]), _gate_bias(model, layer, backend)
    return ScoreCut(
        backend,
        lambda x: backend.matmul(gate, x, bias=gate_bias),
        predictor.threshold,
        magnitude=not predictor.signed,
    )


def _low_bit_gate(
    model: FlashModel,
    layer: int,
    choice: SelectorChoice,
    backend: CupyBackend,
    *,
    verify: Verify,
    progress: Callable[[int], None] | None,
) -> Selector:
    """A cut of a copy of the gating projection in few bits."""
    part, activation = model.layers[layer].parts[0], model.decoder.ffn.activation
    is_cut_at_zero = activation.kind in _CUT_AT_ZERO
    if choice.threshold is None and not is_cut_at_zero:
        raise PromptError(f"the gate of this model ({activation.kind}) is not zero below 0: say where to cut it")
    parts = load_parts(model, layer, (part,), encoding=choice.encoding, verify=verify, progress=progress)
    gate, gate_bias = _uploaded(parts[part], backend), _gate_bias(model, layer, backend)
    cut = activation.threshold if choice.threshold is None else choice.threshold
    return ScoreCut(backend, lambda x: backend.matmul(gate, x, bias=gate_bias), cut, magnitude=not is_cut_at_zero)


def _uploaded(matrix: Matrix, backend: CupyBackend) -> Matrix:
    data: npt.NDArray[Any] = np.ascontiguousarray(matrix.data)
    return Matrix(matrix.encoding, matrix.n_rows, matrix.n_cols, backend.device.upload(data))


def _gate_bias(model: FlashModel, layer: int, backend: CupyBackend) -> DeviceArray | None:
    which = "gate_bias" if model.decoder.ffn.kind == "gated" else "up_bias"
    name = f"layers/{layer}/ffn/{which}"
    return backend.device.upload(model.tensor(name).decode()) if name in model.tensors else None


def _tap(choice: SelectorChoice, layer: int) -> InputTap:
    if choice.tap == "previous":
        return InputTap(layer=max(layer - 1, 0))
    return InputTap(layer=layer, point=choice.tap)


def _logit(probability: float) -> float:
    if probability <= 0:
        return -math.inf
    if probability >= 1:
        return math.inf
    return math.log(probability / (1 - probability))
