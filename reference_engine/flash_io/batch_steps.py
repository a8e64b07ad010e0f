"""What is computed for a batch of reads before it begins and as its results come: the contract, and the plain way.

Every step is a function of arrays. Here they are numpy's, one after the other; `numba_queue` has them compiled, for
processes that have numba loaded. Which of the two makes no difference to what is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from reference_engine.flash_io.request_plan import I64, RequestPlan, plan_requests

Bytes = npt.NDArray[np.uint8]
TAG_BITS: Final = 32  # a tag is the batch's number and, in these bits, the request's
REQUEST_MASK: Final = (1 << TAG_BITS) - 1


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """What plans keep to: what all ranges must be multiples of, a power of two; for the others see `plan_requests`."""

    alignment: int
    gap_bytes: int
    max_request_bytes: int
    max_segments: int
    scratch_address: int


class BatchSteps(Protocol):
    """The steps of a batch, within certain limits. From any thread."""

    def plan(self, offsets: I64, sizes: I64, positions: I64, buffer: Bytes) -> RequestPlan | None:
        """The requests for ranges, as `plan_requests` makes them; None if one of them is not allowed.

        Ranges must be sorted, not empty, not overlapping, and aligned as their slots are, which must lie in the buffer.

        Parameters
        ----------
        offsets, sizes, positions : int64 [n], C-contiguous and writable; the plan may keep the first two.
        buffer : uint8 [n_bytes], C-contiguous and writable.
        """
        ...

    def settle(self, tags: I64, results: I64, number: int, nbytes: I64) -> tuple[int, int, bool]:
        """Take stock of one batch's results among those of several.

        Parameters
        ----------
        tags, results : int64 [n]; see `TAG_BITS`.
        number : of the batch.
        nbytes : int64 [n_requests]; what its requests asked for.

        Returns
        -------
        Its number of results, the bytes that these requests asked for, and whether they came back with all of them.
        """
        ...


class PlainSteps:
    """`BatchSteps` in numpy."""

    def __init__(self, limits: PlanLimits) -> None:
        self._limits = limits

    def plan(self, offsets: I64, sizes: I64, positions: I64, buffer: Bytes) -> RequestPlan | None:
        """Plan the requests; see `BatchSteps.plan`."""
        limits = self._limits
        addresses = positions + buffer.ctypes.data
        if len(offsets):
            if sizes.min() <= 0 or offsets[0] < 0 or (offsets[1:] < (offsets + sizes)[:-1]).any():
                return None
            if positions.min() < 0 or (positions + sizes).max() > len(buffer):
                return None
            if ((offsets | sizes | addresses) & (limits.alignment - 1)).any():
                return None
        return plan_requests(
            offsets,
            sizes,
            addresses,
            gap_bytes=limits.gap_bytes,
            max_request_bytes=limits.max_request_bytes,
            max_segments=limits.max_segments,
            scratch_address=limits.scratch_address,
        )

    def settle(self, tags: I64, results: I64, number: int, nbytes: I64) -> tuple[int, int, bool]:
        """Take stock of a batch's results; see `BatchSteps.settle`."""
        mine = tags >> TAG_BITS == number
        wanted = nbytes[tags[mine] & REQUEST_MASK]
        return len(wanted), int(wanted.sum()), bool(np.array_equal(results[mine], wanted))
