"""How the bundles of a model are cut into blocks, and which blocks stay in DRAM. Pure; no I/O.

A block is a run of neurons of one layer, the unit in which exact mode pins, reads and computes. Its size depends on
the file alone and never on the budget: the arithmetic is then the same at every budget, to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from flashfmt import BundlesInfo
from flashfmt.layout import round_up

BLOCK_BYTES: Final = 2 << 20  # requests of 2 MiB read faster than smaller and than larger ones
BLOCK_NEURONS_MULTIPLE: Final = 64  # 64 strides of at least 64 bytes: every block begins at a multiple of 4096


@dataclass(frozen=True, slots=True)
class Block:
    """Neurons ``[first, first + n_neurons)`` of a layer: ``[offset, offset + nbytes)`` of the layer's file."""

    layer: int
    first: int
    n_neurons: int
    offset: int
    nbytes: int


def neurons_per_block(stride: int) -> int:
    """Neurons in a block of about `BLOCK_BYTES`: a multiple of 64, at least 64."""
    return max(1, round(BLOCK_BYTES / (stride * BLOCK_NEURONS_MULTIPLE))) * BLOCK_NEURONS_MULTIPLE


def split_layer(info: BundlesInfo) -> list[Block]:
    """Blocks of one layer in neuron order; the last may be shorter."""
    geometry = info.geometry
    step = neurons_per_block(geometry.stride)
    blocks = []
    for first in range(0, geometry.n_neurons, step):
        n_neurons = min(step, geometry.n_neurons - first)
        offset = info.extent.offset + first * geometry.stride
        blocks.append(Block(info.layer, first, n_neurons, offset, n_neurons * geometry.stride))
    return blocks


def runs_of(blocks: Sequence[Block], is_pinned: Mapping[Block, bool]) -> list[list[Block]]:
    """Blocks of one layer; neighbours that are pinned are together, as one call computes them."""
    runs: list[list[Block]] = []
    for block in blocks:
        if runs and is_pinned[block] and is_pinned[runs[-1][0]]:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def pinned_nbytes(blocks: Sequence[Block], pinned: Sequence[bool]) -> int:
    """DRAM that the pinned blocks take, each rounded up to whole 4 KiB pages."""
    return sum(round_up(block.nbytes, 4096) for block, is_pinned in zip(blocks, pinned, strict=True) if is_pinned)


def spread_evenly(n_blocks: int, n_pinned: int) -> list[bool]:
    """Mark `n_pinned` of `n_blocks` evenly, so that reading and computing alternate all through a pass."""
    return [(i + 1) * n_pinned // n_blocks > i * n_pinned // n_blocks for i in range(n_blocks)]


def choose_pinned(blocks: Sequence[Block], budget_bytes: int) -> list[bool]:
    """Pin as many blocks as fit in `budget_bytes`, evenly spread."""
    low, high = 0, len(blocks)
    while low < high:
        middle = (low + high + 1) // 2
        if pinned_nbytes(blocks, spread_evenly(len(blocks), middle)) <= budget_bytes:
            low = middle
        else:
            high = middle - 1
    return spread_evenly(len(blocks), low)
