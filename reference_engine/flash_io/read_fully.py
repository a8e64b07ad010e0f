"""One request carried out to its end with preadv: what short reads, EINTR, EAGAIN and the end of a file mean.

The thread pool makes all its requests this way; the kernel queues finish with it what they were given back incomplete.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from typing import Final

from flashfmt.errors import FlashReadError
from reference_engine.flash_io.open_file import OpenFile
from reference_engine.flash_io.range_reader import read_failure
from reference_engine.flash_io.request_plan import RequestPlan

RETRIES: Final = frozenset({errno.EAGAIN, errno.EINTR, errno.EWOULDBLOCK})
_MAX_RETRIES: Final = 100
_RETRY_SECONDS: Final = 0.001


def read_fully(file: OpenFile, plan: RequestPlan, i: int) -> int:
    """Read request `i` of `plan` into its segments; returns the number of system calls that it took.

    Raises
    ------
    FlashReadError
        If the system reports an error, or the file ends before the request does.
    """
    offset, nbytes = int(plan.offsets[i]), int(plan.nbytes[i])
    first = int(plan.first_segment[i])
    views = [
        memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
        for address, size in plan.segments[first : first + int(plan.n_segments[i])].tolist()
    ]
    done = n_calls = n_retries = 0
    while done < nbytes:
        n_calls += 1
        try:
            got = os.preadv(file.fd, views, offset + done)
        except OSError as error:
            number = error.errno or errno.EIO
            n_retries += 1
            if number not in RETRIES or n_retries > _MAX_RETRIES:
                raise read_failure(file, offset, nbytes, done, number) from error
            time.sleep(_RETRY_SECONDS)
            continue
        if got == 0 or (got % file.alignment and done + got < nbytes):
            raise FlashReadError(
                "the file ends inside a range",
                path=file.path,
                where=offset + done + got,
                expected=f"{nbytes} bytes from {offset}",
                actual=f"{done + got}",
            )
        done += got
        n_retries = 0
        views = _behind(views, got)
    file.drop_cached(offset, nbytes)
    return n_calls


def _behind(views: list[memoryview[int]], nbytes: int) -> list[memoryview[int]]:
    """What is left of a scatter list after its first `nbytes`."""
    for k, view in enumerate(views):
        if nbytes < len(view):
            return [view[nbytes:], *views[k + 1 :]]
        nbytes -= len(view)
    return []
