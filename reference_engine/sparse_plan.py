"""What sparse mode holds where under a memory ceiling: `plan`'s counterpart, decided before anything is loaded.

The ceiling covers everything the process holds. What is left after the fixed parts becomes slots for bundles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from flashfmt.layout import round_up
from reference_engine.plan import FixedParts, require_floor, with_margin
from reference_engine.slot_sharing import F64, share_slots

MIN_SLOTS: Final = 64  # of a layer: fewer would read one bundle after the other
READER_BYTES: Final = 3 << 20  # of the threads and queues that read one file
_NEURON_BYTES: Final = 18  # of cache, window and checksums, for each neuron whether held or not
_PAGE_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class BundleSizes:
    """Layers of equal bundles: `n_neurons` a layer, `stride` bytes each, in `n_files` files."""

    n_layers: int
    n_neurons: int
    stride: int
    n_files: int = 1

    @property
    def bookkeeping(self) -> int:
        """Bytes of readers, windows and caches."""
        return self.n_files * READER_BYTES + self.n_layers * self.n_neurons * _NEURON_BYTES

    def slots_nbytes(self, capacities: Sequence[int]) -> int:
        """Bytes of the slots, each layer's rounded up to whole pages."""
        return sum(round_up(capacity * self.stride, _PAGE_BYTES) for capacity in capacities)


@dataclass(frozen=True, slots=True)
class SparsePlan:
    """The split of a ceiling in sparse mode. All sizes in bytes; `floor` is the smallest ceiling that works.

    Attributes
    ----------
    capacities : slots of each layer.
    expected_read : bytes read for each token by the stored statistics; None where the file has none.
    """

    ceiling: int
    floor: int
    fixed: FixedParts
    margin: int
    bookkeeping: int
    slots: int
    capacities: tuple[int, ...]
    n_neurons: int
    expected_read: float | None
    context_tokens: int

    @property
    def planned(self) -> int:
        """Most that the process is expected to hold."""
        return self.fixed.total + self.margin + self.bookkeeping + self.slots

    @property
    def held_share(self) -> float:
        """Share of all neurons that there are slots for, 0 to 1."""
        return sum(self.capacities) / (len(self.capacities) * self.n_neurons)

    def rows(self) -> list[tuple[str, int]]:
        """(what, bytes) in the order of the forward pass, for printing."""
        return [
            ("process (interpreter, kernels, tokenizer)", self.fixed.process),
            (self.fixed.residents_label, self.fixed.residents),
            ("predictors and selectors", self.fixed.selectors),
            (f"KV cache ({self.context_tokens} tokens)", self.fixed.kv_cache),
            ("scratch", self.fixed.scratch),
            ("readers and bookkeeping", self.bookkeeping),
            (f"slots for bundles ({self.held_share:.0%} of the neurons)", self.slots),
            ("margin", self.margin),
        ]

    def as_dict(self) -> dict[str, object]:
        """Figures for programs."""
        return {
            "ceiling_bytes": self.ceiling,
            "floor_bytes": self.floor,
            "planned_bytes": self.planned,
            "process_bytes": self.fixed.process,
            "resident_bytes": self.fixed.residents,
            "resident_encoding": self.fixed.residents_held_in,
            "selector_bytes": self.fixed.selectors,
            "kv_cache_bytes": self.fixed.kv_cache,
            "scratch_bytes": self.fixed.scratch,
            "bookkeeping_bytes": self.bookkeeping,
            "slot_bytes": self.slots,
            "margin_bytes": self.margin,
            "held_share": self.held_share,
            "expected_read_bytes_per_token": self.expected_read,
            "capacities": list(self.capacities),
            "context_tokens": self.context_tokens,
        }


def plan_sparse(
    fixed: FixedParts,
    sizes: BundleSizes,
    ceiling: int,
    context_tokens: int,
    curves: Sequence[tuple[F64, F64]] | None = None,
) -> SparsePlan:
    """Split `ceiling` bytes: what is fixed, then slots, shared out by `curves` (see `share_slots`) or evenly.

    Raises
    ------
    BudgetError
        If the ceiling is below the floor; names the floor.
    """
    minimum = min(MIN_SLOTS, sizes.n_neurons)
    least = [minimum] * sizes.n_layers
    everything = [sizes.n_neurons] * sizes.n_layers
    held = fixed.total + sizes.bookkeeping
    floor = with_margin(max(held + sizes.slots_nbytes(least), fixed.at_start))
    require_floor(ceiling, floor)
    if with_margin(held + sizes.slots_nbytes(everything)) <= ceiling:
        capacities = everything
    else:
        margin = with_margin(ceiling) - ceiling
        room = ceiling - margin - held - sizes.n_layers * _PAGE_BYTES
        n_slots = max(room // sizes.stride, sizes.n_layers * minimum)
        capacities = share_slots(n_slots, sizes.n_neurons, curves, n_layers=sizes.n_layers, minimum=minimum)
    slots = sizes.slots_nbytes(capacities)
    return SparsePlan(
        ceiling=ceiling,
        floor=floor,
        fixed=fixed,
        margin=with_margin(held + slots) - held - slots,
        bookkeeping=sizes.bookkeeping,
        slots=slots,
        capacities=tuple(capacities),
        n_neurons=sizes.n_neurons,
        expected_read=None if curves is None else _expected_read(curves, capacities, sizes.stride),
        context_tokens=context_tokens,
    )


def _expected_read(curves: Sequence[tuple[F64, F64]], capacities: Sequence[int], stride: int) -> float:
    misses = [np.interp(n, slots, misses) for n, (slots, misses) in zip(capacities, curves, strict=True)]
    return float(sum(misses)) * stride
