"""Predictors with their arrays in memory, fitted or read from a file, and the selectors they make.

Knows: the kinds of predictor that a file can carry. Does not know: how they are fitted or written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import msgspec
import numpy as np
import numpy.typing as npt

from flashfmt import FlashModel
from flashfmt.encodings import Encoding, encode
from flashfmt.manifest import InputTap, Measured, Predictor
from reference_engine.backends import Backend, Matrix
from reference_engine.observation import NONZERO, Cut
from reference_engine.operating_points import LayerRule
from reference_engine.predictor_training import LowRankFit
from reference_engine.selectors import LowBitGate, LowRankPredictor

F32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

_BLOCK_NEURONS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class FittedPredictor:
    """A predictor's description and its arrays in storage form, by short name (`down`, `up`, `bias` or `gate`).

    `own_bias` is the layer's bias of the rows that a `low_bit_gate` copies, float32 [d_ff], or None.
    """

    description: Predictor
    arrays: Mapping[str, tuple[Encoding, npt.NDArray[Any]]]
    n_neurons: int
    d_model: int
    own_bias: F32 | None = None

    @classmethod
    def low_rank(cls, layer: int, tap: InputTap, fit: LowRankFit, cut: float, encoding: Encoding) -> Self:
        """From a fit and the cut of its logits."""
        return cls(
            Predictor(layer=layer, kind="low_rank", tap=tap, threshold=sigmoid(cut), rank=fit.rank, bias=True),
            {
                "down": (encoding, encode(fit.down, encoding)),
                "up": (encoding, encode(fit.up, encoding)),
                "bias": (Encoding.F32, fit.bias.astype(np.float32)),
            },
            len(fit.up),
            fit.down.shape[1],
        )

    @classmethod
    def low_bit_gate(cls, model: FlashModel, layer: int, tap: InputTap, cut: Cut, encoding: Encoding) -> Self:
        """A copy of the rows that the activation is applied to, in another encoding; `cut` is of kind ``tested``."""
        ffn = model.decoder.ffn
        bundles = model.bundles(layer)
        blocks = [
            encode(bundles.decode(range(first, min(first + _BLOCK_NEURONS, ffn.d_ff)))[:, 0], encoding)
            for first in range(0, ffn.d_ff, _BLOCK_NEURONS)
        ]
        return cls(
            Predictor(layer=layer, kind="low_bit_gate", tap=tap, threshold=cut.threshold, signed=not cut.magnitude),
            {"gate": (encoding, np.concatenate(blocks))},
            ffn.d_ff,
            model.decoder.d_model,
            _own_bias(model, layer),
        )

    @classmethod
    def from_file(cls, model: FlashModel, layer: int) -> Self | None:
        """The predictor that a file carries for a layer, or None."""
        stored = model.predictor(layer)
        if stored is None:
            return None
        description, tensors = stored
        arrays = {name: (tensor.encoding, tensor.data) for name, tensor in tensors.items()}
        own_bias = _own_bias(model, layer) if description.kind == "low_bit_gate" else None
        return cls(description, arrays, model.decoder.ffn.d_ff, model.decoder.d_model, own_bias)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for _, array in self.arrays.values())

    @property
    def active(self) -> Cut:
        """Which neurons count as active for it (SPEC.md section "Predictors")."""
        p = self.description
        return NONZERO if p.kind == "low_rank" else Cut("tested", p.threshold, magnitude=not p.signed)

    def with_threshold(self, threshold: float) -> FittedPredictor:
        """The same with another threshold."""
        return self._replace(msgspec.structs.replace(self.description, threshold=threshold))

    def with_measured(self, measured: Measured) -> FittedPredictor:
        """The same with its quality."""
        return self._replace(msgspec.structs.replace(self.description, measured=measured))

    def selector(self, backend: Backend) -> LowRankPredictor | LowBitGate:
        """What an engine selects with."""
        p = self.description
        if p.kind == "low_rank":
            bias = self.arrays["bias"][1] if p.bias else None
            down = self._matrix("down", p.rank or 0, self.d_model)
            up = self._matrix("up", self.n_neurons, p.rank or 0)
            return LowRankPredictor(down, up, bias, p.threshold, backend)
        gate = self._matrix("gate", self.n_neurons, self.d_model)
        return LowBitGate(gate, self.own_bias, p.threshold, backend, signed=p.signed)

    def predict(self, z: F32, backend: Backend) -> Mask:
        """Which neurons it predicts for each token of its tapped activation z: bool [n_tokens, n_neurons]."""
        p = self.description
        scores = self.selector(backend).scores(z)
        if p.kind == "low_rank":
            return scores > np.float32(logit(p.threshold))
        return (scores if p.signed else np.abs(scores)) > np.float32(p.threshold)

    def rule(self, backend: Backend) -> LayerRule:
        """Computing what it predicts, for an operating point."""
        return LayerRule(self.active, predict=lambda z: self.predict(z, backend), tap=self.description.tap)

    def _matrix(self, name: str, n_rows: int, n_cols: int) -> Matrix:
        encoding, data = self.arrays[name]
        return Matrix(encoding, n_rows, n_cols, data)

    def _replace(self, description: Predictor) -> FittedPredictor:
        return FittedPredictor(description, self.arrays, self.n_neurons, self.d_model, self.own_bias)


def sigmoid(logit_: float) -> float:
    """1 / (1 + exp(-x)), in [0, 1]."""
    return 1 / (1 + math.exp(-logit_)) if logit_ >= 0 else math.exp(logit_) / (1 + math.exp(logit_))


def logit(probability: float) -> float:
    """The inverse of `sigmoid`; infinite at 0 and 1."""
    if probability <= 0:
        return -math.inf
    return math.inf if probability >= 1 else math.log(probability / (1 - probability))


def _own_bias(model: FlashModel, layer: int) -> F32 | None:
    name = f"layers/{layer}/ffn/{'gate_bias' if model.decoder.ffn.kind == 'gated' else 'up_bias'}"
    return model.tensor(name).decode() if name in model.tensors else None
