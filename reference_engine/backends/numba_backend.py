"""The fast backend: checks shapes, then hands addresses to compiled kernels that read the stored bytes themselves.

One token takes matrix-vector kernels that run at memory bandwidth, several take blocked products. A sum over one
row is formed in a fixed order, whatever the number of threads.

Knows: arrays and which kernel takes them. Does not know: files, layers, caches.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from flashfmt.encodings import Encoding, decode
from flashfmt.manifest import Activation
from reference_engine.backends.activations import ACTIVATION_CODES
from reference_engine.backends.numba_attention import attend, norm, rotate
from reference_engine.backends.numba_gemm import ffn_many, matmul_many
from reference_engine.backends.numba_kernels import ffn_one, matmul_one
from reference_engine.backends.numba_runtime import choose_threading_layer, config
from reference_engine.backends.numba_token import PLAN, attention_one
from reference_engine.backends.numba_weights import TAGS
from reference_engine.backends.protocol import (
    AttentionStep,
    AttentionWeights,
    F32Array,
    FfnShape,
    IdArray,
    Matrix,
    Pairing,
)
from reference_engine.machine import usable_cores

typeof: Any = numba.typeof

_F32: Final = np.dtype(np.float32)
_KV_DTYPES: Final = (np.dtype(np.float32), np.dtype(np.float16))
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
        xa, oa = _address(x, (n_tokens, k)), _output_address(out, (n_tokens, n))
        ba = 0 if bias is None else _address(bias, (n,))
        base, stride = _base(matrix.data), matrix.data.strides[0]
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
        angles = (_address(cos, (n_tokens, n_pairs)), _address(sin, (n_tokens, n_pairs)))
        xa = _output_address(x, x.shape)
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
            _KV_TAGS[keys.dtype], _address(q, q.shape), _base(keys), _base(values), row, row * capacity,
            n_heads, n_kv_heads, width, n_tokens, n_past, float(scale), window or 0, _base(out), self._n_threads,
        )  # fmt: skip
        return out

    def bind_attention(self, weights: AttentionWeights) -> AttentionStep | None:
        """See `Backend.bind_attention`: for matrices of one encoding."""
        matrices = (weights.q, weights.k, weights.v, weights.output)
        if len({matrix.encoding for matrix in matrices}) > 1:
            return None
        return _BoundAttention(weights, self._n_threads)

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
            sa = _base(slots)
        n_tokens, k = len(x), shape.d_model
        xa, oa = _address(x, (n_tokens, k)), _output_address(out, (n_tokens, k))
        if n == 0 or n_tokens == 0:
            return
        biases = [0 if bias is None else _address(bias, (n,)) for bias in (up_bias, gate_bias)]
        stored = (TAGS[shape.encoding], _base(rows), shape.stride, sa, n, k, shape.part.nbytes, int(shape.is_gated))
        functions = (*_function(shape.activation), *_function(shape.up_activation))
        numba.set_num_threads(self._n_threads)
        if n_tokens == 1:
            ffn_one(*stored, *biases, *functions, xa, oa, self._n_threads)
        else:
            ffn_many(*stored, *biases, *functions, xa, n_tokens, out, self._n_threads)


class _BoundAttention:
    """`AttentionStep` by one kernel, whose arguments are made ready once."""

    def __init__(self, weights: AttentionWeights, n_threads: int) -> None:
        w = self._weights = weights
        self._n_threads = n_threads
        self._tag = TAGS[w.q.encoding]
        self._plan = np.zeros(1, PLAN)
        matrices = (
            ("q", w.q, w.q_bias),
            ("k", w.k, w.k_bias),
            ("v", w.v, w.v_bias),
            ("output", w.output, w.output_bias),
        )
        n, n_kv, d_model = w.n_heads * w.head_dim, w.n_kv_heads * w.head_dim, w.q.n_cols
        shapes = [(matrix.n_rows, matrix.n_cols) for _, matrix, _ in matrices]
        if shapes != [(n, d_model), (n_kv, d_model), (n_kv, d_model), (d_model, n)]:
            raise ValueError(f"matrices {shapes} do not go together")
        for name, matrix, bias in matrices:
            self._plan[name], self._plan[f"{name}_stride"] = _base(matrix.data), matrix.data.strides[0]
            self._plan[f"{name}_bias"] = 0 if bias is None else _address(bias, (matrix.n_rows,))
        for name, head_norm, length in (("q", w.q_norm, n), ("k", w.k_norm, n_kv)):
            if head_norm is None:
                continue
            size = (length // head_norm.n_vectors,)
            self._plan[f"{name}_rows"] = head_norm.n_vectors
            self._plan[f"{name}_weight"] = 0 if head_norm.weight is None else _address(head_norm.weight, size)
            self._plan[f"{name}_norm_bias"] = 0 if head_norm.bias is None else _address(head_norm.bias, size)
            self._plan["centred"], self._plan["eps"] = head_norm.centred, head_norm.eps
        self._plan["d_model"], self._plan["n_heads"], self._plan["n_kv_heads"] = d_model, w.n_heads, w.n_kv_heads
        self._plan["width"], self._plan["scale"], self._plan["window"] = w.head_dim, w.scale, w.window or 0
        self._plan["interleaved"] = w.pairing == "interleaved"

    def __call__(
        self,
        x: F32Array,
        cos: F32Array | None,
        sin: F32Array | None,
        keys: npt.NDArray[Any],
        values: npt.NDArray[Any],
        *,
        n_past: int,
    ) -> F32Array:
        """See `AttentionStep`."""
        w = self._weights
        n_kv_heads, capacity, width = keys.shape
        if (n_kv_heads, width) != (w.n_kv_heads, w.head_dim) or values.shape != keys.shape:
            raise ValueError(f"keys {keys.shape} and values {values.shape} do not go with the weights")
        if not 0 <= n_past < capacity:
            raise ValueError(f"{n_past + 1} positions exceed the {capacity} that keys and values hold")
        if values.dtype != keys.dtype or not (keys.flags.c_contiguous and values.flags.c_contiguous):
            raise ValueError("keys and values are C-contiguous and of one dtype")
        n_pairs, angles = 0, (0, 0)
        if cos is not None and sin is not None:
            n_pairs = cos.shape[1]
            angles = (_address(cos, (1, n_pairs)), _address(sin, (1, n_pairs)))
            if 2 * n_pairs > width:
                raise ValueError(f"{n_pairs} pairs exceed a head of {width}")
        out = np.empty_like(x)
        half = _KV_DTYPES.index(keys.dtype)
        numba.set_num_threads(self._n_threads)
        attention_one(
            self._tag, self._plan, _address(x, (1, w.q.n_cols)), *angles, n_pairs, _base(keys), _base(values), half,
            capacity * width * keys.itemsize, n_past, _base(out), self._n_threads,
        )  # fmt: skip
        return out


def compile_kernels(encodings: Iterable[Encoding] = TAGS) -> None:
    """Compile every kernel for `encodings`, or load it from the disk cache; runs none."""
    integers = {"int": types.int64, "float": types.float64, "Any": types.float32[:, ::1]}
    special = {"plans": typeof(np.zeros(1, PLAN))}
    tags = [typeof(TAGS[encoding]) for encoding in encodings]
    kv_tags = [typeof(tag) for tag in _KV_TAGS.values()]
    families: list[tuple[Any, list[Any]]] = [
        (matmul_one, tags), (matmul_many, tags), (ffn_one, tags), (ffn_many, tags),
        (attention_one, tags), (attend, kv_tags), (rotate, [None]), (norm, [None]),
    ]  # fmt: skip
    for kernel, kernel_tags in families:
        parameters = inspect.signature(kernel.py_func).parameters.values()
        for tag in kernel_tags:
            kinds = special | {"tag": tag}
            kernel.compile(tuple(kinds.get(p.name) or integers[p.annotation] for p in parameters))


def _base(array: npt.NDArray[Any]) -> int:
    """Address of the first element; `ctypes.data` would take twice as long."""
    address: int = array.__array_interface__["data"][0]
    return address


def _address(array: F32Array, shape: tuple[int, ...]) -> int:
    """Address of a float32 C-contiguous array of a certain shape."""
    if array.shape != shape or array.dtype != _F32 or not array.flags.c_contiguous:
        raise ValueError(f"expected a C-contiguous float32 array {shape}, got {array.dtype} {array.shape}")
    return _base(array)


def _output_address(array: F32Array, shape: tuple[int, ...]) -> int:
    if not array.flags.writeable:
        raise ValueError("the output is read-only")
    return _address(array, shape)


def _function(activation: Activation) -> tuple[int, float]:
    return ACTIVATION_CODES[activation.kind], float(activation.threshold)


def _normalised(x: F32Array, weight: F32Array | None, bias: F32Array | None, eps: float, *, centred: bool) -> F32Array:
    out = np.empty_like(x)
    width = x.shape[-1]
    vectors = [0 if v is None else _address(v, (width,)) for v in (weight, bias)]
    norm(_address(x, x.shape), x.size // width, width, *vectors, float(eps), int(centred), _base(out))
    return out
