"""`TokenPass` by one kernel: what layers are computed with becomes a table of addresses, made once.

Knows: arrays, and the fields of `PLAN`. Does not know: how the kernel computes, files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt

from flashfmt.manifest import Activation
from reference_engine.backends.activations import ACTIVATION_CODES
from reference_engine.backends.numba_arrays import base_address, float_address, optional_address
from reference_engine.backends.numba_token import (
    ATTENTION_INPUT,
    ATTENTION_OUTPUT,
    FFN_INPUT,
    FFN_OUTPUT,
    HIDDEN,
    N_STEPS,
    N_VECTORS,
    PARALLEL,
    PLAN,
    POST_NORM,
    PRE_NORM,
    take_steps,
)
from reference_engine.backends.numba_weights import TAGS
from reference_engine.backends.protocol import AttentionWeights, BlockOrder, F32Array, LayerWeights, Step

_KV_DTYPES: Final = (np.dtype(np.float32), np.dtype(np.float16))
_ORDERS: Final[dict[BlockOrder, int]] = {"pre_norm": PRE_NORM, "post_norm": POST_NORM, "parallel": PARALLEL}


class NumbaPass:
    """`TokenPass`, for layers whose attention matrices have one encoding; see `is_uniform`.

    The FFN is among the steps of layers whose bundles stay in memory and have that encoding, too.

    Raises
    ------
    ValueError
        If weights do not go together.
    """

    def __init__(self, layers: Sequence[LayerWeights], n_threads: int) -> None:
        self._layers = layers  # keeps alive what the table points to
        self._n_threads = n_threads
        attention = layers[0].attention
        self._encoding = attention.q.encoding
        self._d_model = attention.q.n_cols
        self._kv_shape = (len(layers), attention.n_kv_heads, attention.head_dim)
        tables = {w.attention.rotation.table: w.attention.rotation.n_pairs for w in layers if w.attention.rotation}
        self._n_pairs = [tables.get(table, 0) for table in range(max(tables, default=-1) + 1)]
        self._angles = np.zeros((max(1, len(self._n_pairs)), 2 * max(1, *self._n_pairs, 1)), np.float32)
        self._vectors = np.zeros((N_VECTORS, self._d_model), np.float32)
        n_heads = max(w.attention.n_heads + w.attention.n_kv_heads for w in layers)
        self._scratch = np.zeros(2 * n_heads * attention.head_dim, np.float32)
        self.hidden, self.attention_input, self.attention_output, self.ffn_input, self.ffn_output = (
            self._vectors[i : i + 1] for i in (HIDDEN, ATTENTION_INPUT, ATTENTION_OUTPUT, FFN_INPUT, FFN_OUTPUT)
        )
        self._plans = np.array([self._plan(weights) for weights in layers])
        self._places = tuple(base_address(a) for a in (self._vectors, self._scratch, self._angles))
        self._cache: tuple[int, ...] = ()
        self._cached: tuple[npt.NDArray[Any], ...] = ()
        self._n_done = 0
        self._n_past = 0

    def begin(
        self,
        x: F32Array,
        rotations: Sequence[tuple[F32Array, F32Array]],
        keys: npt.NDArray[Any],
        values: npt.NDArray[Any],
        *,
        n_past: int,
    ) -> None:
        """See `TokenPass.begin`."""
        n_layers, n_kv_heads, capacity, width = keys.shape
        if (n_layers, n_kv_heads, width) != self._kv_shape or values.shape != keys.shape:
            raise ValueError(f"keys {keys.shape} and values {values.shape} do not go with the weights")
        if not 0 <= n_past < capacity:
            raise ValueError(f"{n_past + 1} positions exceed the {capacity} that keys and values hold")
        if values.dtype != keys.dtype or not (keys.flags.c_contiguous and values.flags.c_contiguous):
            raise ValueError("keys and values are C-contiguous and of one dtype")
        float_address(x, (1, self._d_model))
        for row, n_pairs, turn in zip(self._angles, self._n_pairs, rotations, strict=False):
            for i, values_of_turn in enumerate(turn):
                if n_pairs:
                    row[i * n_pairs : (i + 1) * n_pairs] = values_of_turn[0]
        self.hidden[:] = x
        half = _KV_DTYPES.index(keys.dtype)
        self._cache = (base_address(keys), base_address(values), half, capacity * width * keys.itemsize)
        self._cached = (keys, values)  # keeps them alive
        self._n_done, self._n_past = 0, n_past

    def advance(self, layer: int, step: Step) -> None:
        """See `TokenPass.advance`."""
        end = N_STEPS * layer + step + 1
        if not (self._cache and self._n_done < end <= N_STEPS * len(self._layers)):
            raise ValueError(f"step {step.name} of layer {layer} cannot follow {self._n_done} steps")
        numba.set_num_threads(self._n_threads)
        take_steps(
            TAGS[self._encoding], self._plans, self._n_done, end, *self._places, *self._cache, self._n_past,
            self._n_threads,
        )  # fmt: skip
        self._n_done = end

    def computes_ffn(self, layer: int) -> bool:
        """See `TokenPass.computes_ffn`."""
        return bool(self._plans[layer]["rows"])

    def _plan(self, weights: LayerWeights) -> npt.NDArray[Any]:
        """One record of `PLAN`."""
        plan = np.zeros((), PLAN)
        d_model, ffn = self._d_model, weights.ffn
        self._describe_attention(plan, weights.attention)
        plan["order"], plan["shared_norm"] = _ORDERS[weights.order], weights.ffn_norm is None
        plan["centred"], plan["eps"] = weights.attention_norm.centred, weights.attention_norm.eps
        for name, norm in (("attention", weights.attention_norm), ("ffn", weights.ffn_norm or weights.attention_norm)):
            if (norm.centred, norm.eps) != (weights.attention_norm.centred, weights.attention_norm.eps):
                raise ValueError("the norms of a layer are of one kind")
            plan[f"{name}_norm_weight"] = optional_address(norm.weight, (d_model,))
            plan[f"{name}_norm_bias"] = optional_address(norm.bias, (d_model,))
        plan["down_bias"] = optional_address(weights.down_bias, (d_model,))
        rows = weights.bundles
        if rows is None or ffn.encoding != self._encoding:
            return plan
        if rows.shape[1] != ffn.stride or rows.dtype != np.uint8 or not rows.flags.c_contiguous:
            raise ValueError(f"bundles are C-contiguous uint8 rows of {ffn.stride} bytes, not {rows.shape}")
        plan["rows"], plan["row_stride"], plan["n_neurons"] = base_address(rows), ffn.stride, len(rows)
        plan["part"], plan["gated"] = ffn.part.nbytes, ffn.is_gated
        plan["gate_bias"] = optional_address(weights.gate_bias, (len(rows),))
        plan["up_bias"] = optional_address(weights.up_bias, (len(rows),))
        plan["activation"], plan["threshold"] = activation_code(ffn.activation)
        plan["up_activation"], plan["up_threshold"] = activation_code(ffn.up_activation)
        return plan

    def _describe_attention(self, plan: npt.NDArray[Any], w: AttentionWeights) -> None:
        matrices = {"q": (w.q, w.q_bias), "k": (w.k, w.k_bias), "v": (w.v, w.v_bias)}
        matrices["output"] = (w.output, w.output_bias)
        n, n_kv, d_model = w.n_heads * w.head_dim, w.n_kv_heads * w.head_dim, self._d_model
        shapes = [(matrix.n_rows, matrix.n_cols) for matrix, _ in matrices.values()]
        if shapes != [(n, d_model), (n_kv, d_model), (n_kv, d_model), (d_model, n)]:
            raise ValueError(f"matrices {shapes} do not go together")
        if (w.n_kv_heads, w.head_dim) != self._kv_shape[1:]:
            raise ValueError("all layers have keys of one shape")
        for name, (matrix, bias) in matrices.items():
            plan[name], plan[f"{name}_stride"] = base_address(matrix.data), matrix.data.strides[0]
            plan[f"{name}_bias"] = optional_address(bias, (matrix.n_rows,))
        for name, norm, n_heads in (("q", w.q_norm, w.n_heads), ("k", w.k_norm, w.n_kv_heads)):
            if norm is None:
                continue
            size = (w.head_dim,) if w.norm_each_head else (n_heads * w.head_dim,)
            plan[f"{name}_norm_rows"] = n_heads if w.norm_each_head else 1
            plan[f"{name}_norm_weight"] = optional_address(norm.weight, size)
            plan[f"{name}_norm_bias"] = optional_address(norm.bias, size)
            plan["head_centred"], plan["head_eps"] = norm.centred, norm.eps
        plan["d_model"], plan["n_heads"], plan["n_kv_heads"] = d_model, w.n_heads, w.n_kv_heads
        plan["width"], plan["scale"], plan["window"] = w.head_dim, w.scale, w.window or 0
        if w.rotation is not None:
            if self._n_pairs[w.rotation.table] != w.rotation.n_pairs or 2 * w.rotation.n_pairs > w.head_dim:
                raise ValueError(f"{w.rotation.n_pairs} pairs do not go with a head of {w.head_dim}")
            plan["angles"] = w.rotation.table * self._angles.strides[0]
            plan["n_pairs"], plan["interleaved"] = w.rotation.n_pairs, w.rotation.pairing == "interleaved"


def is_uniform(layers: Sequence[LayerWeights]) -> bool:
    """Whether all attention matrices have one encoding."""
    attentions = [weights.attention for weights in layers]
    return len({matrix.encoding for w in attentions for matrix in (w.q, w.k, w.v, w.output)}) == 1


def activation_code(activation: Activation) -> tuple[int, float]:
    """An activation as kernels take it: code and threshold."""
    return ACTIVATION_CODES[activation.kind], float(activation.threshold)
