"""Selectors that compute what they cut: an exact gate, and the oracle that knows every activation.

Both keep copies of projections in DRAM, so they save reads and not memory: for evaluation, and for models whose
predictors are not good enough.
"""

from __future__ import annotations

import numpy as np

from flashfmt.manifest import Activation
from reference_engine.backends import Backend, Matrix
from reference_engine.backends.activations import activate
from reference_engine.selectors.predictors import any_token
from reference_engine.selectors.protocol import F32, Ids


class Threshold:
    """A cut on the exact gate: active when ``|activation(gate[i] . h + bias[i])| > threshold``.

    With a ReLU this is FATReLU's cut, with a SiLU that of CATS (arXiv:2404.08763). Threshold 0 leaves out exact zeros
    only.

    Parameters
    ----------
    gate : [n_neurons, d_model]: the gate where the FFN is gated, the up projection otherwise.
    bias : float32 [n_neurons], that projection's own, or None.
    activation : what the FFN applies to it.
    """

    def __init__(
        self, gate: Matrix, bias: F32 | None, activation: Activation, threshold: float, backend: Backend
    ) -> None:
        self._gate = gate
        self._bias = bias
        self._activation = activation
        self._cut = np.float32(threshold)
        self._backend = backend

    def select(self, x: F32) -> Ids:
        """Neurons whose activated gate exceeds the threshold for any token."""
        gate = activate(self._activation, self._backend.matmul(self._gate, x, bias=self._bias))
        return any_token(np.abs(gate) > self._cut)


class Oracle:
    """The neurons that are really active: ``|h[i]| > epsilon``, with h as the FFN computes it.

    Parameters
    ----------
    gate, gate_bias : [n_neurons, d_model] and float32 [n_neurons]; None where the FFN is not gated, or has no bias.
    up, up_bias : likewise for the up projection.
    activation : of the gate, or of the up projection where there is no gate.
    up_activation : of the up projection where there is a gate.
    """

    def __init__(
        self,
        up: Matrix,
        up_bias: F32 | None,
        activation: Activation,
        *,
        gate: Matrix | None,
        gate_bias: F32 | None,
        up_activation: Activation,
        epsilon: float,
        backend: Backend,
    ) -> None:
        self._up = up
        self._up_bias = up_bias
        self._gate = gate
        self._gate_bias = gate_bias
        self._activation = activation
        self._up_activation = up_activation
        self._epsilon = np.float32(epsilon)
        self._backend = backend

    def select(self, x: F32) -> Ids:
        """Neurons whose activation exceeds epsilon for any token."""
        return any_token(np.abs(self._activations(x)) > self._epsilon)

    def _activations(self, x: F32) -> F32:
        """h, float32 [n_tokens, n_neurons]."""
        up = self._backend.matmul(self._up, x, bias=self._up_bias)
        if self._gate is None:
            return activate(self._activation, up)
        h = activate(self._activation, self._backend.matmul(self._gate, x, bias=self._gate_bias))
        h *= activate(self._up_activation, up)
        return h
