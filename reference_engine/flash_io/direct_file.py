"""One file read past the page cache, range by range.

The page cache counts against a memory ceiling and its contents are not ours to choose, so reads go around it
(O_DIRECT; F_NOCACHE on macOS). Where the file system refuses that, ranges are read buffered and dropped at once.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from flashfmt.errors import FlashReadError
from flashfmt.layout import round_up
from reference_engine.flash_io.aligned_memory import IO_ALIGNMENT, aligned_empty

_F_NOCACHE: Final = 48  # <sys/fcntl.h> of macOS
_MAX_READ_BYTES: Final = 2 << 20  # larger requests read more slowly and overlap less


@dataclass(frozen=True, slots=True)
class IoCounters:
    """What flash reading has cost so far: bytes delivered, requests made, seconds that compute stood waiting."""

    bytes_read: int = 0
    n_requests: int = 0
    wait_seconds: float = 0.0

    def __sub__(self, earlier: IoCounters) -> IoCounters:
        return IoCounters(
            self.bytes_read - earlier.bytes_read,
            self.n_requests - earlier.n_requests,
            self.wait_seconds - earlier.wait_seconds,
        )


class DirectFile:
    """A file open for direct reads. `read_into` may be called from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_direct = False
        self._lock = threading.Lock()
        self._bytes_read = 0
        self._n_requests = 0
        try:
            self._fd = self._open()
        except OSError as error:
            raise FlashReadError(f"cannot open: {error.strerror}", path=path) from error

    def _open(self) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC
        if hasattr(os, "O_DIRECT"):
            try:
                fd = os.open(self.path, flags | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:  # tmpfs and some overlay or FUSE file systems
                    raise
            else:
                self.is_direct = True
                return fd
        fd = os.open(self.path, flags)
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(fd, _F_NOCACHE, 1)
        return fd

    @property
    def counters(self) -> IoCounters:
        """Bytes and requests so far; `wait_seconds` is 0, waiting is known to the caller only."""
        return IoCounters(self._bytes_read, self._n_requests)

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
        if not self.is_direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, request_nbytes, os.POSIX_FADV_DONTNEED)

    def _read_once(self, target: memoryview[Any], offset: int, nbytes: int) -> int:
        try:
            got = os.preadv(self._fd, [target], offset)
        except OSError as error:
            raise FlashReadError(
                f"read of {nbytes} bytes failed: {error.strerror}", path=self.path, where=offset
            ) from error
        with self._lock:
            self._bytes_read += got
            self._n_requests += 1
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
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
