"""What is held where under a memory ceiling: decided, and refused if need be, before anything is loaded.

The ceiling covers everything the process holds. Pure arithmetic over figures that the engine measures or derives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from flashfmt.encodings import Encoding
from flashfmt.errors import BudgetError
from flashfmt.layout import round_up
from reference_engine.bundle_blocks import Block, choose_pinned, pinned_nbytes
from reference_engine.sizes import format_size

RING_SLOTS: Final = 4  # one in use, one or two being read, one ready
_MARGIN_BYTES: Final = 8 << 20  # allocator slack, thread stacks, objects made while generating
_MARGIN_SHARE: Final = 100  # and one hundredth of all that is held


@dataclass(frozen=True, slots=True)
class FixedParts:
    """Bytes that do not depend on the ceiling.

    Attributes
    ----------
    process : held already when the plan is made.
    at_start : held for a while before that; no part of the sum, but no ceiling can be below it.
    resident_encoding : what resident matrices are re-encoded in while they are loaded; None leaves them as stored.
    """

    process: int
    residents: int
    kv_cache: int
    scratch: int
    selectors: int = 0
    at_start: int = 0
    resident_encoding: Encoding | None = None

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.process + self.residents + self.kv_cache + self.scratch + self.selectors

    @property
    def residents_held_in(self) -> str:
        """Name of `resident_encoding`, or ``stored``."""
        return "stored" if self.resident_encoding is None else str(self.resident_encoding)

    @property
    def residents_label(self) -> str:
        """What the resident tensors are, for printing."""
        return "resident tensors" + ("" if self.resident_encoding is None else f", in {self.resident_encoding}")


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The split of a ceiling. All figures in bytes; `floor` is the smallest ceiling that works."""

    ceiling: int
    floor: int
    fixed: FixedParts
    margin: int
    ring: int
    pinned: int
    streamed: int
    pinned_blocks: tuple[bool, ...]
    context_tokens: int

    @property
    def planned(self) -> int:
        """Most that the process is expected to hold."""
        return self.fixed.total + self.margin + self.ring + self.pinned

    @property
    def is_resident(self) -> bool:
        """Whether nothing has to be read while generating."""
        return self.streamed == 0

    def rows(self) -> list[tuple[str, int]]:
        """(what, bytes) in the order of the forward pass, for printing."""
        return [
            ("process (interpreter, kernels, tokenizer)", self.fixed.process),
            (self.fixed.residents_label, self.fixed.residents),
            (f"KV cache ({self.context_tokens} tokens)", self.fixed.kv_cache),
            ("scratch", self.fixed.scratch),
            ("read buffers", self.ring),
            ("FFN bundles pinned in DRAM", self.pinned),
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
            "kv_cache_bytes": self.fixed.kv_cache,
            "scratch_bytes": self.fixed.scratch,
            "read_buffer_bytes": self.ring,
            "pinned_bytes": self.pinned,
            "margin_bytes": self.margin,
            "streamed_bytes_per_token": self.streamed,
            "context_tokens": self.context_tokens,
        }


def plan_memory(fixed: FixedParts, blocks: Sequence[Block], ceiling: int, context_tokens: int) -> MemoryPlan:
    """Split `ceiling` bytes: what is fixed, then as many pinned blocks as fit, the rest streamed.

    Raises
    ------
    BudgetError
        If the ceiling is below the floor; names the floor.
    """
    ring = RING_SLOTS * round_up(max(block.nbytes for block in blocks), 4096)
    everything = pinned_nbytes(blocks, [True] * len(blocks))
    floor = with_margin(max(fixed.total + min(ring, everything), fixed.at_start))
    require_floor(ceiling, floor)
    if with_margin(fixed.total + everything) <= ceiling:
        pinned, ring = [True] * len(blocks), 0
    else:
        margin = with_margin(ceiling) - ceiling
        pinned = choose_pinned(blocks, max(0, ceiling - margin - fixed.total - ring))
    held = pinned_nbytes(blocks, pinned)
    used = fixed.total + ring + held
    return MemoryPlan(
        ceiling=ceiling,
        floor=floor,
        fixed=fixed,
        margin=with_margin(used) - used,
        ring=ring,
        pinned=held,
        streamed=sum(block.nbytes for block, is_pinned in zip(blocks, pinned, strict=True) if not is_pinned),
        pinned_blocks=tuple(pinned),
        context_tokens=context_tokens,
    )


def with_margin(held: int) -> int:
    """Bytes `held` by what is counted, and room for what is not."""
    return held + _MARGIN_BYTES + held // _MARGIN_SHARE


def require_floor(ceiling: int, floor: int) -> None:
    """Refuse a ceiling below the floor.

    Raises
    ------
    BudgetError
        Naming the floor.
    """
    if ceiling < floor:
        raise BudgetError(
            f"{format_size(ceiling)} of memory is not enough for this model and context; "
            f"the smallest that works is {-(-floor >> 20)} MiB",
            expected=f"at least {floor} bytes",
            actual=ceiling,
        )
