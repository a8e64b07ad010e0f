"""Sparse mode on a device: the bundles of the active neurons, in a bank of slots in device memory.

The steps of a pass are those of `active_bundles`; between the window's step and the reads, what leaves is copied out.
Selection scores stay on the device, windows decide on the host with the same rules as on a CPU, and bundles are never
compacted: those that come take the slots of those that leave. With a second tier in page-locked memory, what leaves
the device is kept there, and comes back without a read. What is read ahead waits in page-locked memory for the layer's
turn.

Knows: what the layers share on a device. Does not know: how bundles of a layer get there (`device_layer`), arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Final

from flashfmt import FlashModel
from reference_engine.active_bundles import ActiveBundles, OpenReader
from reference_engine.backends.cupy_protocol import Device
from reference_engine.bundle_checksums import Verify
from reference_engine.device_direct import SlotReader
from reference_engine.device_landing import LandingRing
from reference_engine.device_layer import GROUP_BUNDLES, DeviceFetch, DeviceLayer
from reference_engine.flash_io import RangeReader
from reference_engine.neuron_window import NeuronWindow
from reference_engine.selectors import TappedSelector

RING_BUFFERS: Final = 8


def landing_nbytes(strides: Sequence[int]) -> int:
    """Bytes of the landing ring: so many on the device, and so many page-locked."""
    return RING_BUFFERS * (GROUP_BUNDLES * max(strides) + 4096)


class DeviceBundles(ActiveBundles[DeviceFetch]):
    """Bundles of the active neurons of all layers, in device memory; ids and slots are device arrays.

    Parameters
    ----------
    selectors, hints, overlap : see `ActiveBundles`. Selectors are shown device activations, and give host ids.
    windows, capacities : for each layer, which bundles stay, and in how many slots.
    tier_capacities : for each layer the slots of its second tier; None for none.
    open_reader : opens a file of bundles for reading.
    open_direct : opens such a file for reading straight to the slots, where that is the faster way; None lets all land.
    verify : when to check bundle checksums.
    """

    def __init__(
        self,
        model: FlashModel,
        device: Device,
        *,
        selectors: Sequence[TappedSelector],
        windows: Sequence[NeuronWindow],
        capacities: Sequence[int],
        open_reader: OpenReader,
        tier_capacities: Sequence[int] | None = None,
        hints: Sequence[TappedSelector] | None = None,
        open_direct: Callable[[Path], SlotReader] | None = None,
        overlap: bool = True,
        verify: Verify = "first",
    ) -> None:
        tiers = tier_capacities or [0] * len(model.layers)
        ring = LandingRing(device, RING_BUFFERS, GROUP_BUNDLES * max(info.geometry.stride for info in model.layers))
        readers: dict[Path, RangeReader] = {}
        direct: dict[Path, SlotReader] = {}
        self._device_layers: list[DeviceLayer] = []
        with ExitStack() as files:
            for info, window, n_slots, n_tier in zip(model.layers, windows, capacities, tiers, strict=True):
                path = info.extent.path
                if path not in readers:
                    readers[path] = files.enter_context(closing(open_reader(path)))
                    if open_direct is not None:
                        direct[path] = files.enter_context(closing(open_direct(path)))
                layer = DeviceLayer(
                    info,
                    device,
                    ring,
                    window=window,
                    n_slots=n_slots,
                    n_tier_slots=n_tier,
                    checksums=model.bundles(info.layer).checksums,
                    verify=verify,
                    reader=readers[path],
                    direct=direct.get(path),
                )
                self._device_layers.append(layer)
            super().__init__(
                self._device_layers,
                [*readers.values(), *direct.values()],
                files.pop_all(),
                selectors=selectors,
                hints=hints,
                overlap=overlap,
            )

    @property
    def n_from_tier(self) -> int:
        """Bundles that the second tier saved a read for."""
        return sum(layer.n_from_tier for layer in self._device_layers)
