"""Which way bundles take from flash to a device: by page-locked memory, or straight to their slots if that is faster.

Both ways are measured with scattered bundles of the very file, through the code that will read them.

Knows: how to measure, and what speaks for a way. Does not know: how either works.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from flashfmt import FlashModel
from flashfmt.errors import FlashError, FlashReadError
from reference_engine.active_bundles import OpenReader
from reference_engine.backends.cupy_protocol import Device
from reference_engine.bundle_checksums import Verify
from reference_engine.device_direct import SlotReader, load_kvikio
from reference_engine.device_landing import LandingRing
from reference_engine.device_layer import GROUP_BUNDLES, DeviceLayer
from reference_engine.neuron_window import Ids, LeastRecent

OpenDirect = Callable[[Path], SlotReader]

_N_GROUPS: Final = 3  # read at once, of `GROUP_BUNDLES` bundles each
_N_ROUNDS: Final = 4  # the best counts; what is loaded or compiled on first use falls to the first
_CLEARLY: Final = 1.05  # times faster, to be chosen: reading straight can neither be taken back nor pushed behind


@dataclass(frozen=True, slots=True)
class WayChoice:
    """The way that was chosen.

    Parameters
    ----------
    open_direct : opens a file of bundles for reading straight to the slots; None where everything lands on the host.
    reason : in a few words.
    landing, direct : bytes a second of either way; None where not measured.
    device_nbytes : device memory that the libraries took to themselves while this was found out.
    """

    open_direct: OpenDirect | None
    reason: str
    landing: float | None = None
    direct: float | None = None
    device_nbytes: int = 0

    @property
    def name(self) -> str:
        """``direct`` or ``landing``."""
        return "landing" if self.open_direct is None else "direct"

    def as_dict(self) -> dict[str, object]:
        """Figures for programs."""
        return {
            "way": self.name,
            "reason": self.reason,
            "landing_bytes_per_second": self.landing,
            "direct_bytes_per_second": self.direct,
            "library_device_bytes": self.device_nbytes,
        }


def choose_way(model: FlashModel, device: Device, open_reader: OpenReader, verify: Verify) -> WayChoice:
    """The faster way for the bundles of a model; the usual one where there is no choice. Takes well below a second.

    Raises
    ------
    BudgetError
        If the device has no room for `_N_GROUPS` groups of bundles.
    FlashReadError
        If the file cannot be read by the usual way.
    """
    if verify == "always":
        return WayChoice(None, "the host checks every bundle")
    try:
        kvikio = load_kvikio()
    except FlashError as error:
        return WayChoice(None, error.message)
    return measure_ways(model, device, open_reader, partial(SlotReader, kvikio))


def measure_ways(model: FlashModel, device: Device, open_reader: OpenReader, open_direct: OpenDirect) -> WayChoice:
    """The faster way by measurement; see `choose_way`."""
    info = model.layers[0]
    path, stride, n_neurons = info.extent.path, info.geometry.stride, info.geometry.n_neurons
    n_bundles = max(1, min(_N_GROUPS * GROUP_BUNDLES, n_neurons // (2 * _N_ROUNDS)))
    chosen = np.random.default_rng(0).permutation(n_neurons).astype(np.int32)
    rounds = [np.sort(chosen[i * n_bundles : (i + 1) * n_bundles]) for i in range(2 * _N_ROUNDS)]  # none read twice
    with ExitStack() as stack:
        reader = stack.enter_context(closing(open_reader(path)))
        free, _ = device.memory()
        try:
            straight = stack.enter_context(closing(open_direct(path)))
        except FlashReadError as error:
            return WayChoice(None, error.message)
        taken = free - device.memory()[0]
        ring = LandingRing(device, _N_GROUPS, GROUP_BUNDLES * stride)
        options: dict[str, Any] = {
            "n_slots": n_bundles,
            "n_tier_slots": 0,
            "checksums": np.zeros(n_neurons, np.uint32),
            "verify": "never",
            "reader": reader,
        }
        by_landing, by_direct = (
            DeviceLayer(info, device, ring, window=LeastRecent(n_neurons, n_bundles), direct=direct, **options)
            for direct in (None, straight)
        )
        free, _ = device.memory()
        landing = n_bundles * stride / min(_seconds(by_landing, ids) for ids in rounds[::2])
        try:
            direct = n_bundles * stride / min(_seconds(by_direct, ids) for ids in rounds[1::2])
        except FlashReadError as error:
            return WayChoice(None, error.message, landing)
        taken += free - device.memory()[0]
    is_faster = direct > _CLEARLY * landing
    reason = f"straight to the device {direct / 2**30:.2f} GiB/s, by page-locked memory {landing / 2**30:.2f} GiB/s"
    return WayChoice(open_direct if is_faster else None, reason, landing, direct, max(taken, 0))


def _seconds(layer: DeviceLayer, ids: Ids) -> float:
    """How long bundles take from being asked for until kernels find them in their slots."""
    began = time.perf_counter()
    for _ in layer.fetch(ids).arrivals():
        pass
    layer.device.synchronize(layer.device.record("compute"))
    return time.perf_counter() - began
