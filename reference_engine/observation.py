"""A decoder whose FFNs are watched: every neuron is computed, an observer sees its value and may leave some out.

It serves recording and evaluation, where many tokens are computed at once and yet each has active neurons of its own.
The weights come from exact mode at any budget. Without an observer the arithmetic is exact mode's own.

Knows: how to see into an FFN. Does not know: what is made of what is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self, cast

import numpy as np
import numpy.typing as npt

from flashfmt import FlashModel
from flashfmt.encodings import decode
from flashfmt.manifest import Activation
from reference_engine.backends import Backend, FfnShape, Matrix, load_backend
from reference_engine.backends.activations import activate
from reference_engine.engine import PREFILL_TOKENS, Engine, EngineOptions
from reference_engine.exact_bundles import ExactBundles
from reference_engine.kv_cache import KvCache
from reference_engine.models.decoder_stack import DecoderStack
from reference_engine.models.weights import BundleBlock, TapPoint, WithoutLookAhead
from reference_engine.residents import (
    EMBEDDING,
    FlashTable,
    ResidentTable,
    flash_table,
    load_residents,
)

F32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
ModelLoader = Callable[[FlashModel], object]


@dataclass(frozen=True, slots=True)
class Cut:
    """A test that a neuron passes or fails by its exact value: ``value > threshold``, of its size if `magnitude`.

    `value` is ``h``, what the down projection is multiplied with; ``tested``, the argument of the activation (of the
    gate where there is one); or ``activated``, the activation of that.
    """

    value: Literal["h", "tested", "activated"]
    threshold: float
    magnitude: bool

    def values(self, tested: F32, h: F32, activation: Activation) -> F32:
        """What is compared, float32 of the shape of `tested`."""
        chosen = h if self.value == "h" else tested if self.value == "tested" else activate(activation, tested)
        return np.abs(chosen) if self.magnitude else chosen

    def passes(self, tested: F32, h: F32, activation: Activation) -> Mask:
        """Which neurons pass, bool of the shape of `tested`."""
        return self.values(tested, h, activation) > np.float32(self.threshold)


NONZERO: Final = Cut("h", 0.0, magnitude=True)
"""Active in the plain sense: the neuron contributes something."""


class Observer(Protocol):
    """Sees the FFN of one layer after another, for a few tokens at a time."""

    def tap(self, layer: int, point: TapPoint, x: F32) -> None:
        """An activation [n_tokens, d_model] of a layer; must not be kept without copying."""
        ...

    def begin(self, layer: int) -> None:
        """The FFN of a layer begins; its ``ffn_input`` has been tapped."""
        ...

    def neurons(self, layer: int, neurons: slice, tested: F32, h: F32) -> Mask | None:
        """Exact values [n_tokens, n] of some neurons; returns which of them count, or None for all."""
        ...

    def end(self, layer: int) -> None:
        """The FFN of a layer is complete."""
        ...


class ObservedModel:
    """A loaded model that runs texts under an observer. A context manager.

    Parameters
    ----------
    path : a flash file or directory.
    options : memory ceiling, context, backend; the ceiling covers the model's run, not what observers keep.
    loaded_before_plan : as for `Engine`.

    Raises
    ------
    BudgetError
        If the ceiling is below the floor.
    FlashError
        If the file cannot be used.
    """

    def __init__(
        self,
        path: str | Path,
        options: EngineOptions | None = None,
        *,
        loaded_before_plan: ModelLoader | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._engine = Engine(path, options, loaded_before_plan=loaded_before_plan)
        self._bundles: ExactBundles | None = None
        self._flash_table: FlashTable | None = None
        try:
            self._load(progress)
        except BaseException:
            self.close()
            raise

    @property
    def model(self) -> FlashModel:
        """The file."""
        return self._engine.model

    @property
    def residents(self) -> str:
        """Encoding that resident matrices are held in; ``stored`` where they are as in the file."""
        return self._engine.exact_plan.fixed.residents_held_in

    @property
    def backend(self) -> Backend:
        """What computes."""
        return self._backend

    @property
    def context_tokens(self) -> int:
        """Tokens that fit in one window."""
        return self._engine.context_tokens

    def hidden_states(self, token_ids: Sequence[int], observer: Observer | None = None) -> Iterator[tuple[int, F32]]:
        """Run one window of text from an empty context.

        Yields
        ------
        (index of the first token, float32 [n, d_model] hidden states), for at most `PREFILL_TOKENS` tokens at a time.
        """
        ids = np.asarray(token_ids, np.int64)
        self._observed.observer = observer
        self._kv_cache.truncate(0)
        for first in range(0, len(ids), PREFILL_TOKENS):
            yield first, self._stack.forward(ids[first : first + PREFILL_TOKENS], self._kv_cache)

    def run(self, token_ids: Sequence[int], observer: Observer) -> None:
        """Run one window of text for what the observer sees of it."""
        for _ in self.hidden_states(token_ids, observer):
            pass

    def logits(self, hidden: F32) -> F32:
        """float32 [n, vocab_size] from hidden states."""
        return self._stack.logits(hidden)

    def watched(self, observer: Observer | None) -> WatchedModel:
        """The same model with the same observer for every window."""
        return WatchedModel(self, observer)

    def close(self) -> None:
        """Release memory and files."""
        if self._bundles is not None:
            self._bundles.close()
            self._bundles = None
        if self._flash_table is not None:
            self._flash_table.close()
            self._flash_table = None
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _load(self, progress: Callable[[int], None] | None) -> None:
        engine, model = self._engine, self._engine.model
        self._backend = load_backend(engine.options.backend, engine.options.n_threads)
        verify = engine.options.verify
        encoding = engine.exact_plan.fixed.resident_encoding
        residents = load_residents(model, encoding=encoding, verify=verify != "never", progress=progress)
        self._bundles = ExactBundles(model, engine.exact_plan.pinned_blocks, verify=verify)
        self._bundles.load(progress)
        self._kv_cache = KvCache(model.decoder, engine.context_tokens, engine.options.kv_type)
        self._observed = _ObservedFfn(self._bundles, self._backend)
        self._flash_table = flash_table(model, self._backend)
        self._stack = DecoderStack(
            decoder=model.decoder,
            residents=residents,
            layers=model.layers,
            tokens=self._flash_table or ResidentTable(residents.matrix(EMBEDDING), self._backend),
            bundles=self._observed,
            backend=cast(Backend, _WithFfn(self._backend, self._observed)),
        )


class WatchedModel:
    """An `ObservedModel` with an observer."""

    def __init__(self, model: ObservedModel, observer: Observer | None) -> None:
        self._model = model
        self._observer = observer

    def hidden_states(self, token_ids: Sequence[int]) -> Iterator[tuple[int, F32]]:
        """See `ObservedModel.hidden_states`."""
        return self._model.hidden_states(token_ids, self._observer)

    def logits(self, hidden: F32) -> F32:
        """See `ObservedModel.logits`."""
        return self._model.logits(hidden)


class _ObservedFfn(WithoutLookAhead):
    """Source of bundles and FFN in one: it notes which block it hands out, and shows that block's values."""

    def __init__(self, bundles: ExactBundles, backend: Backend) -> None:
        self._bundles = bundles
        self._backend = backend
        self._layer = 0
        self._neurons = slice(0)
        self.observer: Observer | None = None

    def taps(self, layer: int) -> tuple[TapPoint, ...]:
        return ("attention_input", "attention_output", "ffn_input")

    def tap(self, layer: int, point: TapPoint, x: F32) -> None:
        if self.observer is not None:
            self.observer.tap(layer, point, x)

    def blocks(self, layer: int, x: F32) -> Iterator[BundleBlock]:
        self._layer = layer
        if self.observer is not None:
            self.observer.begin(layer)
        for block in self._bundles.blocks(layer, x):
            if not isinstance(block.neurons, slice):
                raise TypeError("blocks of consecutive neurons are needed")
            self._neurons = block.neurons
            yield block
        if self.observer is not None:
            self.observer.end(layer)

    def ffn(
        self,
        shape: FfnShape,
        rows: npt.NDArray[np.uint8],
        slots: npt.NDArray[np.int32] | None,
        x: F32,
        out: F32,
        *,
        up_bias: F32 | None = None,
        gate_bias: F32 | None = None,
    ) -> None:
        if self.observer is None:
            self._backend.ffn(shape, rows, slots, x, out, up_bias=up_bias, gate_bias=gate_bias)
            return
        if slots is not None:
            raise ValueError("blocks without slots are needed")
        up = self._backend.matmul(_part(shape, rows, "up"), x, bias=up_bias)  # (n_tokens, n)
        if shape.is_gated:
            tested = self._backend.matmul(_part(shape, rows, "gate"), x, bias=gate_bias)
            h = activate(shape.activation, tested) * activate(shape.up_activation, up)
        else:
            tested, h = up, activate(shape.activation, up)
        mask = self.observer.neurons(self._layer, self._neurons, tested, h)
        if mask is not None:
            h = np.where(mask, h, np.float32(0))
        down = _part(shape, rows, "down")
        out += h @ decode(np.ascontiguousarray(down.data), shape.encoding, shape.d_model)


class _WithFfn:
    """A backend with another FFN."""

    def __init__(self, backend: Backend, observed: _ObservedFfn) -> None:
        self._backend = backend
        self.ffn = observed.ffn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def _part(shape: FfnShape, rows: npt.NDArray[np.uint8], name: str) -> Matrix:
    """One part of some bundles as a matrix, without a copy."""
    start = shape.parts.index(name) * shape.part.nbytes
    data = rows[:, start : start + shape.part.nbytes].view(shape.encoding.storage_dtype)
    return Matrix(shape.encoding, len(rows), shape.d_model, data)
