"""What a decoder asks of whoever holds its weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from reference_engine.backends import Matrix

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BundleBlock:
    """Bundles of the neurons `neurons` of a layer; bundle j is ``rows[slots[j]]``, or ``rows[j]`` without slots."""

    neurons: slice
    rows: npt.NDArray[np.uint8]
    slots: npt.NDArray[np.int32] | None = None


class BundleSource(Protocol):
    """Hands out the bundles that a layer's FFN is to be computed with."""

    def blocks(self, layer: int) -> Iterable[BundleBlock]:
        """Blocks of a layer; each is valid until the next is asked for."""
        ...


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
