"""float64 references of every backend function, written for reading, and random stored weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flashfmt.encodings import Encoding, decode, encode, part_layout
from flashfmt.manifest import Activation
from reference_engine.backends import Backend, FfnShape, Matrix, load_backend

WEIGHTS = (Encoding.F32, Encoding.F16, Encoding.BF16, Encoding.Q8, Encoding.Q4)


class Oracle:
    """The functions of a backend in float64, on decoded weights."""

    def __init__(self) -> None:
        erf = np.frompyfunc(math.erf, 1, 1)
        self.activations: dict[str, Callable[[Any, float], Any]] = {
            "identity": lambda v, _: v,
            "relu": lambda v, _: np.maximum(v, 0),
            "relu2": lambda v, _: np.maximum(v, 0) ** 2,
            "fatrelu": lambda v, threshold: np.where(v > threshold, v, 0),
            "silu": lambda v, _: v / (1 + np.exp(-v)),
            "gelu": lambda v, _: v * 0.5 * (1 + erf(v / math.sqrt(2)).astype(np.float64)),
            "gelu_tanh": lambda v, _: v * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
            "quick_gelu": lambda v, _: v / (1 + np.exp(-1.702 * v)),
        }

    def activate(self, activation: Activation, v: Any) -> Any:
        return self.activations[activation.kind](v, activation.threshold)

    def matmul(self, weights: Any, x: Any, bias: Any = None) -> Any:
        y = x.astype(np.float64) @ weights.astype(np.float64).T
        return y if bias is None else y + bias

    def ffn(self, shape: FfnShape, bundles: Any, x: Any, up_bias: Any = None, gate_bias: Any = None) -> Any:
        """`bundles` [n, parts, d_model] decoded."""
        gate = self.matmul(bundles[:, 0], x, gate_bias)
        if not shape.is_gated:
            h = self.activate(shape.activation, self.matmul(bundles[:, 0], x, up_bias))
        else:
            h = self.activate(shape.activation, gate) * self.activate(
                shape.up_activation, self.matmul(bundles[:, 1], x, up_bias)
            )
        return h @ bundles[:, -1].astype(np.float64)

    def attend(self, q: Any, keys: Any, values: Any, n_past: int, scale: float, window: int | None) -> Any:
        out = np.zeros(q.shape)
        for t in range(q.shape[0]):
            last = n_past + t + 1
            first = 0 if window is None else max(0, last - window)
            for head in range(q.shape[1]):
                kv = head * keys.shape[0] // q.shape[1]
                scores = keys[kv, first:last].astype(np.float64) @ q[t, head] * scale
                weights = np.exp(scores - scores.max())
                out[t, head] = weights @ values[kv, first:last].astype(np.float64) / weights.sum()
        return out

    def norm(self, x: Any, weight: Any, bias: Any, eps: float, *, centred: bool) -> Any:
        x = x.astype(np.float64)
        if centred:
            x = x - x.mean(-1, keepdims=True)
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        return y * (1 if weight is None else weight) + (0 if bias is None else bias)

    def rotate(self, x: Any, cos: Any, sin: Any, pairing: str) -> Any:
        out = x.astype(np.float64)
        n = cos.shape[1]
        for i in range(n):
            a, b = (i, i + n) if pairing == "half" else (2 * i, 2 * i + 1)
            turn = (x[..., a] + 1j * x[..., b]) * (cos[:, None, i] + 1j * sin[:, None, i])
            out[..., a], out[..., b] = turn.real, turn.imag
        return out


class Weights:
    """Random stored weights, at addresses that are multiples of 64 plus `misalignment` bytes."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int) -> Any:
        return self.rng.standard_normal(shape).astype(np.float32)

    def placed(self, array: Any, misalignment: int) -> Any:
        """Read-only copy of an array at a chosen address, as a view of a file would be."""
        buffer = np.zeros(array.nbytes + 192, np.uint8)
        start = -buffer.ctypes.data % 64 + misalignment
        view = buffer[start : start + array.nbytes]
        view[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        view.flags.writeable = False
        return view.view(array.dtype).reshape(array.shape)

    def matrix(self, encoding: Encoding, n_rows: int, n_cols: int, misalignment: int = 0) -> tuple[Matrix, Any]:
        """A stored matrix and its decoded weights."""
        stored = encode(self.normal(n_rows, n_cols), encoding)
        data = self.placed(stored, misalignment)
        return Matrix(encoding, n_rows, n_cols, data), decode(stored, encoding, n_cols)

    def bundles(
        self,
        encoding: Encoding,
        n_rows: int,
        d_model: int,
        activation: Activation,
        *,
        gated: bool = True,
        padding: int = 64,
    ) -> tuple[FfnShape, Any, Any]:
        """A shape, stored bundles uint8 [n_rows, stride], and their decoded weights [n_rows, parts, d_model]."""
        parts = ("gate", "up", "down") if gated else ("up", "down")
        part = part_layout(encoding, d_model)
        stored = encode(self.normal(n_rows, len(parts), d_model) / np.float32(math.sqrt(d_model)), encoding)
        row_nbytes = len(parts) * part.nbytes
        rows = np.full((n_rows, row_nbytes + padding), 0xFF, np.uint8)
        rows[:, :row_nbytes] = np.ascontiguousarray(stored).reshape(n_rows, -1).view(np.uint8)
        identity = Activation(kind="identity")
        shape = FfnShape(encoding, parts, d_model, part, row_nbytes + padding, activation, identity)
        return shape, rows, decode(stored, encoding, d_model)


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture(scope="session")
def weights() -> type[Weights]:
    return Weights


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Any, Any], float]:
    """Largest error relative to the largest value; NaN counts as infinite."""

    def measure(actual: Any, expected: Any) -> float:
        error = float(np.abs(actual - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-30))
        return error if math.isfinite(error) else math.inf

    return measure


@pytest.fixture(scope="session", params=["numpy", "numba-1", "numba-2"])
def backend(request: pytest.FixtureRequest) -> Backend:
    name, _, threads = request.param.partition("-")
    return load_backend(name, int(threads or 1))


@pytest.fixture(scope="session")
def numba_backends() -> tuple[Backend, Backend]:
    """The numba backend with one thread and with two."""
    return load_backend("numba", 1), load_backend("numba", 2)


@pytest.fixture(params=WEIGHTS, ids=str)
def encoding(request: pytest.FixtureRequest) -> Encoding:
    value: Encoding = request.param
    return value
