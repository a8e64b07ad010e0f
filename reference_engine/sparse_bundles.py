"""Sparse mode in DRAM: the bundles of the active neurons, in slots that direct reads land in.

Knows: where the slots of all layers lie. Does not know: the order of a decode step (`active_bundles`), how bundles of a
layer are read and kept (`layer_bundles`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from flashfmt import FlashModel
from flashfmt.layout import round_up
from reference_engine.active_bundles import ActiveBundles, OpenReader
from reference_engine.bundle_checksums import Verify
from reference_engine.flash_io import IO_ALIGNMENT, RangeReader, aligned_empty
from reference_engine.layer_bundles import Fetch, LayerBundles
from reference_engine.neuron_window import NeuronWindow
from reference_engine.selectors import TappedSelector


class SparseBundles(ActiveBundles[Fetch]):
    """Bundles of the active neurons of all layers, in DRAM.

    Parameters
    ----------
    selectors, hints, overlap, held_first : see `ActiveBundles`.
    windows, capacities : for each layer, which bundles stay, and in how many slots.
    open_reader : opens a file of bundles for reading.
    verify : when to check bundle checksums.
    """

    def __init__(
        self,
        model: FlashModel,
        *,
        selectors: Sequence[TappedSelector],
        windows: Sequence[NeuronWindow],
        capacities: Sequence[int],
        open_reader: OpenReader,
        hints: Sequence[TappedSelector] | None = None,
        overlap: bool = True,
        held_first: bool = True,
        verify: Verify = "first",
    ) -> None:
        strides = [info.geometry.stride for info in model.layers]
        arena = aligned_empty(slots_nbytes(capacities, strides))
        readers: dict[Path, RangeReader] = {}
        layers: list[LayerBundles] = []
        start = 0
        with ExitStack() as files:
            for info, window, capacity in zip(model.layers, windows, capacities, strict=True):
                stride = info.geometry.stride
                rows = arena[start : start + capacity * stride].reshape(capacity, stride)
                start += round_up(capacity * stride, IO_ALIGNMENT)
                path = info.extent.path
                if path not in readers:
                    readers[path] = files.enter_context(closing(open_reader(path)))
                layer = LayerBundles(
                    info,
                    window=window,
                    rows=rows,
                    checksums=model.bundles(info.layer).checksums,
                    verify=verify,
                    reader=readers[path],
                )
                layers.append(layer)
            super().__init__(
                layers,
                list(readers.values()),
                files.pop_all(),
                selectors=selectors,
                hints=hints,
                overlap=overlap,
                held_first=held_first,
            )

    @property
    def reads_ahead(self) -> bool:
        """Whether there are look-ahead selectors."""
        return bool(self._ahead)

    def carry_on(self) -> None:
        """Push what did not fit into the device's queue at once."""
        if self._newest is not None:
            self._newest.carry_on()


def slots_nbytes(capacities: Sequence[int], strides: Sequence[int]) -> int:
    """DRAM that the slots of all layers take."""
    return sum(round_up(n * stride, IO_ALIGNMENT) for n, stride in zip(capacities, strides, strict=True))
