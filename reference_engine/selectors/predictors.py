"""Selectors that a file carries: low-rank predictors and low-bit gates (SPEC.md section "Predictors")."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from flashfmt import FlashModel
from reference_engine.backends import Backend, Matrix
from reference_engine.selectors.protocol import F32, Ids, Selector


class LowRankPredictor:
    """The paper's predictor: neuron i is active when ``sigmoid(up[i] . (down . h) + bias[i]) > threshold``.

    Parameters
    ----------
    down : [rank, d_model]. up : [n_neurons, rank]. bias : float32 [n_neurons] or None.
    """

    def __init__(self, down: Matrix, up: Matrix, bias: F32 | None, threshold: float, backend: Backend) -> None:
        self._down = down
        self._up = up
        self._bias = bias
        self._cut = _logit(threshold)  # sigmoid grows, so the cut is made on its argument
        self._backend = backend
        self._selection = backend.bind_selector([down, up], bias, float(self._cut), signed=True)

    def scores(self, x: F32) -> F32:
        """Arguments of the sigmoid, float32 [n_tokens, n_neurons]."""
        return self._backend.matmul(self._up, self._backend.matmul(self._down, x), bias=self._bias)

    def select(self, x: F32) -> Ids:
        """Neurons whose probability exceeds the threshold for any token."""
        if len(x) == 1 and self._selection is not None:
            return self._selection(x)
        return any_token(self.scores(x) > self._cut)


class LowBitGate:
    """A low-bit copy of the gating projection: active when ``gate[i] . h + bias[i] > threshold``.

    The size of the sum is compared where not `signed`.

    Parameters
    ----------
    gate : [n_neurons, d_model]: of the gate where the FFN is gated, of the up projection otherwise.
    bias : float32 [n_neurons], the layer's own bias of that projection, or None.
    """

    def __init__(self, gate: Matrix, bias: F32 | None, threshold: float, backend: Backend, *, signed: bool) -> None:
        self._gate = gate
        self._bias = bias
        self._cut = np.float32(threshold)
        self._signed = signed
        self._backend = backend
        self._selection = backend.bind_selector([gate], bias, float(self._cut), signed=signed)

    def scores(self, x: F32) -> F32:
        """Approximate gate values, float32 [n_tokens, n_neurons]."""
        return self._backend.matmul(self._gate, x, bias=self._bias)

    def select(self, x: F32) -> Ids:
        """Neurons whose score exceeds the threshold for any token."""
        if len(x) == 1 and self._selection is not None:
            return self._selection(x)
        scores = self.scores(x)
        return any_token((scores if self._signed else np.abs(scores)) > self._cut)


def selector_from_file(
    model: FlashModel, layer: int, backend: Backend, loaded: Mapping[str, npt.NDArray[np.uint8]] | None = None
) -> Selector | None:
    """The selector that a file carries for a layer, or None.

    Parameters
    ----------
    loaded : stored bytes of the predictors' tensors by name, where they were read to DRAM; else the file is mapped.
    """
    stored = model.predictor(layer)
    if stored is None:
        return None
    predictor, tensors = stored

    def matrix(name: str) -> Matrix:
        tensor = tensors[name]
        data = tensor.data
        if loaded is not None:
            raw = loaded[f"layers/{layer}/predictor/{name}"]
            data = raw.view(tensor.encoding.storage_dtype).reshape(data.shape)
        return Matrix(tensor.encoding, tensor.shape[0], tensor.shape[1], data)

    if predictor.kind == "low_rank":
        bias = tensors["bias"].decode().copy() if predictor.bias else None
        return LowRankPredictor(matrix("down"), matrix("up"), bias, predictor.threshold, backend)
    which = "gate_bias" if model.decoder.ffn.kind == "gated" else "up_bias"
    name = f"layers/{layer}/ffn/{which}"
    own_bias = model.tensor(name).decode().copy() if name in model.tensors else None
    return LowBitGate(matrix("gate"), own_bias, predictor.threshold, backend, signed=predictor.signed)


def any_token(active: npt.NDArray[np.bool_]) -> Ids:
    """Neurons marked for at least one token: [n_tokens, n_neurons] to sorted int32 ids."""
    return np.flatnonzero(active.any(axis=0)).astype(np.int32)


def _logit(probability: float) -> np.float32:
    if probability <= 0:
        return np.float32(-np.inf)
    if probability >= 1:
        return np.float32(np.inf)
    return np.float32(math.log(probability / (1 - probability)))
