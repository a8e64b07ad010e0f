"""In which encoding resident matrices are held: as they are stored, or narrower, re-encoded while they are loaded.

Under half of a model's bytes, attention in float16 leaves no room for the neuron window. In q8 it takes half of that,
and is read from memory twice as fast; what that costs in quality is measured where the encodings are (README).

Knows: encodings, sizes and plans. Does not know: how tensors are read, what else a plan holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal, TypeVar

import numpy as np

from flashfmt import TensorInfo
from flashfmt.encodings import QUANTISED_ROW_MULTIPLE, Encoding, part_layout
from flashfmt.errors import BudgetError
from reference_engine.plan import MemoryPlan
from reference_engine.sparse_plan import SparsePlan

ResidentsChoice = Literal["auto", "stored", "q8", "q4"]
POSITIONS: Final = "embedding/positions"
_AUTOMATIC: Final = (Encoding.Q8, Encoding.Q4)

Plan = TypeVar("Plan", bound=MemoryPlan | SparsePlan)


def resident_encoding(info: TensorInfo, asked: Encoding | None) -> Encoding:
    """Encoding in which a tensor is held where `asked` is asked for; None asks for all as they are stored.

    The same tensors as in a file that is converted with it: weight matrices, but not the table of positions. What is
    stored as narrowly already stays as it is, as do rows that `asked` cannot hold.
    """
    is_matrix = len(info.shape) == 2 and info.encoding.is_weight and info.name != POSITIONS
    if asked is None or not is_matrix or info.shape[1] % QUANTISED_ROW_MULTIPLE:
        return info.encoding
    widths = [part_layout(encoding, info.shape[1]).nbytes for encoding in (asked, info.encoding)]
    return asked if widths[0] < widths[1] else info.encoding


def stored_nbytes(info: TensorInfo, encoding: Encoding) -> int:
    """Bytes of a tensor in an encoding."""
    if encoding == info.encoding:
        return int(np.prod(info.storage_shape, dtype=np.int64)) * encoding.storage_dtype.itemsize
    return info.shape[0] * part_layout(encoding, info.shape[1]).nbytes


def encodings_to_try(
    matrices: Iterable[TensorInfo], choice: ResidentsChoice, *, may_be_lossy: bool
) -> list[Encoding | None]:
    """What may be asked for, the widest first; None for as stored.

    Parameters
    ----------
    matrices : the resident ones.
    may_be_lossy : whether ``auto`` may re-encode.
    """
    if choice == "stored" or (choice == "auto" and not may_be_lossy):
        return [None]
    if choice != "auto":
        return [Encoding(choice)]
    infos = list(matrices)
    narrower = (asked for asked in _AUTOMATIC if any(resident_encoding(i, asked) != i.encoding for i in infos))
    return [None, *narrower]


def choose_plan(
    encodings: Sequence[Encoding | None],
    plan: Callable[[Encoding | None], Plan],
    is_enough: Callable[[Plan], bool],
) -> Plan:
    """The plan with the widest residents that `is_enough`; where none is, with q8, or as stored if that is narrower.

    q4, which costs most, is the choice only where nothing wider fits at all.

    Raises
    ------
    BudgetError
        If no encoding fits; names the smallest ceiling that works.
    """
    best: Plan | None = None
    refusal: BudgetError | None = None
    for encoding in encodings:
        if encoding is Encoding.Q4 and best is not None:
            break
        try:
            best = plan(encoding)
        except BudgetError as error:
            refusal = error
            continue
        if is_enough(best):
            break
    if best is None:
        raise refusal or ValueError("there is no encoding to choose from")
    return best
