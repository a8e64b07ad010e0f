"""The bundles of one layer, kept in step: what the window holds, where the cache has it, what is still being read.

`fetch` takes the neurons that are wanted, steps the window, makes room and begins all reads at once; the caller
computes with what is there while they land. What cannot be read, or does not match its checksum, is rolled back: window
and cache then hold exactly what has arrived.

Knows: one layer. Does not know: how neurons are selected, arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashfmt import BundlesInfo
from flashfmt.errors import FlashError, FlashReadError
from reference_engine.bundle_cache import BundleCache
from reference_engine.bundle_checksums import Verify, bundle_mismatch
from reference_engine.neuron_window import Ids, NeuronWindow, WindowStep
from reference_engine.slot_reader import ReadBatch, RowTable, SlotReader


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds that bringing bundles took: waiting for reads, comparing checksums, keeping window and cache."""

    wait_seconds: float = 0.0
    check_seconds: float = 0.0
    upkeep_seconds: float = 0.0

    def __add__(self, other: Costs) -> Costs:
        return Costs(
            self.wait_seconds + other.wait_seconds,
            self.check_seconds + other.check_seconds,
            self.upkeep_seconds + other.upkeep_seconds,
        )


class LayerBundles:
    """Bundles of one layer in DRAM.

    Parameters
    ----------
    rows : uint8 [capacity, stride] at a multiple of `IO_ALIGNMENT`, where bundles are held.
    checksums : uint32 [n_neurons] of the layer.
    verify : check bundles never, when they first arrive, or whenever they arrive.
    """

    def __init__(
        self,
        info: BundlesInfo,
        *,
        window: NeuronWindow,
        rows: npt.NDArray[np.uint8],
        checksums: npt.NDArray[np.uint32],
        verify: Verify,
        reader: SlotReader,
    ) -> None:
        self.info = info
        self.cache = BundleCache(rows, info.geometry.n_neurons)
        self.window = window
        self._checksums = checksums
        self._verify = verify
        self._is_verified = np.zeros(info.geometry.n_neurons, np.bool_)
        self._table = RowTable(info.extent.path, info.extent.offset, info.geometry.stride)
        self._reader = reader

    def fetch(self, wanted: Ids, *, expected: bool = False) -> Fetch:
        """Hold the neurons `wanted`, and begin to read those that are not held.

        No other fetch of this layer may be unfinished.

        Parameters
        ----------
        wanted : sorted, unique, at most as many as there are slots.
        expected : read after everything that is demanded.

        Raises
        ------
        FlashReadError
            If the file cannot be opened. What reading itself meets is raised by `Fetch.arrive`.
        """
        began = time.perf_counter()
        step = self.window.step(wanted)
        slots = self.cache.apply(step)
        try:
            batch = self._reader.submit(self._table, step.missing, self.cache.rows, slots, expected=expected)
        except BaseException:
            self.forget(step.missing)
            raise
        return Fetch(self, step, slots, batch, Costs(upkeep_seconds=time.perf_counter() - began))

    def forget(self, ids: Ids) -> None:
        """No longer hold neurons whose bundles have not arrived. No read of this layer may be under way."""
        self.window.forget(ids)
        self.cache.remove(ids)

    def check(self, ids: Ids, slots: npt.NDArray[np.int32]) -> dict[int, FlashError]:
        """Compare arrived bundles with their checksums as far as asked for; returns what is wrong, by place."""
        if self._verify == "never":
            return {}
        places = np.arange(len(ids)) if self._verify == "always" else np.flatnonzero(~self._is_verified[ids])
        wrong: dict[int, FlashError] = {}
        for place in places.tolist():
            error = bundle_mismatch(self.info, int(ids[place]), self.cache.rows[slots[place]], self._checksums)
            if error is not None:
                wrong[place] = error
        self._is_verified[ids[places]] = True
        if wrong:
            self._is_verified[ids[list(wrong)]] = False
        return wrong

    def read_error(self, neuron: int, error: FlashReadError) -> FlashReadError:
        """`error`, with the layer and the neuron that it hit."""
        return FlashReadError(
            f"bundle of layer {self.info.layer}, neuron {neuron} cannot be read: {error}",
            path=self.info.extent.path,
            where=self.info.extent.offset + neuron * self.info.geometry.stride,
        )


class Fetch:
    """Bundles on their way. `hits` are there at once; `arrive` waits for the others in order; `finish` ends it.

    Attributes
    ----------
    hits, missing : int32 ids, sorted.
    missing_slots : int32, where each of the missing ones goes.
    costs : seconds so far.
    """

    def __init__(
        self, layer: LayerBundles, step: WindowStep, slots: npt.NDArray[np.int32], batch: ReadBatch, costs: Costs
    ) -> None:
        self.hits, self.missing, self.n_evicted = step.hits, step.missing, len(step.evicted)
        self.missing_slots = slots
        self.batch = batch
        self.costs = costs
        self._layer = layer
        self._n_arrived = 0
        self._is_finished = False

    def arrive(self, n: int) -> None:
        """Wait until the first `n` missing bundles are in their slots, and correct.

        Raises
        ------
        FlashReadError, ChecksumError
            Naming layer, neuron and byte offset. The whole fetch is finished then: what came well stays held.
        """
        if n <= self._n_arrived:
            return
        failures = self._receive(n)
        if failures:
            self._receive(len(self.missing), failures)
            self._roll_back(failures)
            raise failures[min(failures)]

    def finish(self, *, cancel: bool) -> None:
        """Wait for what is under way and roll back what failed, without a word: nobody computed with it.

        Parameters
        ----------
        cancel : give up reads that were not begun, rather than wait for them.
        """
        if self._is_finished:
            return
        withdrawn = self.batch.cancel() if cancel else []
        failures = self._receive(len(self.missing), absent=withdrawn)
        self._roll_back([*failures, *withdrawn])

    def _receive(
        self, n: int, failures: dict[int, FlashError] | None = None, absent: Iterable[int] = ()
    ) -> dict[int, FlashError]:
        """Wait for and check the bundles up to the n-th; adds what went wrong to `failures`."""
        failures = {} if failures is None else failures
        began = time.perf_counter()
        self.batch.wait(n)
        arrived = time.perf_counter()
        for place, error in self.batch.failures().items():
            failures[place] = self._layer.read_error(int(self.missing[place]), error)
        is_there = np.ones(len(self.missing), np.bool_)
        is_there[: self._n_arrived] = False
        is_there[n:] = False
        is_there[list(failures)] = False
        is_there[list(absent)] = False
        places = np.flatnonzero(is_there)
        for i, wrong in self._layer.check(self.missing[places], self.missing_slots[places]).items():
            failures[int(places[i])] = wrong
        self._n_arrived = max(self._n_arrived, n)
        self._is_finished = self._n_arrived == len(self.missing)
        self.costs += Costs(wait_seconds=arrived - began, check_seconds=time.perf_counter() - arrived)
        return failures

    def _roll_back(self, places: Iterable[int]) -> None:
        self._is_finished = True
        lost = self.missing[sorted(set(places))]
        if len(lost):
            self._layer.forget(lost)
