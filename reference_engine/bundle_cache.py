"""The bundles of one layer that are held in DRAM: which slot has which neuron, and where the next ones go.

The occupied slots are a contiguous prefix of the matrix, as in the paper (LLM in a flash, section 3.3), but bundles
that come take the slots of those that leave; rows are moved only where more leave than come. In steady state nothing
is copied.

Knows: ids, slots and rows of bytes. Does not know: files, which neurons to hold (`neuron_window`), arithmetic.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from reference_engine.neuron_window import Ids, WindowStep

_NO_SLOT: Final = -1


class BundleCache:
    """Slots ``[0, num_used)`` of `rows` are occupied; the others are free.

    Parameters
    ----------
    rows : uint8 [capacity, stride], one bundle a row. Not copied; the caller fills the rows that `apply` names.
    n_neurons : ids are below it.

    Attributes
    ----------
    slot_to_id : int32 [capacity]: neuron in each occupied slot; what it says of free slots means nothing.
    id_to_slot : int32 [n_neurons]: slot of each neuron, or -1.
    """

    def __init__(self, rows: npt.NDArray[np.uint8], n_neurons: int) -> None:
        self.rows = rows
        self.slot_to_id: npt.NDArray[np.int32] = np.full(len(rows), _NO_SLOT, np.int32)
        self.id_to_slot: npt.NDArray[np.int32] = np.full(n_neurons, _NO_SLOT, np.int32)
        self.num_used = 0
        self.n_moved = 0
        """Rows copied from slot to slot so far."""

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return len(self.rows)

    def slots(self, ids: Ids) -> npt.NDArray[np.int32]:
        """Slots of held neurons, int32 [len(ids)]."""
        return self.id_to_slot[ids]

    def is_held(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Which neurons have a slot, bool [len(ids)]."""
        has_slot: npt.NDArray[np.bool_] = self.id_to_slot[ids] != _NO_SLOT
        return has_slot

    def held(self) -> Ids:
        """Neurons that have a slot, in the order of the slots; a view."""
        return self.slot_to_id[: self.num_used]

    def apply(self, step: WindowStep) -> npt.NDArray[np.int32]:
        """Give up the evicted neurons and make room for the missing ones.

        No read into an occupied slot may be under way, as its row may be moved.

        Returns
        -------
        int32 [len(step.missing)], the slots that the missing bundles must be written to: they count as held now.

        Raises
        ------
        ValueError
            If there are not enough slots; nothing has changed then.
        """
        missing, evicted = step.missing, step.evicted
        n_new = self.num_used + len(missing) - len(evicted)
        if n_new > self.capacity:
            raise ValueError(f"{n_new} bundles do not fit in {self.capacity} slots")
        freed = np.sort(self.id_to_slot[evicted])
        self.id_to_slot[evicted] = _NO_SLOT
        n_refilled = min(len(missing), len(freed))
        tail = np.arange(self.num_used, n_new, dtype=np.int32)
        targets = np.concatenate((freed[:n_refilled], tail)) if len(tail) else freed[:n_refilled]
        self.slot_to_id[targets] = missing
        self.id_to_slot[missing] = targets
        if n_new < self.num_used:
            self._close_holes(freed[n_refilled:], n_new)
        self.num_used = n_new
        return targets

    def remove(self, ids: Ids) -> None:
        """Take back held neurons, because their rows were never filled."""
        self.apply(WindowStep(ids[:0], ids[:0], ids))

    def _close_holes(self, holes: npt.NDArray[np.int32], n_left: int) -> None:
        """Move rows from behind `n_left` into the holes before it; `holes` is sorted and none was refilled."""
        first_behind = int(np.searchsorted(holes, n_left))
        targets, behind = holes[:first_behind], holes[first_behind:]
        is_hole = np.zeros(self.num_used - n_left, np.bool_)
        is_hole[behind - n_left] = True
        sources = np.flatnonzero(~is_hole) + n_left
        self.rows[targets] = self.rows[sources]
        ids = self.slot_to_id[sources]
        self.slot_to_id[targets] = ids
        self.id_to_slot[ids] = targets
        self.n_moved += len(targets)
