"""The backend on a CUDA device: checks shapes, then launches kernels that read the stored bytes themselves.

The same functions as the other backends over device arrays: matrices, activations, keys, values, bundles and biases
lie on the device. Ids and slots may lie on either side; those on the host are checked, those on the device were
checked by whoever put them there. Nothing here waits for the device.

Up to `FEW_TOKENS` tokens take kernels that run at memory bandwidth, more take tiles. Sums have a fixed order, so the
promises of `protocol` hold.

Knows: arrays and which kernel takes them. Does not know: files, layers, caches, CuPy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from flashfmt.encodings import Encoding, PartLayout, part_layout
from flashfmt.manifest import Activation
from reference_engine.backends.activations import ACTIVATION_CODES
from reference_engine.backends.cupy_protocol import Device, DeviceArray
from reference_engine.backends.protocol import (
    FFN_BLOCK_NEURONS,
    F32Array,
    FfnShape,
    IdArray,
    LayerWeights,
    Matrix,
    NormWeights,
    Pairing,
    Selection,
    TokenPass,
)

FEW_TOKENS: Final = 8
MAX_HEAD_DIM: Final = 512
_TILE: Final = 64
_TILE_THREADS: Final = 256
_WARPS: Final = 8  # MATVEC_WARPS
_WARP_THREADS: Final = 32
_DOWN_THREADS: Final = 64
_DOWN_GROUPS: Final = 4
_ATTEND_THREADS: Final = 128
_STRETCH: Final = 128  # ATTEND_STRETCH
_STRETCHES: Final = 64  # ATTEND_BLOCKS
_COMPACT_THREADS: Final = 1024
_THREADS: Final = 256
_UNIT_WEIGHTS: Final = {Encoding.F32: 4, Encoding.F16: 8, Encoding.BF16: 8, Encoding.Q8: 16, Encoding.Q4: 16}
_KV_NAMES: Final = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16"}

i32, i64, f32 = np.int32, np.int64, np.float32


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Rows of `n` weights: row i begins `part` bytes into row ``slots[i]``, or i, of `base`."""

    encoding: Encoding
    base: DeviceArray
    stride: int
    slots: DeviceArray | None
    part: int
    n_rows: int
    n: int


@dataclass(frozen=True, slots=True, eq=False)
class _Bundles:
    """The bundles of one call."""

    shape: FfnShape
    rows: DeviceArray
    slots: DeviceArray | None
    n: int
    up_bias: DeviceArray | None
    gate_bias: DeviceArray | None

    def projection(self, part: int) -> _Rows:
        """One part of every bundle."""
        s = self.shape
        return _Rows(s.encoding, self.rows, s.stride, self.slots, part * s.part.nbytes, self.n, s.d_model)


class CupyBackend:
    """`Backend` on a device.

    Parameters
    ----------
    empty : makes arrays for results and what is between them, as `Device.empty` does, which is the default.

    Attributes
    ----------
    uses_graphs : whether passes of one token are captured and replayed.
    """

    name: Final = "cupy"
    n_threads: Final = 1

    def __init__(self, device: Device, *, empty: Callable[..., DeviceArray] | None = None) -> None:
        self.device = device
        self.uses_graphs = True
        self._empty = empty or device.empty

    def prepare(self, encodings: Iterable[Encoding]) -> None:
        """See `Backend.prepare`; opening the device has compiled everything."""

    def matmul(
        self, matrix: Matrix, x: F32Array, out: F32Array | None = None, bias: F32Array | None = None
    ) -> F32Array:
        """See `Backend.matmul`."""
        n_tokens, n, n_rows = len(x), matrix.n_cols, matrix.n_rows
        _require(x, (n_tokens, n))
        if out is None:
            out = self._empty((n_tokens, n_rows), f32)
        _require(out, (n_tokens, n_rows))
        _require(bias, (n_rows,))
        if not n_tokens or not n_rows:
            return out
        stride = matrix.data.strides[0]
        name = matrix.encoding.value
        if n_tokens <= FEW_TOKENS:
            width = _tokens_at_once(n_tokens)
            aligned = self._is_aligned(matrix.data, stride, part_layout(matrix.encoding, n), x)
            grid = (_blocks(n_rows, 2 * _WARPS), _blocks(n_tokens, width), 1)
            self._launch(
                f"matvec_{width}_{name}", grid, _WARPS * _WARP_THREADS,
                matrix.data, i64(stride), i32(n_rows), i32(n), x, i32(n_tokens), bias, i32(aligned), out,
            )  # fmt: skip
        else:
            self._matmul_many(_Rows(matrix.encoding, matrix.data, stride, None, 0, n_rows, n), x, bias, out)
        return out

    def rows(self, matrix: Matrix, ids: IdArray) -> F32Array:
        """See `Backend.rows`. The ids lie on the host."""
        if ids.size and not 0 <= ids.min() <= ids.max() < matrix.n_rows:
            raise IndexError(f"row ids outside [0, {matrix.n_rows})")
        out: F32Array = self._empty((len(ids), matrix.n_cols), f32)
        if len(ids):
            self._launch(
                f"decode_rows_{matrix.encoding.value}", (len(ids), 1, 1), _THREADS,
                matrix.data, i64(matrix.data.strides[0]), self.device.upload(ids.astype(i32)), i32(matrix.n_cols), out,
            )  # fmt: skip
        return out

    def layer_norm(self, x: F32Array, weight: F32Array | None, bias: F32Array | None, eps: float) -> F32Array:
        """See `Backend.layer_norm`."""
        return self.normalised(x, NormWeights(True, eps, weight, bias))

    def rms_norm(self, x: F32Array, weight: F32Array | None, eps: float) -> F32Array:
        """See `Backend.rms_norm`."""
        return self.normalised(x, NormWeights(False, eps, weight, None))

    def normalised(self, x: F32Array, norm: NormWeights, out: F32Array | None = None) -> F32Array:
        """Norm over the last axis of `x`, to `out` or a new array."""
        width = x.shape[-1]
        if out is None:
            out = self._empty(x.shape, f32)
        for array in (x, out):
            _require(array, x.shape)
        _require(norm.weight, (width,))
        _require(norm.bias, (width,))
        if x.size:
            arguments = (x, i32(width), norm.weight, norm.bias, f32(norm.eps), i32(norm.centred), out)
            self._launch("norm_rows", (x.size // width, 1, 1), _THREADS, *arguments)
        return out

    def add(self, x: F32Array, y: F32Array) -> None:
        """Add `y` to `x`, of one shape."""
        _require(x, x.shape)
        _require(y, x.shape)
        if x.size:
            self._launch("add_values", (_blocks(x.size, _THREADS), 1, 1), _THREADS, x, y, i32(x.size), x)

    def rotate(self, x: F32Array, cos: F32Array, sin: F32Array, pairing: Pairing) -> None:
        """See `Backend.rotate`."""
        n_tokens, n_heads, width = x.shape
        n_pairs = cos.shape[1]
        if 2 * n_pairs > width:
            raise ValueError(f"{n_pairs} pairs exceed a head of {width}")
        _require(x, x.shape)
        _require(cos, (n_tokens, n_pairs))
        _require(sin, (n_tokens, n_pairs))
        n = n_tokens * n_heads * n_pairs
        if n:
            self._launch(
                "rotate_pairs", (_blocks(n, _THREADS), 1, 1), _THREADS,
                x, i32(n_tokens), i32(n_heads), i32(width), cos, sin, i32(n_pairs), i32(pairing == "interleaved"),
            )  # fmt: skip

    def append_kv(
        self,
        new_keys: F32Array,
        new_values: F32Array,
        keys: npt.NDArray[Any],
        values: npt.NDArray[Any],
        n_past: int,
        *,
        past: DeviceArray | None = None,
    ) -> None:
        """Store [n_new, n_kv_heads, head_dim] behind `n_past` positions of [n_kv_heads, capacity, head_dim].

        `past` as in `attend`.
        """
        n_new, n_kv_heads, width = new_keys.shape
        _require(new_keys, new_keys.shape)
        _require(new_values, new_keys.shape)
        name = _kv_name(keys, values)
        if keys.shape[::2] != (n_kv_heads, width) or n_past + n_new > keys.shape[1]:
            raise ValueError(f"{new_keys.shape} do not fit behind {n_past} positions of {keys.shape}")
        if new_keys.size:
            self._launch(
                f"append_kv_{name}", (_blocks(new_keys.size, _THREADS), 1, 1), _THREADS,
                new_keys, new_values, i32(n_new), i32(n_kv_heads), i32(width), past, i32(n_past),
                i32(keys.shape[1]), keys, values,
            )  # fmt: skip

    def attend(
        self,
        q: F32Array,
        keys: npt.NDArray[Any],
        values: npt.NDArray[Any],
        *,
        n_past: int,
        scale: float,
        window: int | None = None,
        past: DeviceArray | None = None,
    ) -> F32Array:
        """See `Backend.attend`; heads are at most `MAX_HEAD_DIM` wide.

        `past`, int32 [1] on the device, takes the place of `n_past` where it is given; `n_past` is then the most that
        it may be.
        """
        n_tokens, n_heads, width = q.shape
        n_kv_heads, capacity, kv_width = keys.shape
        _require(q, q.shape)
        name = _kv_name(keys, values)
        if kv_width != width or values.shape != keys.shape or width > MAX_HEAD_DIM:
            raise ValueError(f"queries {q.shape}, keys {keys.shape} and values {values.shape} do not go together")
        if n_past < 0 or n_past + n_tokens > capacity:
            raise ValueError(f"{n_past + n_tokens} positions exceed the {capacity} that keys and values hold")
        out: F32Array = self._empty(q.shape, f32)
        if not q.size:
            return out
        n_stretches = attention_stretches(n_tokens, n_past + n_tokens)
        partial = self._empty((n_tokens, n_heads, n_stretches, width + 2), f32)
        self._launch(
            f"attend_{4 if width <= 4 * _WARP_THREADS else 16}_{name}", (n_stretches, n_heads, n_tokens),
            _ATTEND_THREADS, q, keys, values, i32(n_heads), i32(n_kv_heads), i32(width), i32(capacity), past,
            i32(n_past), f32(scale), i32(window or 0), partial,
        )  # fmt: skip
        grid = (n_tokens * n_heads, 1, 1)
        arguments = (partial, i32(n_tokens), past, i32(n_past), i32(width), out)
        self._launch("attend_combine", grid, _ATTEND_THREADS, *arguments)
        return out

    def bind_layers(self, layers: Sequence[LayerWeights]) -> TokenPass | None:
        """See `Backend.bind_layers`; None where RMS norms have a bias."""
        from reference_engine.backends.cupy_pass import CupyPass, is_bindable

        return CupyPass(self, layers) if all(map(is_bindable, layers)) else None

    def bind_selector(
        self, matrices: Sequence[Matrix], bias: F32Array | None, cut: float, *, signed: bool
    ) -> Selection | None:
        """See `Backend.bind_selector`: a device's selectors are its own."""
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
        """See `Backend.ffn`."""
        if rows.shape[1] != shape.stride or rows.dtype != np.uint8 or not rows.flags.c_contiguous:
            raise ValueError(f"bundles are C-contiguous uint8 rows of {shape.stride} bytes, not {rows.shape}")
        n = len(rows) if slots is None else len(slots)
        n_tokens, d_model = len(x), shape.d_model
        _require(x, (n_tokens, d_model))
        _require(out, (n_tokens, d_model))
        for bias in (up_bias, gate_bias):
            _require(bias, (n,))
        if slots is not None:
            slots = self._checked_slots(slots, len(rows))
        if not n or not n_tokens:
            return
        bundles = _Bundles(shape, rows, slots, n, up_bias, gate_bias)
        if n_tokens <= FEW_TOKENS:
            self._ffn_few(bundles, x, out)
        else:
            self._ffn_many(bundles, x, out)

    def activate(
        self,
        activation: Activation,
        x: F32Array,
        up_activation: Activation | None = None,
        up: F32Array | None = None,
    ) -> F32Array:
        """Apply an activation to a finished projection, in place; with `up`, multiply by that, activated.

        Parameters
        ----------
        x, up : float32 of one shape; what is behind the gate, and the up projection, where there is a gate.

        Returns
        -------
        `x`, or `up`, which then has the product.
        """
        _require(x, x.shape)
        _require(up, x.shape)
        out = x if up is None else up
        gate = None if up is None else x
        functions = (*_function(activation), *_function(up_activation or activation))
        if x.size:
            grid = (_blocks(x.size, _THREADS), 1, 1)
            self._launch("ffn_activate", grid, _THREADS, gate, out, i32(x.size), *functions, out)
        return out

    def active_ids(self, scores: F32Array, cut: float, *, magnitude: bool = False) -> npt.NDArray[np.int32]:
        """Neurons whose score exceeds `cut` for any token: found on the device, handed to the host. Waits for them.

        Parameters
        ----------
        scores : float32 [n_tokens, n_neurons], on the device.
        magnitude : compare the size of the scores.

        Returns
        -------
        int32, sorted, unique; a host array.
        """
        n_tokens, n = scores.shape
        _require(scores, (n_tokens, n))
        found = self._empty((1 + n,), i32)
        arguments = (scores, i32(n_tokens), i32(n), f32(cut), i32(magnitude), found)
        self._launch("compact_active", (1, 1, 1), _COMPACT_THREADS, *arguments)
        host = self.device.download(found)
        return host[1 : 1 + host[0]]

    def _ffn_few(self, bundles: _Bundles, x: DeviceArray, out: DeviceArray) -> None:
        shape, n = bundles.shape, bundles.n
        n_tokens, d_model, name = len(x), shape.d_model, shape.encoding.value
        width = _tokens_at_once(n_tokens)
        stored = (bundles.rows, i64(shape.stride), bundles.slots)
        aligned = i32(self._is_aligned(bundles.rows, shape.stride, shape.part, x))
        h = self._empty((n_tokens, n), f32)
        self._launch(
            f"ffn_up_{'gated' if shape.is_gated else 'plain'}_{width}_{name}",
            (_blocks(n, _WARPS), _blocks(n_tokens, width), 1), _WARPS * _WARP_THREADS,
            *stored, i64(shape.part.nbytes), i32(n), i32(d_model), x, i32(n_tokens),
            bundles.gate_bias, bundles.up_bias, *_functions(shape), aligned, h,
        )  # fmt: skip
        n_blocks = _blocks(n, FFN_BLOCK_NEURONS)
        partial = self._empty((n_blocks, n_tokens, d_model), f32)
        columns = _DOWN_THREADS * _UNIT_WEIGHTS[shape.encoding]
        self._launch(
            f"ffn_down_{width}_{name}",
            (_blocks(d_model, columns), n_blocks, _blocks(n_tokens, width)), _DOWN_THREADS * _DOWN_GROUPS,
            *stored, _down_offset(shape), i32(n), i32(d_model), h, i32(n_tokens), aligned, partial,
        )  # fmt: skip
        n_values = n_tokens * d_model
        grid = (_blocks(n_values, _THREADS), 1, 1)
        self._launch("ffn_add_blocks", grid, _THREADS, partial, i32(n_blocks), i32(n_values), out)

    def _ffn_many(self, bundles: _Bundles, x: DeviceArray, out: DeviceArray) -> None:
        shape, n = bundles.shape, bundles.n
        n_tokens, d_model = len(x), shape.d_model
        gate = self._empty((n_tokens, n), f32) if shape.is_gated else None
        up = self._empty((n_tokens, n), f32)
        if gate is not None:
            self._matmul_many(bundles.projection(0), x, bundles.gate_bias, gate)
        self._matmul_many(bundles.projection(len(shape.parts) - 2), x, bundles.up_bias, up)
        if gate is None:
            self.activate(shape.activation, up)
        else:
            self.activate(shape.activation, gate, shape.up_activation, up)
        self._launch(
            f"ffn_down_many_{shape.encoding.value}", (_blocks(d_model, _TILE), _blocks(n_tokens, _TILE), 1),
            _TILE_THREADS, bundles.rows, i64(shape.stride), bundles.slots, _down_offset(shape), i32(n), i32(d_model),
            up, i32(n_tokens), out,
        )  # fmt: skip

    def _matmul_many(self, rows: _Rows, x: DeviceArray, bias: DeviceArray, out: DeviceArray) -> None:
        self._launch(
            f"matmul_{rows.encoding.value}", (_blocks(rows.n_rows, _TILE), _blocks(len(x), _TILE), 1), _TILE_THREADS,
            rows.base, i64(rows.stride), rows.slots, i64(rows.part), i32(rows.n_rows), i32(rows.n), x, i32(len(x)),
            bias, out,
        )  # fmt: skip

    def _checked_slots(self, slots: Any, n_rows: int) -> DeviceArray:
        if slots.dtype != i32 or slots.ndim != 1 or not slots.flags.c_contiguous:
            raise ValueError(f"slots are a contiguous int32 vector, not {slots.dtype} {slots.shape}")
        if not isinstance(slots, np.ndarray):
            return slots
        if slots.size and not 0 <= slots.min() <= slots.max() < n_rows:
            raise IndexError(f"slots outside [0, {n_rows})")
        return self.device.upload(slots)

    def _is_aligned(self, base: DeviceArray, stride: int, part: PartLayout, x: DeviceArray) -> bool:
        """Whether rows can be read in whole units, and `x` four values at a time."""
        weights, address = _UNIT_WEIGHTS[part.encoding], self.device.address
        together = address(base) | stride | part.nbytes | address(x)
        is_aligned = part.n_values % weights == 0 and together % 16 == 0
        if part.encoding.is_quantised and not is_aligned:
            raise ValueError(f"{part.encoding} rows begin at multiples of 16 bytes, as activations do")
        return is_aligned

    def _launch(self, kernel: str, grid: tuple[int, int, int], n_threads: int, *arguments: Any) -> None:
        self.device.launch(kernel, grid, n_threads, *arguments, queue="compute")


def attention_stretches(n_tokens: int, n_positions: int) -> int:
    """Into how many stretches attention cuts the positions: enough blocks for the device, bounded scratch."""
    return min(_blocks(n_positions, _STRETCH), max(1, _STRETCHES // n_tokens))


def _tokens_at_once(n_tokens: int) -> int:
    return 1 if n_tokens == 1 else 4


def _blocks(n: int, size: int) -> int:
    return -(-n // size)


def _down_offset(shape: FfnShape) -> np.int64:
    return i64((len(shape.parts) - 1) * shape.part.nbytes)


def _functions(shape: FfnShape) -> tuple[np.int32, np.float32, np.int32, np.float32]:
    return (*_function(shape.activation), *_function(shape.up_activation))


def _function(activation: Activation) -> tuple[np.int32, np.float32]:
    return i32(ACTIVATION_CODES[activation.kind]), f32(activation.threshold)


def _kv_name(keys: DeviceArray, values: DeviceArray) -> str:
    if keys.dtype != values.dtype or keys.dtype not in _KV_NAMES:
        raise ValueError(f"keys and values are both float32 or both float16, not {keys.dtype} and {values.dtype}")
    if not (keys.flags.c_contiguous and values.flags.c_contiguous):
        raise ValueError("keys and values are C-contiguous")
    return _KV_NAMES[keys.dtype]


def _require(array: DeviceArray, shape: tuple[int, ...]) -> None:
    """Refuse what is neither None nor a float32 C-contiguous array of that shape."""
    if array is not None and (array.shape != shape or array.dtype != f32 or not array.flags.c_contiguous):
        raise ValueError(f"expected a C-contiguous float32 array {shape}, got {array.dtype} {array.shape}")
