"""Selectors on a device: scores and their cut stay there, only the active ids come back.

The same decisions as `selectors`, whose numbers they share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from flashfmt import FlashModel
from flashfmt.manifest import InputTap
from reference_engine.backends import Matrix
from reference_engine.backends.cupy_backend import CupyBackend
from reference_engine.backends.cupy_protocol import DeviceArray
from reference_engine.bundle_checksums import Verify
from reference_engine.residents import load_tensors
from reference_engine.selectors import Everything, SelectorChoice, TappedSelector, load_selectors
from reference_engine.selectors.protocol import F32, Ids, Selector
from reference_engine.selectors.resident_parts import load_parts

Progress = Callable[[int], None]
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
    progress: Progress | None = None,
) -> list[TappedSelector]:
    """The selector of every layer, of any kind that `load_selectors` knows.

    Raises
    ------
    FlashReadError, ChecksumError
        If what it needs cannot be read.
    FlashError
        If the choice does not go with the model.
    """
    layers = range(model.decoder.n_layers)
    if choice.kind in ("all", "trace"):
        return load_selectors(model, choice, backend, verify=verify, progress=progress)
    if choice.kind == "file":
        taps = {predictor.layer: predictor.tap for predictor in model.manifest.predictors}
        everything = Everything(model.decoder.ffn.d_ff)
        return [
            TappedSelector(
                taps.get(layer, InputTap(layer=layer)),
                _predictor(model, layer, backend, verify=verify, progress=progress) or everything,
            )
            for layer in layers
        ]
    return [
        TappedSelector(_tap(choice, layer), _computing(model, layer, choice, backend, verify=verify, progress=progress))
        for layer in layers
    ]


def _predictor(
    model: FlashModel, layer: int, backend: CupyBackend, *, verify: Verify, progress: Progress | None
) -> Selector | None:
    """The selector that a file carries for a layer, or None."""
    stored = model.predictor(layer)
    if stored is None:
        return None
    predictor, tensors = stored
    names = {name: f"layers/{layer}/predictor/{name}" for name in tensors}
    loaded = load_tensors(model, list(names.values()), verify=verify != "never", progress=progress)

    def matrix(name: str) -> Matrix:
        tensor = tensors[name]
        data = loaded[names[name]].view(tensor.encoding.storage_dtype).reshape(tensor.data.shape)
        return _uploaded(Matrix(tensor.encoding, tensor.shape[0], tensor.shape[1], data), backend)

    if predictor.kind == "low_rank":
        down, up = matrix("down"), matrix("up")
        bias = backend.device.upload(tensors["bias"].decode()) if predictor.bias else None
        cut = _logit(predictor.threshold)
        return ScoreCut(backend, lambda x: backend.matmul(up, backend.matmul(down, x), bias=bias), cut)
    gate, gate_bias = matrix("gate"), _bias(model, layer, backend, _gating_part(model))
    return ScoreCut(
        backend,
        lambda x: backend.matmul(gate, x, bias=gate_bias),
        predictor.threshold,
        magnitude=not predictor.signed,
    )


def _computing(
    model: FlashModel,
    layer: int,
    choice: SelectorChoice,
    backend: CupyBackend,
    *,
    verify: Verify,
    progress: Progress | None,
) -> Selector:
    """A selector that computes with copies of parts of the bundles: a cut of a gate, or of what is really active."""
    ffn, gating = model.decoder.ffn, _gating_part(model)
    names = model.layers[layer].parts[:-1] if choice.kind == "oracle" else (gating,)
    parts = load_parts(model, layer, names, encoding=choice.encoding, verify=verify, progress=progress)
    matrices = {name: _uploaded(parts.pop(name), backend) for name in names}
    biases = {name: _bias(model, layer, backend, name) for name in names}

    def product(name: str, x: F32) -> F32:
        return backend.matmul(matrices[name], x, bias=biases[name])

    if choice.kind == "lowbit":
        is_cut_at_zero = ffn.activation.kind in _CUT_AT_ZERO
        cut = ffn.activation.threshold if choice.threshold is None else choice.threshold
        return ScoreCut(backend, lambda x: product(gating, x), cut, magnitude=not is_cut_at_zero)
    cut = choice.threshold or 0.0
    if choice.kind == "oracle" and ffn.kind == "gated":
        return ScoreCut(
            backend,
            lambda x: backend.activate(ffn.activation, product("gate", x), ffn.up_activation, product("up", x)),
            cut,
            magnitude=True,
        )
    return ScoreCut(backend, lambda x: backend.activate(ffn.activation, product(gating, x)), cut, magnitude=True)


def _gating_part(model: FlashModel) -> str:
    """The part whose activation says whether a neuron is active."""
    return "gate" if model.decoder.ffn.kind == "gated" else "up"


def _uploaded(matrix: Matrix, backend: CupyBackend) -> Matrix:
    data: npt.NDArray[Any] = np.ascontiguousarray(matrix.data)
    return Matrix(matrix.encoding, matrix.n_rows, matrix.n_cols, backend.device.upload(data))


def _bias(model: FlashModel, layer: int, backend: CupyBackend, part: str) -> DeviceArray | None:
    name = f"layers/{layer}/ffn/{part}_bias"
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
