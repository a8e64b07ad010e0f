"""The elementwise functions of an FFN, on numpy arrays, and the numbers by which compiled kernels know them.

Implements SPEC.md section "Activations". Knows: float32 arithmetic. Does not know: weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, cast

import numpy as np

from flashfmt.manifest import Activation, ActivationKind
from reference_engine.backends.protocol import F32Array

_ONE: Final = np.float32(1)
_HALF: Final = np.float32(0.5)
_ZERO: Final = np.float32(0)
_SQRT_HALF: Final = np.float32(math.sqrt(0.5))
_SQRT_2_OVER_PI: Final = np.float32(math.sqrt(2 / math.pi))
_TANH_CUBIC: Final = np.float32(0.044715)
_QUICK_GELU: Final = np.float32(1.702)

_erf: Final = np.frompyfunc(math.erf, 1, 1)

ACTIVATION_CODES: Final[dict[ActivationKind, int]] = {
    "identity": 0,
    "relu": 1,
    "relu2": 2,
    "fatrelu": 3,
    "silu": 4,
    "gelu": 5,
    "gelu_tanh": 6,
    "quick_gelu": 7,
}


def activate(activation: Activation, x: F32Array) -> F32Array:
    """Apply an activation elementwise.

    Parameters
    ----------
    x : float32, any shape.

    Returns
    -------
    float32 of the same shape; `x` itself for ``identity``, a new array otherwise.
    """
    if activation.kind == "fatrelu":
        return np.where(x > np.float32(activation.threshold), x, _ZERO)
    return _FUNCTIONS[activation.kind](x)


def _relu(x: F32Array) -> F32Array:
    return np.maximum(x, _ZERO)


def _relu2(x: F32Array) -> F32Array:
    positive = _relu(x)
    return cast(F32Array, positive * positive)


def _sigmoid(x: F32Array) -> F32Array:
    small = np.exp(-np.abs(x))  # never overflows
    return cast(F32Array, np.where(x >= 0, _ONE, small) / (_ONE + small))


def _silu(x: F32Array) -> F32Array:
    return cast(F32Array, x * _sigmoid(x))


def _gelu(x: F32Array) -> F32Array:
    return cast(F32Array, _HALF * x * (_ONE + _erf(x * _SQRT_HALF).astype(np.float32)))


def _gelu_tanh(x: F32Array) -> F32Array:
    return cast(F32Array, _HALF * x * (_ONE + np.tanh(_SQRT_2_OVER_PI * (x + _TANH_CUBIC * x * x * x))))


def _quick_gelu(x: F32Array) -> F32Array:
    return cast(F32Array, x * _sigmoid(_QUICK_GELU * x))


_FUNCTIONS: Final[dict[ActivationKind, Callable[[F32Array], F32Array]]] = {
    "identity": lambda x: x,
    "relu": _relu,
    "relu2": _relu2,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
}
