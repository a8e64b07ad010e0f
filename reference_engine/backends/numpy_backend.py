"""The backend in plain numpy: the one to read, the oracle of the others, and the fallback where numba is missing.

Weights are decoded to float32 a few rows at a time, so the working memory stays within `TILE_BYTES` a call.

Knows: arrays. Does not know: files, layers, caches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from flashfmt.encodings import Encoding, decode
from reference_engine.backends.activations import activate
from reference_engine.backends.protocol import (
    FFN_BLOCK_NEURONS,
    F32Array,
    FfnShape,
    IdArray,
    LayerWeights,
    Matrix,
    Pairing,
    Selection,
    TokenPass,
)

TILE_BYTES: Final = 4 << 20


class NumpyBackend:
    """`Backend` in numpy; numpy's BLAS chooses its own threads."""

    name: Final = "numpy"
    n_threads: Final = 1

    def prepare(self, encodings: Iterable[Encoding]) -> None:
        """See `Backend.prepare`; numpy needs no preparation."""

    def matmul(
        self, matrix: Matrix, x: F32Array, out: F32Array | None = None, bias: F32Array | None = None
    ) -> F32Array:
        """See `Backend.matmul`."""
        if out is None:
            out = np.empty((x.shape[0], matrix.n_rows), np.float32)
        for rows in _tiles(matrix):
            weights = decode(matrix.data[rows], matrix.encoding, matrix.n_cols)  # (tile, n_cols)
            np.matmul(x, weights.T, out=out[:, rows])
        if bias is not None:
            out += bias
        return out

    def rows(self, matrix: Matrix, ids: IdArray) -> F32Array:
        """See `Backend.rows`."""
        if ids.size and not 0 <= ids.min() <= ids.max() < matrix.n_rows:
            raise IndexError(f"row ids outside [0, {matrix.n_rows})")
        return decode(matrix.data[ids], matrix.encoding, matrix.n_cols)

    def layer_norm(self, x: F32Array, weight: F32Array | None, bias: F32Array | None, eps: float) -> F32Array:
        """See `Backend.layer_norm`."""
        centred = x - x.mean(axis=-1, keepdims=True)
        y = self.rms_norm(centred, weight, eps)
        if bias is not None:
            y += bias
        return y

    def rms_norm(self, x: F32Array, weight: F32Array | None, eps: float) -> F32Array:
        """See `Backend.rms_norm`."""
        y = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + np.float32(eps))
        if weight is not None:
            y *= weight
        return cast(F32Array, y)

    def rotate(self, x: F32Array, cos: F32Array, sin: F32Array, pairing: Pairing) -> None:
        """See `Backend.rotate`."""
        n_pairs = cos.shape[1]
        if pairing == "half":
            first, second = x[..., :n_pairs], x[..., n_pairs : 2 * n_pairs]
        else:
            first, second = x[..., 0 : 2 * n_pairs : 2], x[..., 1 : 2 * n_pairs : 2]
        c, s = cos[:, None, :], sin[:, None, :]  # (n_tokens, 1, n_pairs)
        turned = first * c - second * s
        second[...] = second * c + first * s
        first[...] = turned

    def attend(
        self,
        q: F32Array,
        keys: npt.NDArray[Any],
        values: npt.NDArray[Any],
        *,
        n_past: int,
        scale: float,
        window: int | None = None,
    ) -> F32Array:
        """See `Backend.attend`."""
        n_tokens, n_heads, _ = q.shape
        n_kv_heads, capacity, _ = keys.shape
        n_context = n_past + n_tokens
        if n_context > capacity:
            raise ValueError(f"{n_context} positions exceed the {capacity} that keys and values hold")
        first = 0 if window is None else max(0, n_past + 1 - window)
        position = np.arange(first, n_context)
        query_position = np.arange(n_past, n_context)[:, None]
        hidden = position > query_position  # (n_tokens, n_seen)
        if window is not None:
            hidden |= position <= query_position - window
        out = np.empty_like(q)
        for head in range(n_heads):
            kv_head = head * n_kv_heads // n_heads
            k = keys[kv_head, first:n_context].astype(np.float32, copy=False)
            v = values[kv_head, first:n_context].astype(np.float32, copy=False)
            scores = (q[:, head] @ k.T) * np.float32(scale)  # (n_tokens, n_seen)
            scores[hidden] = -np.inf
            np.exp(scores - scores.max(axis=1, keepdims=True), out=scores)
            out[:, head] = (scores @ v) / scores.sum(axis=1, keepdims=True)
        return out

    def bind_layers(self, layers: Sequence[LayerWeights]) -> TokenPass | None:
        """See `Backend.bind_layers`."""
        return None

    def bind_selector(
        self, matrices: Sequence[Matrix], bias: F32Array | None, cut: float, *, signed: bool
    ) -> Selection | None:
        """See `Backend.bind_selector`."""
        return None

    def ffn(
        self,
        shape: FfnShape,
        rows: npt.NDArray[np.uint8],
        slots: npt.NDArray[np.int32] | None,
        x: F32Array,
        out: F32Array,
        *,
        up_bias: F32Array | None = None,
        gate_bias: F32Array | None = None,
    ) -> None:
        """See `Backend.ffn`. Always works on `FFN_BLOCK_NEURONS` bundles at a time, so that its sums do not move."""
        if slots is not None and slots.size and not 0 <= slots.min() <= slots.max() < len(rows):
            raise IndexError(f"slots outside [0, {len(rows)})")
        n = len(rows) if slots is None else len(slots)
        for start in range(0, n, FFN_BLOCK_NEURONS):
            block = slice(start, min(start + FFN_BLOCK_NEURONS, n))
            bundles = _decode_bundles(shape, rows[block] if slots is None else rows[slots[block]])
            up = x @ bundles[-2].T  # (n_tokens, block)
            if up_bias is not None:
                up += up_bias[block]
            if shape.is_gated:
                gate = x @ bundles[0].T
                if gate_bias is not None:
                    gate += gate_bias[block]
                h = activate(shape.activation, gate) * activate(shape.up_activation, up)
            else:
                h = activate(shape.activation, up)
            out += h @ bundles[-1]


def _tiles(matrix: Matrix) -> Iterator[slice]:
    """Row ranges that decode to at most `TILE_BYTES`."""
    step = max(1, TILE_BYTES // (4 * matrix.n_cols))
    for start in range(0, matrix.n_rows, step):
        yield slice(start, min(start + step, matrix.n_rows))


def _decode_bundles(shape: FfnShape, rows: npt.NDArray[np.uint8]) -> F32Array:
    """Parts of some bundles as float32 [parts, n, d_model]."""
    n_parts = len(shape.parts)
    packed = np.ascontiguousarray(rows[:, : n_parts * shape.part.nbytes])
    stored = packed.view(shape.encoding.storage_dtype).reshape(len(rows), n_parts, shape.part.storage_length)
    return np.ascontiguousarray(decode(stored, shape.encoding, shape.d_model).swapaxes(0, 1))
