"""Which requests to make for many ranges: merge neighbours, read through small gaps, split what is long. Pure; no I/O.

A request is one contiguous piece of the file and a scatter list, because ranges that are neighbours in the file lie in
unrelated slots. Bytes of a gap land in a scratch area that nobody reads. Measured on a shared virtual disk, requests
with such lists reach 0.8 to 1.0 times the speed of the same ones into contiguous memory: a price for slots that are
the caller's to choose, and for nothing that has to be copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]

IOVEC: Final = np.dtype([("address", "<u8"), ("nbytes", "<u8")])  # struct iovec of 64-bit systems


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """Requests in file order, and where their bytes go.

    Attributes
    ----------
    offsets, nbytes : int64 [n_requests]; file range of each request.
    segments : IOVEC [n_segments]; memory that the bytes of the requests fill, one request after the other.
    first_segment : int64 [n_requests]; index of each request's first segment.
    n_segments : int64 [n_requests].
    """

    offsets: I64
    nbytes: I64
    segments: npt.NDArray[np.void]
    first_segment: I64
    n_segments: I64

    def __len__(self) -> int:
        return len(self.offsets)


def plan_requests(
    offsets: I64,
    nbytes: I64,
    addresses: I64,
    *,
    gap_bytes: int,
    max_request_bytes: int,
    max_segments: int,
    scratch_address: int,
) -> RequestPlan:
    """Plan the reading of file ranges ``[offsets[i], offsets[i] + nbytes[i])`` to memory at ``addresses[i]``.

    Ranges with at most `gap_bytes` between them form a run. A run is cut every `max_request_bytes` from its
    beginning, in the middle of a range if need be; a piece of a gap at either end of a request is left out. With
    everything a multiple of an alignment, requests and segments are so too.

    Parameters
    ----------
    offsets, nbytes, addresses : int64 [n]; sorted, not overlapping, `nbytes` above 0.
    gap_bytes : longest gap to read through, below `max_request_bytes`; 0 merges only what is adjacent.
    max_request_bytes : size no request exceeds.
    max_segments : segments no request exceeds; at least 2.
    scratch_address : memory of at least `gap_bytes` for the bytes between ranges.
    """
    if not 0 <= gap_bytes < max_request_bytes or max_segments < 2:
        raise ValueError(f"cannot plan with {gap_bytes=}, {max_request_bytes=}, {max_segments=}")
    n = len(offsets)
    ends = offsets + nbytes
    between = offsets[1:] - ends[:-1]
    if between.min(initial=gap_bytes + 1) > gap_bytes and nbytes.max(initial=0) <= max_request_bytes:
        return RequestPlan(offsets, nbytes, _segments(addresses, nbytes), np.arange(n), np.ones(n, np.int64))
    starts_run = np.ones(n, bool)
    np.greater(between, gap_bytes, out=starts_run[1:])
    run_offsets = offsets[starts_run][np.cumsum(starts_run) - 1]

    # Pieces: ranges cut where the windows of max_request_bytes of their run end.
    first_window = (offsets - run_offsets) // max_request_bytes
    n_pieces = (ends - 1 - run_offsets) // max_request_bytes - first_window + 1
    total = int(n_pieces.sum())
    of_range = np.repeat(np.arange(n), n_pieces)
    rank = np.arange(total) - (np.cumsum(n_pieces) - n_pieces)[of_range]
    window = first_window[of_range] + rank
    window_offset = run_offsets[of_range] + window * max_request_bytes
    start = np.maximum(offsets[of_range], window_offset)
    end = np.minimum(ends[of_range], window_offset + max_request_bytes)
    address = addresses[of_range] + (start - offsets[of_range])

    starts_request = np.ones(total, bool)
    starts_request[1:] = window_offset[1:] != window_offset[:-1]
    rank = _rank_since(starts_request)
    starts_request |= rank % (max_segments // 2) == 0  # a piece and the gap behind it are two segments

    gap = np.zeros(total, np.int64)  # before each piece, within its request
    gap[1:] = np.where(starts_request[1:], 0, start[1:] - end[:-1])
    starts_segment = starts_request | (gap > 0)
    starts_segment[1:] |= address[1:] != address[:-1] + (end - start)[:-1]

    heads = np.flatnonzero(starts_segment)
    head_gap = gap[heads]
    segment_nbytes = np.add.reduceat(end - start, heads)
    place = np.arange(len(heads)) + np.cumsum(head_gap > 0)  # each gap takes a place before its segment
    segments = np.empty(int(place[-1]) + 1, IOVEC)
    segments["address"][place], segments["nbytes"][place] = address[heads], segment_nbytes
    gap_place = place[head_gap > 0] - 1
    segments["address"][gap_place], segments["nbytes"][gap_place] = scratch_address, head_gap[head_gap > 0]

    request_heads = np.flatnonzero(starts_request)
    first_segment = place[np.searchsorted(heads, request_heads)]
    request_end = np.append(end[request_heads[1:] - 1], end[-1])
    return RequestPlan(
        start[request_heads],
        request_end - start[request_heads],
        segments,
        first_segment,
        np.diff(first_segment, append=len(segments)),
    )


def _segments(addresses: I64, nbytes: I64) -> npt.NDArray[np.void]:
    segments = np.empty(len(addresses), IOVEC)
    segments["address"], segments["nbytes"] = addresses, nbytes
    return segments


def _rank_since(starts: npt.NDArray[np.bool_]) -> I64:
    """Position of each element counted from the last start."""
    heads = np.flatnonzero(starts)
    return np.arange(len(starts)) - np.repeat(heads, np.diff(heads, append=len(starts)))
