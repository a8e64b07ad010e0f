"""`TokenPass` on a device: the steps of one token's layers as CUDA graphs, one launch instead of a dozen a layer.

A stretch of steps is taken launch by launch the first time, captured the second time and replayed from then on. What
changes from token to token (hidden state, angles, number of positions) lies in arrays that `begin` fills; what lies
between is put into memory that all steps share, so that a graph's addresses stay good.

Knows: the order of the steps of a layer. Does not know: kernels, CuPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from reference_engine.backends.cupy_protocol import Device, DeviceArray, Graph
from reference_engine.backends.protocol import (
    AttentionWeights,
    F32Array,
    LayerRotation,
    LayerWeights,
    NormWeights,
    Step,
)

if TYPE_CHECKING:
    from reference_engine.backends.cupy_backend import CupyBackend

_N_STEPS: Final = len(Step)


class CupyPass:
    """See `TokenPass`.

    Parameters
    ----------
    layers : all of them `is_bindable`. What their arrays hold may change, but not where they are.
    """

    def __init__(self, backend: CupyBackend, layers: Sequence[LayerWeights]) -> None:
        device = self._device = backend.device
        self._owner = backend
        self._workspace = _Workspace(device)
        self._backend = type(backend)(device, empty=self._workspace.empty)
        self._layers = layers
        self._d_model = layers[0].attention.q.n_cols
        self.hidden, self.attention_input, self.attention_output, self.ffn_input, self.ffn_output, self._zeros = (
            device.zeros((1, self._d_model), np.float32) for _ in range(6)
        )
        self._past = device.zeros((1,), np.int32)
        self._angles = _angle_buffers(device, layers)
        self._keys: DeviceArray = None
        self._values: DeviceArray = None
        self._cache: tuple[object, ...] = ()
        self._n_done = 0
        self._steps: dict[Step, Callable[[int], None]] = {  # others are taken with the one behind them
            Step.ATTENTION_INPUT: self._attention_input,
            Step.FFN_INPUT: self._attention,
            Step.FFN_OUTPUT: self._ffn,
            Step.LAYER_OUTPUT: self._layer_output,
        }
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._taken: set[tuple[int, int]] = set()

    def begin(
        self,
        x: F32Array,
        rotations: Sequence[tuple[F32Array, F32Array]],
        keys: npt.NDArray[Any],
        values: npt.NDArray[Any],
        *,
        n_past: int,
    ) -> None:
        """See `TokenPass.begin`; everything lies on the device."""
        attention = self._layers[0].attention
        expected = (len(self._layers), attention.n_kv_heads, attention.head_dim)
        if (keys.shape[0], keys.shape[1], keys.shape[3]) != expected or values.shape != keys.shape:
            raise ValueError(f"keys {keys.shape} and values {values.shape} do not go with the weights")
        if not 0 <= n_past < keys.shape[2]:
            raise ValueError(f"{n_past + 1} positions exceed the {keys.shape[2]} that keys and values hold")
        if x.shape != self.hidden.shape or x.dtype != np.float32:
            raise ValueError(f"expected float32 {self.hidden.shape}, got {x.dtype} {x.shape}")
        device = self._device
        cache = (device.address(keys), device.address(values), keys.shape, keys.dtype)
        if cache != self._cache:
            self._graphs.clear()
            self._taken.clear()
        self._cache, self._keys, self._values, self._n_done = cache, keys, values, 0
        device.copy(self.hidden, x)
        device.write(self._past, np.array([n_past], np.int32))
        for table, buffers in self._angles.items():
            for buffer, turn in zip(buffers, rotations[table], strict=True):
                device.copy(buffer, turn)

    def advance(self, layer: int, step: Step) -> None:
        """See `TokenPass.advance`."""
        span = (self._n_done, _N_STEPS * layer + step + 1)
        if not (self._cache and span[0] < span[1] <= _N_STEPS * len(self._layers)):
            raise ValueError(f"step {step.name} of layer {layer} cannot follow {self._n_done} steps")
        self._n_done = span[1]
        if all(Step(index % _N_STEPS) not in self._steps for index in range(*span)):
            return  # nothing to capture
        if self._owner.uses_graphs and span in self._taken:
            if span not in self._graphs:
                self._graphs[span] = self._device.capture(partial(self._take, *span))
            self._device.replay(self._graphs[span])
            return
        self._take(*span)
        self._taken.add(span)

    def computes_ffn(self, layer: int) -> bool:
        """See `TokenPass.computes_ffn`."""
        return self._layers[layer].bundles is not None

    def _take(self, first: int, last: int) -> None:
        for index in range(first, last):
            layer, step = divmod(index, _N_STEPS)
            self._workspace.restart()
            take = self._steps.get(Step(step))
            if take is not None:
                take(layer)

    def _attention_input(self, layer: int) -> None:
        w = self._layers[layer]
        if w.order == "post_norm":
            self._device.copy(self.attention_input, self.hidden)
        else:
            self._backend.normalised(self.hidden, w.attention_norm, self.attention_input)

    def _attention(self, layer: int) -> None:
        """Attention, and all between it and the FFN."""
        w, b = self._layers[layer], self._backend
        self._attend(w.attention, self._keys[layer], self._values[layer])
        ffn_norm = w.ffn_norm or w.attention_norm
        match w.order:
            case "pre_norm":
                b.add(self.hidden, self.attention_output)
                b.normalised(self.hidden, ffn_norm, self.ffn_input)
            case "post_norm":
                b.add(self.hidden, self.attention_output)
                b.normalised(self.hidden, w.attention_norm, self.ffn_input)
                self._device.copy(self.hidden, self.ffn_input)
            case "parallel":
                if w.ffn_norm is None:
                    self._device.copy(self.ffn_input, self.attention_input)
                else:
                    b.normalised(self.hidden, ffn_norm, self.ffn_input)
                b.add(self.hidden, self.attention_output)
        self._device.copy(self.ffn_output, self._zeros if w.down_bias is None else w.down_bias)

    def _attend(self, w: AttentionWeights, keys: DeviceArray, values: DeviceArray) -> None:
        b, x = self._backend, self.attention_input
        q = self._head_norm(w, w.q_norm, b.matmul(w.q, x, bias=w.q_bias)).reshape(1, w.n_heads, w.head_dim)
        k = self._head_norm(w, w.k_norm, b.matmul(w.k, x, bias=w.k_bias)).reshape(1, w.n_kv_heads, w.head_dim)
        v = b.matmul(w.v, x, bias=w.v_bias).reshape(1, w.n_kv_heads, w.head_dim)
        if w.rotation is not None:
            for vectors in (q, k):
                b.rotate(vectors, *self._angles[w.rotation.table], w.rotation.pairing)
        most = keys.shape[1] - 1
        b.append_kv(k, v, keys, values, most, past=self._past)
        mixed = b.attend(q, keys, values, n_past=most, scale=w.scale, window=w.window, past=self._past)
        b.matmul(w.output, mixed.reshape(1, -1), self.attention_output, w.output_bias)

    def _head_norm(self, w: AttentionWeights, norm: NormWeights | None, x: F32Array) -> F32Array:
        if norm is None:
            return x
        return self._backend.normalised(x.reshape(-1, w.head_dim) if w.norm_each_head else x, norm)

    def _ffn(self, layer: int) -> None:
        w = self._layers[layer]
        if w.bundles is not None:
            biases = {"up_bias": w.up_bias, "gate_bias": w.gate_bias}
            self._backend.ffn(w.ffn, w.bundles, None, self.ffn_input, self.ffn_output, **biases)

    def _layer_output(self, layer: int) -> None:
        w, b = self._layers[layer], self._backend
        b.add(self.hidden, self.ffn_output)
        if w.order == "post_norm":
            self._device.copy(self.hidden, b.normalised(self.hidden, w.ffn_norm or w.attention_norm))


class _Workspace:
    """Memory for what lies between the arrays of one step: the same for every step, so that graphs may name it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._arrays: list[DeviceArray] = []
        self._outgrown: list[DeviceArray] = []  # graphs may still name them
        self._next = 0

    def restart(self) -> None:
        """Hand out the same memory again."""
        self._next = 0

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """See `Device.empty`; valid until the step ends."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if self._next == len(self._arrays):
            self._arrays.append(self._device.empty((nbytes,), np.uint8))
        if self._arrays[self._next].nbytes < nbytes:
            self._outgrown.append(self._arrays[self._next])
            self._arrays[self._next] = self._device.empty((nbytes,), np.uint8)
        array = self._arrays[self._next]
        self._next += 1
        return array[:nbytes].view(dtype).reshape(shape)


def is_bindable(w: LayerWeights) -> bool:
    """Whether no RMS norm of a layer has a bias: the backend adds it apart, so no one kernel has the same bits."""
    norms = (w.attention_norm, w.ffn_norm, w.attention.q_norm, w.attention.k_norm)
    return all(norm is None or norm.centred or norm.bias is None for norm in norms)


def _angle_buffers(device: Device, layers: Sequence[LayerWeights]) -> dict[int, tuple[DeviceArray, DeviceArray]]:
    """Room for the cosines and sines of each table that layers turn by."""
    rotations = {w.attention.rotation.table: w.attention.rotation for w in layers if w.attention.rotation is not None}

    def room(rotation: LayerRotation) -> tuple[DeviceArray, DeviceArray]:
        shape = (1, rotation.n_pairs)
        return device.zeros(shape, np.float32), device.zeros(shape, np.float32)

    return {table: room(rotation) for table, rotation in rotations.items()}
