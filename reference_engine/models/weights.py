"""What a decoder asks of whoever holds its weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from reference_engine.backends import Matrix

F32 = npt.NDArray[np.float32]
TapPoint = Literal["attention_input", "attention_output", "ffn_input"]


@dataclass(frozen=True, slots=True)
class BundleBlock:
    """Bundles of the neurons `neurons` of a layer; bundle j is ``rows[slots[j]]``, or ``rows[j]`` without slots.

    `neurons` is a slice for consecutive neurons, else their ids, int32 [n].
    """

    neurons: slice | npt.NDArray[np.int32]
    rows: npt.NDArray[np.uint8]
    slots: npt.NDArray[np.int32] | None = None


class BundleSource(Protocol):
    """Hands out the bundles that an FFN is computed with. Layers are asked for in order, pass after pass."""

    def whole(self, layer: int) -> npt.NDArray[np.uint8] | None:
        """All bundles of a layer, uint8 [n_neurons, stride], if they stay in memory; `blocks` may be left out then."""
        ...

    def taps(self, layer: int) -> Collection[TapPoint]:
        """What to show of a layer."""
        ...

    @property
    def reads_ahead(self) -> bool:
        """Whether reads are under way while attention is computed: `carry_on` is then to be called in between."""
        ...

    def carry_on(self) -> None:
        """Let reads go on that nobody waits for yet."""
        ...

    def tap(self, layer: int, point: TapPoint, x: F32) -> None:
        """Show an activation [n_tokens, d_model] that `taps` names, as soon as it is known; valid during the call."""
        ...

    def blocks(self, layer: int, x: F32) -> Iterable[BundleBlock]:
        """Blocks of a layer for the FFN input `x` [n_tokens, d_model]; each is valid until the next is asked for."""
        ...


class WithoutLookAhead:
    """What sources of bundles have in common that look nothing ahead, and hand out every layer by `blocks`."""

    def whole(self, layer: int) -> npt.NDArray[np.uint8] | None:
        """None."""
        return None

    def taps(self, layer: int) -> Collection[TapPoint]:
        """Nothing."""
        return ()

    @property
    def reads_ahead(self) -> bool:
        """False."""
        return False

    def carry_on(self) -> None:
        """Do nothing."""

    def tap(self, layer: int, point: TapPoint, x: F32) -> None:
        """Do nothing: nothing asks for it."""


class Table(Protocol):
    """Rows that are looked up by number."""

    def rows(self, ids: npt.NDArray[np.int64]) -> F32:
        """float32 [len(ids), width]."""
        ...


class TensorSource(Protocol):
    """Tensors by their name in the file."""

    def matrix(self, name: str) -> Matrix:
        """A weight matrix in storage form."""
        ...

    def vector(self, name: str) -> F32 | None:
        """A float32 vector, or None where the model has none of that name."""
        ...
