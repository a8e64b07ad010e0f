"""Which slot has which neuron, in a bank of slots that never moves: the remap of a layer, and of its second tier.

Unlike `bundle_cache`, occupied slots need not be a prefix: kernels take slots one by one, so nothing is ever moved to
close a hole, on a device where that would cost a copy. Pure; ids and slots, no bytes.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from reference_engine.neuron_window import Ids

Slots = npt.NDArray[np.int32]
_NO_SLOT: Final = -1


class SlotTable:
    """Slots 0 to `n_slots`, each free or taken by one of `n_neurons`."""

    def __init__(self, n_slots: int, n_neurons: int) -> None:
        self.n_slots = n_slots
        self._slot_of: Slots = np.full(n_neurons, _NO_SLOT, np.int32)
        self._free: Slots = np.arange(n_slots, dtype=np.int32)[::-1].copy()  # a stack, lowest slots on top
        self._n_free = n_slots

    @property
    def n_free(self) -> int:
        """Slots that are free."""
        return self._n_free

    def slots(self, ids: Ids) -> Slots:
        """Slots of neurons, int32 [len(ids)]; -1 for those without."""
        return self._slot_of[ids]

    def has(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Whether neurons have a slot, bool [len(ids)]."""
        held: npt.NDArray[np.bool_] = self._slot_of[ids] != _NO_SLOT
        return held

    def assign(self, ids: Ids) -> Slots:
        """Give slots to neurons that have none; those given up last are taken first.

        Raises
        ------
        ValueError
            If there are not enough; nothing has changed then.
        """
        left = self._n_free - len(ids)
        if left < 0:
            raise ValueError(f"{len(ids)} bundles do not fit in {self._n_free} free slots")
        slots = self._free[left : self._n_free].copy()
        self._slot_of[ids] = slots
        self._n_free = left
        return slots

    def release(self, ids: Ids) -> Slots:
        """Free the slots of neurons that have one; returns them."""
        slots = self._slot_of[ids]
        self._slot_of[ids] = _NO_SLOT
        self._free[self._n_free : self._n_free + len(ids)] = slots
        self._n_free += len(ids)
        return slots


class VictimTable:
    """Which evicted neurons the second tier has: the latest ones. A neuron that is wanted again leaves it."""

    def __init__(self, n_slots: int, n_neurons: int) -> None:
        self._table = SlotTable(n_slots, n_neurons)
        self._caught_at = np.full(n_neurons, -1, np.int64)
        self._n_caught = 0

    def exchange(self, wanted: Ids, evicted: Ids) -> tuple[Ids, Slots, Ids, Slots]:
        """Hand out those of `wanted` that are here, and take in the last of `evicted`.

        What is taken in must be copied before what is handed out, whose slots are not reused before the next call.

        Returns
        -------
        Neurons handed out and their slots; neurons taken in and theirs.
        """
        out = wanted[self._table.has(wanted)]
        out_slots = self._table.slots(out)
        taken = evicted[max(0, len(evicted) - (self._table.n_slots - len(out))) :]
        self._drop(len(taken) - self._table.n_free, out)
        slots = self._table.assign(taken)
        self._caught_at[taken] = np.arange(self._n_caught, self._n_caught + len(taken))
        self._n_caught += len(taken)
        self._caught_at[out] = -1
        self._table.release(out)
        return out, out_slots, taken, slots

    def _drop(self, n: int, out: Ids) -> None:
        """Forget the `n` neurons that were caught first, but none of `out`."""
        if n <= 0:
            return
        self._caught_at[out] = -1
        held = np.flatnonzero(self._caught_at >= 0)
        oldest = held[np.argpartition(self._caught_at[held], n - 1)[:n]].astype(np.int32)
        self._caught_at[oldest] = -1
        self._table.release(oldest)
