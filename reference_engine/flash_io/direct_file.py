"""One file read past the page cache, one range at a time, by the thread that wants it."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from flashfmt.errors import FlashReadError
from flashfmt.layout import round_up
from reference_engine.flash_io.aligned_memory import IO_ALIGNMENT, aligned_empty
from reference_engine.flash_io.io_counters import IoCounters, IoTally
from reference_engine.flash_io.open_file import open_file

_MAX_READ_BYTES: Final = 2 << 20  # larger requests read more slowly and overlap less


class DirectFile:
    """A file open for direct reads. `read_into` may be called from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tally = IoTally()
        self._file = open_file(path)
        self.is_direct = self._file.is_direct
        self._fd = self._file.fd

    @property
    def counters(self) -> IoCounters:
        """Bytes and requests so far; `wait_seconds` is 0, waiting is known to the caller only."""
        return self._tally.counters

    def read_into(self, buffer: npt.NDArray[np.uint8], offset: int, nbytes: int) -> None:
        """Read ``[offset, offset + nbytes)`` to the beginning of `buffer`.

        `offset` and the buffer's address must be multiples of `IO_ALIGNMENT`, and the buffer must have room for
        `nbytes` rounded up to it: whatever lies behind the range in the file may land there.

        Raises
        ------
        FlashReadError
            If the system reports an error, or the file ends before the range does.
        """
        request_nbytes = round_up(nbytes, IO_ALIGNMENT)
        if offset % IO_ALIGNMENT or buffer.ctypes.data % IO_ALIGNMENT or buffer.nbytes < request_nbytes:
            raise ValueError(f"misaligned read of {nbytes} bytes at {offset} into {buffer.nbytes} bytes")
        target = buffer.data
        done = 0
        while done < nbytes:
            end = min(done + _MAX_READ_BYTES, request_nbytes)
            got = self._read_once(target[done:end], offset + done, nbytes)
            if got == 0 or (got % IO_ALIGNMENT and done + got < nbytes):
                raise FlashReadError(
                    "the file ends inside a range",
                    path=self.path,
                    where=offset + done + got,
                    expected=f"{nbytes} bytes from {offset}",
                    actual=f"{done + got}",
                )
            done += got
        self._file.drop_cached(offset, request_nbytes)

    def _read_once(self, target: memoryview[Any], offset: int, nbytes: int) -> int:
        try:
            got = os.preadv(self._fd, [target], offset)
        except OSError as error:
            raise FlashReadError(
                f"read of {nbytes} bytes failed: {error.strerror}", path=self.path, where=offset
            ) from error
        self._tally.add(bytes_read=got, n_requests=1)
        return got

    def read(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """Read an unaligned range into a new array; costs up to two blocks more than `nbytes` of memory."""
        head = offset % IO_ALIGNMENT
        buffer = aligned_empty(round_up(head + nbytes, IO_ALIGNMENT))
        self.read_into(buffer, offset - head, head + nbytes)
        return buffer[head : head + nbytes]

    def close(self) -> None:
        """Close the file; reads in flight on other threads must have ended."""
        if self._fd >= 0:
            self._fd = -1
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
