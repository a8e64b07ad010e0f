"""The bundles of one layer in device memory, kept in step: what the window holds, which slot has it, what is read.

`fetch` takes the neurons that are wanted, steps the window, moves what leaves to the second tier and what is found
there back, and begins to read the others. What cannot be read, or does not match its checksum, is rolled back.

Bundles land in page-locked memory and are copied to their slots from there. Where a `SlotReader` is given, those that
nobody has to check go straight to their slots, unless they are read ahead: there is time for a copy then, and
`SlotReader` could not let others go first.

Knows: one layer. Does not know: how neurons are selected, arithmetic.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from flashfmt import BundlesInfo
from flashfmt.errors import FlashError, FlashReadError
from reference_engine.backends.cupy_protocol import Bytes, Device, DeviceArray, Event
from reference_engine.bundle_checksums import Verify, require_checksums
from reference_engine.device_direct import SlotReader, SlotReads
from reference_engine.device_landing import Arriving, LandingRing
from reference_engine.device_slots import Slots, SlotTable, VictimTable
from reference_engine.flash_io import RangeReader
from reference_engine.neuron_window import Ids, NeuronWindow
from reference_engine.telemetry import Costs

GROUP_BUNDLES: Final = 128  # what arrives together is copied and computed together
_COPY_THREADS: Final = 128


class DeviceLayer:
    """Bundles of one layer on the device.

    Parameters
    ----------
    ring : where what is read lands; shared by all layers.
    n_slots, n_tier_slots : bundles that the device has room for, and the second tier behind it.
    checksums : uint32 [n_neurons] of the layer.
    verify : check bundles never, when they first arrive, or whenever they arrive.
    reader : of the layer's file.
    direct : of the layer's file, too, straight to the slots; None lets everything land.

    Attributes
    ----------
    rows : uint8 [n_slots, stride] on the device.
    n_from_tier : bundles that the second tier saved a read for.
    """

    def __init__(
        self,
        info: BundlesInfo,
        device: Device,
        ring: LandingRing,
        *,
        window: NeuronWindow,
        n_slots: int,
        n_tier_slots: int,
        checksums: npt.NDArray[np.uint32],
        verify: Verify,
        reader: RangeReader,
        direct: SlotReader | None = None,
    ) -> None:
        n_neurons, stride = info.geometry.n_neurons, info.geometry.stride
        self.info = info
        self.device = device
        self.ring = ring
        self.window = window
        self.n_from_tier = 0
        self.rows = device.empty((n_slots, stride), np.uint8)
        self._table = SlotTable(n_slots, n_neurons)
        self._tier = VictimTable(n_tier_slots, n_neurons) if n_tier_slots else None
        self._tier_rows = device.pinned(n_tier_slots * stride).reshape(n_tier_slots, stride) if n_tier_slots else None
        self._checksums = checksums
        self._verify = verify
        self._is_verified = np.zeros(n_neurons, np.bool_)
        self._reader = reader
        self._direct = direct

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self._table.n_slots

    @property
    def n_held(self) -> int:
        """Bundles in slots now."""
        return self._table.n_slots - self._table.n_free

    def is_held(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Which neurons have a slot, bool [len(ids)]."""
        return self._table.has(ids)

    def fetch(self, wanted: Ids, *, ahead: bool = False) -> DeviceFetch:
        """See `ActiveLayer.fetch`."""
        began = time.perf_counter()
        step = self.window.step(wanted)
        given_up = self._table.release(step.evicted)
        self._table.assign(step.missing)
        found, found_in, kept, kept_in = self._exchange(step.missing, step.evicted)
        self.n_from_tier += len(found)
        missing, n_direct = self._ways(np.setdiff1d(step.missing, found, assume_unique=True))
        order = np.concatenate((np.setdiff1d(wanted, missing, assume_unique=True), missing))
        ids, slots, kept_from, kept_to, found_from, found_to = self._upload(
            order, self._table.slots(order), given_up[len(given_up) - len(kept) :], kept_in,
            found_in, self._table.slots(found),
        )  # fmt: skip
        self.device.wait("copy", self.device.record("compute"))  # launched kernels may still read given up slots
        self._move(self.rows, kept_from, self._tier_rows, kept_to)
        self._move(self._tier_rows, found_from, self.rows, found_to)
        if len(kept) or len(found):
            self.device.wait("compute", self.device.record("copy"))
        fetch = DeviceFetch(self, order, len(order) - len(missing), ids, slots, n_direct=n_direct, ahead=ahead)
        fetch.n_hits, fetch.n_evicted = len(step.hits), len(step.evicted)
        fetch.costs = Costs(upkeep_seconds=time.perf_counter() - began)
        fetch.begin()
        return fetch

    def preload(self, tokens: Iterable[Ids]) -> DeviceFetch:
        """See `ActiveLayer.preload`."""
        for active in tokens:
            step = self.window.step(active)
            self._table.release(step.evicted)
            self._table.assign(step.missing)
        held, n_direct = self._ways(self.window.held())
        ids, slots = self._upload(held, self._table.slots(held))
        self.device.wait("copy", self.device.record("compute"))
        fetch = DeviceFetch(self, held, 0, ids, slots, n_direct=n_direct, ahead=False)
        fetch.begin()
        return fetch

    def begin(self, ids: Ids, *, ahead: bool) -> Arriving:
        """Begin to read bundles to a buffer of the ring."""
        return self.ring.begin(self._reader, self._offsets(ids), self.info.geometry.stride, ahead=ahead)

    def begin_direct(self, ids: Ids) -> SlotReads:
        """Begin to read bundles straight to their slots, which must not be in use any more."""
        if self._direct is None:
            raise RuntimeError("this layer has nothing that reads straight to its slots")
        return self._direct.begin(self._offsets(ids), self.rows, self._table.slots(ids))

    def land(self, ids: Ids, arriving: Arriving, slots: DeviceArray) -> Costs:
        """Wait for bundles, check them, and begin to copy them to their slots; later kernels find them there.

        Raises
        ------
        FlashReadError, ChecksumError
        """
        began = time.perf_counter()
        try:
            self.ring.wait(arriving)
        except FlashReadError as error:
            raise _named(error, self.info, ids) from error
        arrived = time.perf_counter()
        self._check(ids, arriving.data.reshape(len(ids), self.info.geometry.stride))
        checked = time.perf_counter()
        self._move(self.ring.send(arriving), None, self.rows, slots)
        self.device.wait("compute", self.device.record("copy"))
        plan = arriving.pending.plan
        return Costs(
            wait_seconds=arrived - began,
            check_seconds=checked - arrived,
            upkeep_seconds=time.perf_counter() - checked,
            n_requests=len(plan),
            bytes_read=int(plan.nbytes.sum()),
        )

    def settle(self, ids: Ids, reads: SlotReads) -> Costs:
        """Wait until bundles are in their slots; kernels that are launched from now on find them there.

        Raises
        ------
        FlashReadError
        """
        n_requests, began = len(reads), time.perf_counter()
        try:
            reads.wait()
        except FlashReadError as error:
            raise _named(error, self.info, ids) from error
        return Costs(
            wait_seconds=time.perf_counter() - began,
            n_requests=n_requests,
            bytes_read=n_requests * self.info.geometry.stride,
        )

    def forget(self, ids: Ids) -> None:
        """No longer hold neurons whose bundles did not come."""
        if len(ids):
            self.window.forget(ids)
            self._table.release(ids)

    def _exchange(self, missing: Ids, evicted: Ids) -> tuple[Ids, Slots, Ids, Slots]:
        """What the second tier hands out of `missing` and takes in of `evicted`; nothing where there is none."""
        if self._tier is None:
            nothing = missing[:0]
            return nothing, nothing, nothing, nothing
        return self._tier.exchange(missing, evicted)

    def _ways(self, missing: Ids) -> tuple[Ids, int]:
        """`missing`, sorted, with those first that may go straight to their slots, and how many these are."""
        if self._direct is None or self._verify == "always":
            return missing, 0
        if self._verify == "never":
            return missing, len(missing)
        is_verified = self._is_verified[missing]
        return np.concatenate((missing[is_verified], missing[~is_verified])), int(is_verified.sum())

    def _offsets(self, ids: Ids) -> npt.NDArray[np.int64]:
        return ids.astype(np.int64) * self.info.geometry.stride + self.info.extent.offset

    def _upload(self, *lists: Slots) -> list[DeviceArray]:
        """Several int32 lists in one copy."""
        together = self.device.upload(np.concatenate(lists))
        ends = np.cumsum([len(part) for part in lists]).tolist()
        return [together[end - len(part) : end] for part, end in zip(lists, ends, strict=True)]

    def _check(self, ids: Ids, rows: Bytes) -> None:
        if self._verify == "never":
            return
        places = np.arange(len(ids)) if self._verify == "always" else np.flatnonzero(~self._is_verified[ids])
        require_checksums(self.info, ids[places].tolist(), (rows[place] for place in places), self._checksums)
        self._is_verified[ids] = True

    def _move(self, source: Any, source_slots: Any, target: Any, target_slots: DeviceArray) -> None:
        """Begin to copy rows from slots (row after row where None) to slots, in the copy queue."""
        n, stride = len(target_slots), np.int64(self.info.geometry.stride)
        if n:
            arguments = (source, source_slots, target, target_slots, stride, stride)
            self.device.launch("move_rows", (n, 1, 1), _COPY_THREADS, *arguments, queue="copy")


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Bundles that are read together, and where they are in their fetch."""

    place: slice
    arriving: Arriving | SlotReads


class DeviceFetch:
    """Bundles on their way, see `ActiveFetch`: the first `n_there` are there at once, the others arrive group by group.

    Parameters
    ----------
    n_direct : bundles behind the first `n_there` that may go straight to their slots. Those slots are out of use once
        everything in the copy queue so far is done.

    Attributes
    ----------
    ids, slots : int32 of all of them, on the device, in the order in which they come.
    n_missing : bundles that have to be read.
    n_hits, n_evicted : bundles that were held, and that left. What the second tier had is neither hit nor missing.
    costs : so far.
    """

    def __init__(
        self,
        layer: DeviceLayer,
        order: Ids,
        n_there: int,
        ids: DeviceArray,
        slots: DeviceArray,
        *,
        n_direct: int,
        ahead: bool,
    ) -> None:
        self.ids = ids
        self.slots = slots
        self.n_there = n_there
        self.n_missing = len(order) - n_there
        self.n_hits = self.n_evicted = 0
        self.costs = Costs()
        self._layer = layer
        self._order = order
        self._is_ahead = ahead
        self._n_begun = n_there
        self._direct_end = n_there + n_direct
        self._slots_left: Event = layer.device.record("copy") if n_direct else None
        self._groups: deque[_Group] = deque()

    def begin(self) -> None:
        """Begin to read as many groups as the ring has room for, and all that need none.

        Raises
        ------
        FlashReadError
            If the reader is closed; the fetch is finished then.
        """
        try:
            while self._n_begun < len(self._order):
                may_be_direct = self._n_begun < self._direct_end
                is_direct = may_be_direct and not self._is_ahead
                if not is_direct and not self._layer.ring.has_room(ahead=self._is_ahead):
                    break
                end = self._direct_end if may_be_direct else len(self._order)
                place = slice(self._n_begun, min(self._n_begun + GROUP_BUNDLES, end))
                self._groups.append(_Group(place, self._begin(self._order[place], is_direct=is_direct)))
                self._n_begun = place.stop
        except BaseException:
            self.finish()
            raise

    def there(self) -> tuple[DeviceArray, DeviceArray]:
        """Neurons and slots of the first `n_there`."""
        return self.ids[: self.n_there], self.slots[: self.n_there]

    def arrivals(self) -> Iterator[tuple[DeviceArray, DeviceArray]]:
        """Neurons and slots of bundles that have arrived, group by group. The layer is in work from now on.

        Raises
        ------
        FlashReadError, ChecksumError
            Naming layer, neuron and byte offset. The fetch is finished then.
        """
        self._is_ahead = False
        self.begin()
        while self._groups:
            group = self._groups.popleft()
            try:
                self._land(group)
            except BaseException:
                self._end(lost=group)
                raise
            self.begin()
            yield self.ids[group.place], self.slots[group.place]

    def finish(self) -> None:
        """Keep what has arrived, give up the rest, and roll back what is not there, without a word."""
        self._end()

    def _end(self, lost: _Group | None = None) -> None:
        """The same; `lost` is rolled back as well."""
        absent = [self._order[self._n_begun :]] + ([self._order[lost.place]] if lost is not None else [])
        self._n_begun = len(self._order)
        while self._groups:
            group = self._groups.popleft()
            if isinstance(group.arriving, Arriving):
                group.arriving.pending.is_cancelled = not group.arriving.pending.is_done
            try:
                self._land(group)
            except FlashError:
                absent.append(self._order[group.place])
        self._layer.forget(np.concatenate(absent))

    def _begin(self, ids: Ids, *, is_direct: bool) -> Arriving | SlotReads:
        if not is_direct:
            return self._layer.begin(ids, ahead=self._is_ahead)
        if self._slots_left is not None:
            self._layer.device.synchronize(self._slots_left)
            self._slots_left = None
        return self._layer.begin_direct(ids)

    def _land(self, group: _Group) -> None:
        ids, arriving = self._order[group.place], group.arriving
        if isinstance(arriving, SlotReads):
            self.costs += self._layer.settle(ids, arriving)
            return
        try:
            if arriving.pending.is_cancelled:
                with suppress(FlashReadError):
                    self._layer.ring.wait(arriving)
                raise FlashReadError("reading was given up", path=self._layer.info.extent.path)
            self.costs += self._layer.land(ids, arriving, self.slots[group.place])
        finally:
            self._layer.ring.release(arriving)


def _named(error: FlashReadError, info: BundlesInfo, ids: Ids) -> FlashReadError:
    """`error`, with the layer and the neurons concerned."""
    message = f"bundles of layer {info.layer}, neurons {ids[0]} to {ids[-1]}, cannot be read: {error.message}"
    return FlashReadError(message, path=info.extent.path, where=error.where)
