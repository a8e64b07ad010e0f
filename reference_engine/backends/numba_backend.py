"""The fast backend: checks shapes, then hands addresses to compiled kernels that read the stored bytes themselves.

One token takes matrix-vector kernels that run at memory bandwidth, several take blocked products. A sum over one
row is formed in a fixed order, whatever the number of threads.

Knows: arrays and which kernel takes them. Does not know: files, layers, caches.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from flashfmt.encodings import Encoding, decode
from reference_engine.backends.numba_arrays import base_address, float_address, optional_address, output_address
from reference_engine.backends.numba_attention import attend, norm, rotate
from reference_engine.backends.numba_gemm import ffn_many, matmul_many
from reference_engine.backends.numba_kernels import ffn_one, matmul_one
from reference_engine.backends.numba_pass import NumbaPass, activation_code, is_uniform
from reference_engine.backends.numba_runtime import choose_threading_layer, config
from reference_engine.backends.numba_selection import NumbaSelection, rows_above
from reference_engine.backends.numba_token import PLAN, take_steps
from reference_engine.backends.numba_weights import TAGS
from reference_engine.backends.protocol import (
    F32Array,
    FfnShape,
    IdArray,
    LayerWeights,
    Matrix,
    Pairing,
    Selection,
    TokenPass,
)
from reference_engine.machine import usable_cores

typeof: Any = numba.typeof

_KV_TAGS: Final = {np.dtype(np.float32): TAGS[Encoding.F32], np.dtype(np.float16): TAGS[Encoding.F16]}


class NumbaBackend:
    """`Backend` with numba.

    Parameters
    ----------
    n_threads : threads that share the work of a call; the usable cores where None. More than numba may start
        (``NUMBA_NUM_THREADS``) are not started.
    """

    name: Final = "numba"

    def __init__(self, n_threads: int | None = None) -> None:
        choose_threading_layer()
        limit: int = config.NUMBA_NUM_THREADS
        self._n_threads = min(usable_cores() if n_threads is None else n_threads, limit)

    @property
    def n_threads(self) -> int:
        """Threads that share the work of one call."""
        return self._n_threads

    def prepare(self, encodings: Iterable[Encoding]) -> None:
        """See `Backend.prepare`."""
        compile_kernels(encodings)

    def matmul(
        self, matrix: Matrix, x: F32Array, out: F32Array | None = None, bias: F32Array | None = None
    ) -> F32Array:
        """See `Backend.matmul`."""
        n_tokens = len(x)
        n, k = matrix.n_rows, matrix.n_cols
        if out is None:
            out = np.empty((n_tokens, n), np.float32)
        xa, oa = float_address(x, (n_tokens, k)), output_address(out, (n_tokens, n))
        ba = optional_address(bias, (n,))
        base, stride = base_address(matrix.data), matrix.data.strides[0]
        numba.set_num_threads(self._n_threads)
        if n_tokens == 1:
            matmul_one(TAGS[matrix.encoding], base, stride, n, xa, k, oa, ba, self._n_threads)
        elif n_tokens:
            matmul_many(TAGS[matrix.encoding], base, stride, n, xa, n_tokens, k, oa, ba, self._n_threads)
        return out

    def rows(self, matrix: Matrix, ids: IdArray) -> F32Array:
        """See `Backend.rows`."""
        if ids.size and not 0 <= ids.min() <= ids.max() < matrix.n_rows:
            raise IndexError(f"row ids outside [0, {matrix.n_rows})")
        return decode(matrix.data[ids], matrix.encoding, matrix.n_cols)

    def layer_norm(self, x: F32Array, weight: F32Array | None, bias: F32Array | None, eps: float) -> F32Array:
        """See `Backend.layer_norm`."""
        return _normalised(x, weight, bias, eps, centred=True)

    def rms_norm(self, x: F32Array, weight: F32Array | None, eps: float) -> F32Array:
        """See `Backend.rms_norm`."""
        return _normalised(x, weight, None, eps, centred=False)

    def rotate(self, x: F32Array, cos: F32Array, sin: F32Array, pairing: Pairing) -> None:
        """See `Backend.rotate`."""
        n_tokens, n_heads, width = x.shape
        n_pairs = cos.shape[1]
        if 2 * n_pairs > width:
            raise ValueError(f"{n_pairs} pairs exceed a head of {width}")
        angles = (float_address(cos, (n_tokens, n_pairs)), float_address(sin, (n_tokens, n_pairs)))
        xa = output_address(x, x.shape)
        rotate(xa, n_tokens, n_heads, width, *angles, n_pairs, int(pairing == "interleaved"))

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
        n_tokens, n_heads, width = q.shape
        n_kv_heads, capacity, kv_width = keys.shape
        if kv_width != width or values.shape != keys.shape or values.dtype != keys.dtype:
            raise ValueError(f"queries {q.shape}, keys {keys.shape} and values {values.shape} do not go together")
        if n_past < 0 or n_past + n_tokens > capacity:
            raise ValueError(f"{n_past + n_tokens} positions exceed the {capacity} that keys and values hold")
        if not (keys.flags.c_contiguous and values.flags.c_contiguous):
            raise ValueError("keys and values are C-contiguous")
        out = np.empty_like(q)
        numba.set_num_threads(self._n_threads)
        row = width * keys.itemsize
        attend(
            _KV_TAGS[keys.dtype], float_address(q, q.shape), base_address(keys), base_address(values), row,
            row * capacity, n_heads, n_kv_heads, width, n_tokens, n_past, float(scale), window or 0, base_address(out),
            self._n_threads,
        )  # fmt: skip
        return out

    def bind_layers(self, layers: Sequence[LayerWeights]) -> TokenPass | None:
        """See `Backend.bind_layers`: for attention matrices of one encoding."""
        return NumbaPass(layers, self._n_threads) if layers and is_uniform(layers) else None

    def bind_selector(
        self, matrices: Sequence[Matrix], bias: F32Array | None, cut: float, *, signed: bool
    ) -> Selection | None:
        """See `Backend.bind_selector`: for one or two matrices of one encoding."""
        if len(matrices) > 2 or len({matrix.encoding for matrix in matrices}) > 1:
            return None
        return NumbaSelection(matrices, bias, cut, signed=signed, n_threads=self._n_threads)

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
        """See `Backend.ffn`."""
        if rows.shape[1] != shape.stride or rows.dtype != np.uint8 or not rows.flags.c_contiguous:
            raise ValueError(f"bundles are C-contiguous uint8 rows of {shape.stride} bytes, not {rows.shape}")
        n, sa = len(rows), 0
        if slots is not None:
            n = len(slots)
            if slots.dtype != np.int32 or slots.ndim != 1 or not slots.flags.c_contiguous:
                raise ValueError(f"slots are a contiguous int32 vector, not {slots.dtype} {slots.shape}")
            if n and not 0 <= slots.min() <= slots.max() < len(rows):
                raise IndexError(f"slots outside [0, {len(rows)})")
            sa = base_address(slots)
        n_tokens, k = len(x), shape.d_model
        xa, oa = float_address(x, (n_tokens, k)), output_address(out, (n_tokens, k))
        if n == 0 or n_tokens == 0:
            return
        biases = [optional_address(bias, (n,)) for bias in (up_bias, gate_bias)]
        stored = (
            TAGS[shape.encoding],
            base_address(rows),
            shape.stride,
            sa,
            n,
            k,
            shape.part.nbytes,
            int(shape.is_gated),
        )
        functions = (*activation_code(shape.activation), *activation_code(shape.up_activation))
        numba.set_num_threads(self._n_threads)
        if n_tokens == 1:
            ffn_one(*stored, *biases, *functions, xa, oa, self._n_threads)
        else:
            ffn_many(*stored, *biases, *functions, xa, n_tokens, out, self._n_threads)


def compile_kernels(encodings: Iterable[Encoding] = TAGS) -> None:
    """Compile every kernel for `encodings`, or load it from the disk cache; runs none."""
    integers = {"int": types.int64, "float": types.float64, "Any": types.float32[:, ::1]}
    special = {"plans": typeof(np.zeros(1, PLAN))}
    tags = [typeof(TAGS[encoding]) for encoding in encodings]
    kv_tags = [typeof(tag) for tag in _KV_TAGS.values()]
    families: list[tuple[Any, list[Any]]] = [
        (matmul_one, tags), (matmul_many, tags), (ffn_one, tags), (ffn_many, tags),
        (take_steps, tags), (rows_above, tags), (attend, kv_tags), (rotate, [None]), (norm, [None]),
    ]  # fmt: skip
    for kernel, kernel_tags in families:
        parameters = inspect.signature(kernel.py_func).parameters.values()
        for tag in kernel_tags:
            kinds = special | {"tag": tag}
            kernel.compile(tuple(kinds.get(p.name) or integers[p.annotation] for p in parameters))


def _normalised(x: F32Array, weight: F32Array | None, bias: F32Array | None, eps: float, *, centred: bool) -> F32Array:
    out = np.empty_like(x)
    width = x.shape[-1]
    vectors = [optional_address(v, (width,)) for v in (weight, bias)]
    norm(float_address(x, x.shape), x.size // width, width, *vectors, float(eps), int(centred), base_address(out))
    return out
