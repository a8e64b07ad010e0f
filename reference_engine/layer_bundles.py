"""The bundles of one layer, kept in step: what the window holds, where the cache has it, what is still being read.

`fetch` takes the neurons that are wanted, steps the window, makes room and begins all reads at once; the caller
computes with what is there while they land. What cannot be read, or does not match its checksum, is rolled back: window
and cache then hold exactly what has arrived.

Knows: one layer. Does not know: how neurons are selected, arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from flashfmt import BundlesInfo
from flashfmt.errors import ChecksumError, FlashError, FlashReadError
from reference_engine.bundle_cache import BundleCache
from reference_engine.bundle_checksums import Verify, bundle_mismatch
from reference_engine.flash_io import Pending, RangeReader
from reference_engine.neuron_window import Ids, NeuronWindow, WindowStep
from reference_engine.telemetry import Costs

GROUP_BUNDLES: Final = 256  # what arrives together is computed together, while the next group lands

Slots = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Bundles that are read together."""

    ids: Ids
    slots: Slots
    pending: Pending


class LayerBundles:
    """Bundles of one layer in DRAM.

    Parameters
    ----------
    rows : uint8 [capacity, stride] at a multiple of `IO_ALIGNMENT`, where bundles are held.
    checksums : uint32 [n_neurons] of the layer.
    verify : check bundles never, when they first arrive, or whenever they arrive.
    reader : of the layer's file.
    """

    def __init__(
        self,
        info: BundlesInfo,
        *,
        window: NeuronWindow,
        rows: npt.NDArray[np.uint8],
        checksums: npt.NDArray[np.uint32],
        verify: Verify,
        reader: RangeReader,
    ) -> None:
        self.info = info
        self.cache = BundleCache(rows, info.geometry.n_neurons)
        self.window = window
        self._checksums = checksums
        self._verify = verify
        self._is_verified = np.zeros(info.geometry.n_neurons, np.bool_)
        self._reader = reader

    @property
    def rows(self) -> npt.NDArray[np.uint8]:
        """Where bundles are held, uint8 [capacity, stride]."""
        return self.cache.rows

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.cache.capacity

    @property
    def n_held(self) -> int:
        """Bundles in slots now."""
        return self.cache.num_used

    def is_held(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Which neurons have a slot, bool [len(ids)]."""
        return self.cache.is_held(ids)

    def fetch(self, wanted: Ids, *, ahead: bool = False) -> Fetch:
        """See `ActiveLayer.fetch`."""
        began = time.perf_counter()
        step = self.window.step(wanted)
        slots = self.cache.apply(step)
        return self._begin(step, slots, time.perf_counter() - began, ahead=ahead)

    def preload(self, tokens: Iterable[Ids]) -> Fetch:
        """See `ActiveLayer.preload`."""
        for active in tokens:
            self.cache.apply(self.window.step(active))
        held = np.sort(self.cache.held())
        return self._begin(WindowStep(held[:0], held, held[:0]), self.cache.slots(held), 0.0, ahead=False)

    def _begin(self, step: WindowStep, slots: Slots, upkeep_seconds: float, *, ahead: bool) -> Fetch:
        """Begin to read what a step misses to its slots."""
        missing, groups = step.missing, list[_Group]()
        fetch = Fetch(self, step.hits, missing, len(step.evicted), groups, is_ahead=ahead)
        costs = fetch.costs
        costs.upkeep_seconds = upkeep_seconds
        try:
            for first in range(0, len(missing), GROUP_BUNDLES):
                ids, places = missing[first : first + GROUP_BUNDLES], slots[first : first + GROUP_BUNDLES]
                groups.append(_Group(ids, places, self._submit(ids, places, ahead=ahead)))
                plan = groups[-1].pending.plan
                costs.n_requests += len(plan)
                costs.bytes_read += int(plan.nbytes.sum())
        except BaseException:
            fetch.finish()
            self._forget(missing[len(groups) * GROUP_BUNDLES :])
            raise
        return fetch

    def _submit(self, ids: Ids, slots: Slots, *, ahead: bool) -> Pending:
        stride = self.info.geometry.stride
        offsets = np.multiply(ids, stride, dtype=np.int64)
        offsets += self.info.extent.offset
        positions = np.multiply(slots, stride, dtype=np.int64)
        return self._reader.submit(offsets, stride, self.cache.rows, positions, ahead=ahead)

    def _forget(self, ids: Ids) -> None:
        """No longer hold neurons whose bundles did not come. No read of this layer may be under way."""
        if len(ids):
            self.window.forget(ids)
            self.cache.remove(ids)

    def _mismatches(self, ids: Ids, slots: Slots) -> dict[int, ChecksumError]:
        """Compare arrived bundles with their checksums as far as asked for; returns what is wrong, by place."""
        if self._verify == "never":
            return {}
        places = np.arange(len(ids)) if self._verify == "always" else np.flatnonzero(~self._is_verified[ids])
        if not len(places):
            return {}
        wrong: dict[int, ChecksumError] = {}
        for place in places.tolist():
            error = bundle_mismatch(self.info, int(ids[place]), self.cache.rows[slots[place]], self._checksums)
            if error is not None:
                wrong[place] = error
        self._is_verified[ids[places]] = True
        self._is_verified[ids[list(wrong)]] = False
        return wrong

    def _read_error(self, error: FlashReadError, ids: Ids) -> FlashReadError:
        """`error`, with the layer, and the neuron whose bundle it hit."""
        info, stride = self.info, self.info.geometry.stride
        place = error.where if isinstance(error.where, int) else info.extent.offset + int(ids[0]) * stride
        neuron = min(max((place - info.extent.offset) // stride, int(ids[0])), int(ids[-1]))
        message = f"bundle of layer {info.layer}, neuron {neuron} cannot be read: {error.message}"
        where = info.extent.offset + neuron * stride
        if error.expected is None:
            return FlashReadError(message, path=info.extent.path, where=where)
        return FlashReadError(message, path=info.extent.path, where=where, expected=error.expected, actual=error.actual)


class Fetch:
    """Bundles on their way, see `ActiveFetch`: `hits` are there at once, the others arrive group by group.

    Attributes
    ----------
    hits, missing : int32 ids, sorted.
    costs : so far.
    """

    def __init__(
        self,
        layer: LayerBundles,
        hits: Ids,
        missing: Ids,
        n_evicted: int,
        groups: list[_Group],
        *,
        is_ahead: bool = False,
    ) -> None:
        self.hits = hits
        self.missing = missing
        self.n_evicted = n_evicted
        self.costs = Costs()
        self._layer = layer
        self._groups = groups
        self._is_ahead = is_ahead
        self._n_ended = 0  # groups

    @property
    def n_hits(self) -> int:
        """Bundles that were held."""
        return len(self.hits)

    @property
    def n_missing(self) -> int:
        """Bundles that have to be read."""
        return len(self.missing)

    def there(self) -> tuple[Ids, Slots]:
        """Neurons that were held, and what was read ahead and has arrived by now, and their slots.

        Together they are computed in one call: what was read ahead has usually arrived when its layer's turn comes.

        Raises
        ------
        FlashReadError, ChecksumError
            As `arrivals`.
        """
        if self._is_ahead and self._n_ended < len(self._groups):
            self._groups[-1].pending.look()
        ids, slots = [self.hits], [self._layer.cache.slots(self.hits)]
        arrivals = self.arrivals()
        while self._is_ahead and self._n_ended < len(self._groups) and self._groups[self._n_ended].pending.is_done:
            group_ids, group_slots = next(arrivals)
            ids.append(group_ids)
            slots.append(group_slots)
        return (ids[0], slots[0]) if len(ids) == 1 else (np.concatenate(ids), np.concatenate(slots))

    def arrivals(self) -> Iterator[tuple[Ids, Slots]]:
        """Neurons and slots of the missing bundles as they arrive, in their order.

        Raises
        ------
        FlashReadError, ChecksumError
            Naming layer, neuron and byte offset. The fetch is finished then: what came well stays held.
        """
        while self._n_ended < len(self._groups):
            group = self._groups[self._n_ended]
            failures, lost = self._receive(group)
            self._n_ended += 1
            if failures:
                self._end(cancel=False, lost=lost)
                raise failures[0]
            yield group.ids, group.slots

    def carry_on(self) -> None:
        """Let the reads go on, without waiting for them."""
        if self._n_ended < len(self._groups):
            self._groups[-1].pending.look()

    def finish(self) -> None:
        """Keep what has arrived, give up the rest, and roll back what is not there, without a word."""
        self._end(cancel=True)

    def _end(self, *, cancel: bool, lost: Ids | None = None) -> None:
        """Wait for what is under way and roll back what failed, without a word: nobody computed with it.

        Parameters
        ----------
        cancel : give up reads that were not begun, rather than wait for them.
        lost : to be rolled back as well.
        """
        if self._n_ended == len(self._groups) and lost is None:
            return
        waiting, self._n_ended = self._groups[self._n_ended :], len(self._groups)
        if cancel:
            for group in waiting:
                if not group.pending.is_done:
                    group.pending.is_cancelled = True
        absent = [self._receive(group)[1] for group in waiting]
        if lost is not None:
            absent.append(lost)
        if absent:
            self._layer._forget(np.concatenate(absent))

    def _receive(self, group: _Group) -> tuple[list[FlashError], Ids]:
        """Wait for a group and check it; returns what went wrong, and the neurons that are not there."""
        began = time.perf_counter()
        failures: list[FlashError] = []
        try:
            group.pending.wait()
        except FlashReadError as error:
            failures.append(self._layer._read_error(error, group.ids))
        arrived = time.perf_counter()
        self.costs.wait_seconds += arrived - began
        if failures or group.pending.is_cancelled:
            return failures, group.ids
        wrong = self._layer._mismatches(group.ids, group.slots)
        self.costs.check_seconds += time.perf_counter() - arrived
        if not wrong:
            return failures, group.ids[:0]
        return [*wrong.values()], group.ids[list(wrong)]
