"""What the engine asks of a backend: a few functions on arrays, and the two descriptions of stored weights they take.

Knows: arrays and how stored rows of weights are laid out. Does not know: files, layers, caches, families of models.

Conventions of every function: activations are float32, C-contiguous, one row a token; `n_tokens` is 1 when decoding
and up to a few hundred when a prompt is read. Nothing keeps a reference to its arguments. A backend object may be
called from one thread at a time.

Two promises hold for `Backend.ffn`, so that exact mode gives the same bits at every memory budget:

- bundles are added to `out` in the order given, and cutting the sequence into several calls at multiples of
  `FFN_BLOCK_NEURONS` bundles changes no bit of the result;
- neither the number of threads nor the place of the bundles (`slots`) changes a bit of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from flashfmt.encodings import Encoding, PartLayout, part_layout
from flashfmt.manifest import Activation

F32Array = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.integer[Any]]
Pairing = Literal["half", "interleaved"]
BlockOrder = Literal["pre_norm", "post_norm", "parallel"]

FFN_BLOCK_NEURONS: Final = 64


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """A stored matrix [n_rows, n_cols] of weights, in its storage form.

    Parameters
    ----------
    encoding : how a row is stored.
    n_rows, n_cols : logical shape, in weights.
    data : [n_rows, n_cols] of the storage dtype, or uint8 [n_rows, part_nbytes] for q8 and q4. Rows may lie apart
        (any row stride, any base address) but each is contiguous. Not copied.

    Raises
    ------
    ValueError
        If `data` has another shape or dtype than the encoding asks for.
    """

    encoding: Encoding
    n_rows: int
    n_cols: int
    data: npt.NDArray[Any]

    def __post_init__(self) -> None:
        if not self.encoding.is_weight:
            raise ValueError(f"{self.encoding} does not encode weights")
        expected = (self.n_rows, part_layout(self.encoding, self.n_cols).storage_length)
        dtype = self.encoding.storage_dtype
        if self.data.shape != expected or self.data.dtype != dtype:
            raise ValueError(
                f"a {self.encoding} matrix [{self.n_rows}, {self.n_cols}] is stored as {dtype} {expected}, "
                f"not {self.data.dtype} {self.data.shape}"
            )
        if self.n_cols > 1 and self.data.strides[1] != dtype.itemsize:
            raise ValueError("the rows of a stored matrix are contiguous")


@dataclass(frozen=True, slots=True)
class FfnShape:
    """How the bundles of one layer are stored, and which function they compute.

    Parameters
    ----------
    encoding : of every part.
    parts : ``("up", "down")`` or ``("gate", "up", "down")``, in the order they have in a bundle.
    d_model : weights in a part.
    part : byte layout of a part; part p begins at byte ``p * part.nbytes`` of a bundle.
    stride : bytes from one bundle to the next.
    activation : of the up projection, or of the gate where there is one.
    up_activation : of the up projection where there is a gate.

    Raises
    ------
    ValueError
        If `parts` is neither of the two, or a bundle does not fit in its stride.
    """

    encoding: Encoding
    parts: tuple[str, ...]
    d_model: int
    part: PartLayout
    stride: int
    activation: Activation
    up_activation: Activation

    def __post_init__(self) -> None:
        if self.parts not in (("up", "down"), ("gate", "up", "down")):
            raise ValueError(f"parts are (up, down) or (gate, up, down), not {self.parts}")
        if len(self.parts) * self.part.nbytes > self.stride:
            raise ValueError(f"{len(self.parts)} parts of {self.part.nbytes} bytes exceed the stride {self.stride}")

    @property
    def is_gated(self) -> bool:
        """Whether the bundles have a gate."""
        return len(self.parts) == 3


@dataclass(frozen=True, slots=True, eq=False)
class NormWeights:
    """A norm of vectors.

    Parameters
    ----------
    centred : layer norm, else RMS norm.
    weight, bias : float32 [length of a vector] or None.
    """

    centred: bool
    eps: float
    weight: F32Array | None
    bias: F32Array | None


@dataclass(frozen=True, slots=True)
class LayerRotation:
    """How a layer turns queries and keys: by which table of angles, `n_pairs` dimension pairs of each head."""

    table: int
    n_pairs: int
    pairing: Pairing


@dataclass(frozen=True, slots=True, eq=False)
class AttentionWeights:
    """All that the attention of a layer is computed with, apart from activations, positions, keys and values.

    Parameters
    ----------
    q, k, v : [n_heads * head_dim, d_model], and [n_kv_heads * head_dim, d_model] twice.
    output : [d_model, n_heads * head_dim].
    q_bias, k_bias, v_bias, output_bias : float32 [n_rows] or None.
    q_norm, k_norm : of queries and keys, or None: of each head by itself where `norm_each_head`, else of all together.
    scale, window : see `Backend.attend`.
    rotation : None where nothing turns.
    """

    q: Matrix
    k: Matrix
    v: Matrix
    output: Matrix
    q_bias: F32Array | None
    k_bias: F32Array | None
    v_bias: F32Array | None
    output_bias: F32Array | None
    q_norm: NormWeights | None
    k_norm: NormWeights | None
    norm_each_head: bool
    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    rotation: LayerRotation | None


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """All that a layer is computed with, apart from bundles that do not stay in memory.

    Parameters
    ----------
    order : of the steps, as in `flashfmt.manifest.Block`.
    ffn_norm : None where the attention's input is the FFN's, too.
    gate_bias, up_bias : float32 [n_neurons] or None.
    down_bias : float32 [d_model] or None.
    bundles : uint8 [n_neurons, ffn.stride], C-contiguous, of all neurons in their order, or None.
    """

    order: BlockOrder
    attention_norm: NormWeights
    attention: AttentionWeights
    ffn_norm: NormWeights | None
    ffn: FfnShape
    gate_bias: F32Array | None
    up_bias: F32Array | None
    down_bias: F32Array | None
    bundles: npt.NDArray[np.uint8] | None


class Step(IntEnum):
    """The steps of a layer, by what is known behind them."""

    ATTENTION_INPUT = 0
    PROJECTIONS = 1
    """Query, key and value: most of what attention reads of its weights."""
    FFN_INPUT = 2
    """Attention is done; `TokenPass.ffn_output` is the bias, or zero."""
    FFN_OUTPUT = 3
    LAYER_OUTPUT = 4


class TokenPass(Protocol):
    """One token on its way through layers whose weights were bound to it, in as few calls as the caller allows.

    Gives the bits that the functions of the backend give one after the other.

    Attributes
    ----------
    hidden, attention_input, attention_output, ffn_input, ffn_output : float32 [1, d_model], always the same arrays.
    """

    hidden: F32Array
    attention_input: F32Array
    attention_output: F32Array
    ffn_input: F32Array
    ffn_output: F32Array

    def begin(
        self,
        x: F32Array,
        rotations: Sequence[tuple[F32Array, F32Array]],
        keys: npt.NDArray[Any],
        values: npt.NDArray[Any],
        *,
        n_past: int,
    ) -> None:
        """Stand before the first layer.

        Parameters
        ----------
        x : float32 [1, d_model], copied to `hidden`.
        rotations : cosines and sines, float32 [1, n_pairs] each, of every table; copied.
        keys, values : as for `Backend.attend`, of all layers: [n_layers, n_kv_heads, capacity, head_dim]. Position
            `n_past` is written.
        """

    def advance(self, layer: int, step: Step) -> None:
        """Take all steps up to this one.

        Where `computes_ffn` is false for a layer, its FFN step does nothing: the caller adds to `ffn_output`.
        """

    def computes_ffn(self, layer: int) -> bool:
        """Whether the FFN of a layer is among its steps."""


class Selection(Protocol):
    """Chooses rows of matrices that were bound to it."""

    def __call__(self, x: F32Array) -> npt.NDArray[np.int32]:
        """Sorted numbers of the rows that one activation chooses, float32 [1, n_cols of the first matrix]."""


class Backend(Protocol):
    """The arithmetic of a decoder."""

    @property
    def name(self) -> str:
        """Name by which `load_backend` knows it."""

    @property
    def n_threads(self) -> int:
        """Threads that share the work of one call."""

    def prepare(self, encodings: Iterable[Encoding]) -> None:
        """Load all that working with these encodings takes, so that no later call is slower or takes memory for it."""

    def matmul(
        self, matrix: Matrix, x: F32Array, out: F32Array | None = None, bias: F32Array | None = None
    ) -> F32Array:
        """Compute ``x @ matrix.T + bias``.

        Parameters
        ----------
        x : float32 [n_tokens, n_cols].
        out : float32 [n_tokens, n_rows] to write; a new array where None.
        bias : float32 [n_rows] or None.

        Returns
        -------
        `out`.
        """

    def rows(self, matrix: Matrix, ids: IdArray) -> F32Array:
        """Decode the rows `ids` [n] of a matrix to a new float32 array [n, n_cols].

        Raises
        ------
        IndexError
            If an id is outside [0, n_rows).
        """

    def layer_norm(self, x: F32Array, weight: F32Array | None, bias: F32Array | None, eps: float) -> F32Array:
        """Layer norm over the last axis of `x`, a new array: ``(x - mean) / sqrt(var + eps) * weight + bias``."""

    def rms_norm(self, x: F32Array, weight: F32Array | None, eps: float) -> F32Array:
        """RMS norm over the last axis of `x`, a new array: ``x / sqrt(mean(x * x) + eps) * weight``."""

    def rotate(self, x: F32Array, cos: F32Array, sin: F32Array, pairing: Pairing) -> None:
        """Turn dimension pairs of each head in place.

        Parameters
        ----------
        x : float32 [n_tokens, n_heads, head_dim]; the first n_dims of each head turn.
        cos, sin : float32 [n_tokens, n_dims / 2].
        pairing : pair i is ``half`` (i, i + n_dims/2) or ``interleaved`` (2i, 2i + 1).
        """

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
        """Causal attention of the newest tokens over all tokens so far.

        Parameters
        ----------
        q : float32 [n_tokens, n_heads, head_dim].
        keys, values : float32 or float16 [n_kv_heads, capacity, head_dim], C-contiguous, of which the first
            ``n_past + n_tokens`` positions count; the new tokens are already in them. Query head h reads
            key/value head ``h * n_kv_heads // n_heads``.
        n_past : tokens before the first query; query t sees positions up to ``n_past + t``.
        scale : multiplies the scores before the softmax.
        window : how many last positions a query sees, its own included; all where None.

        Returns
        -------
        float32 [n_tokens, n_heads, head_dim], new.
        """

    def bind_layers(self, layers: Sequence[LayerWeights]) -> TokenPass | None:
        """What takes one token through all layers; None where the backend has no such thing for them."""

    def bind_selector(
        self, matrices: Sequence[Matrix], bias: F32Array | None, cut: float, *, signed: bool
    ) -> Selection | None:
        """What tells which rows of the last matrix exceed `cut`; None where the backend has no such thing for them.

        Parameters
        ----------
        matrices : multiplied with the activation one after the other.
        bias : float32 [n_rows of the last] or None, added.
        signed : the sum itself must exceed `cut`, not its size.
        """

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
        """Add the contribution of some bundles to `out`: ``out += sum over j of h_j * down_j``.

        ``h = act(up . x + up_bias)``, or ``act(gate . x + gate_bias) * up_act(up . x + up_bias)`` where gated.

        Parameters
        ----------
        rows : uint8 [n_rows, shape.stride], C-contiguous, one bundle a row at its start.
        slots : int32 [n]: bundle j is row ``slots[j]``; where None, bundle j is row j and n is n_rows.
        x : float32 [n_tokens, d_model].
        out : float32 [n_tokens, d_model], added to.
        up_bias, gate_bias : float32 [n], one a bundle processed, or None.

        Raises
        ------
        IndexError
            If a slot is outside [0, n_rows).
        """
