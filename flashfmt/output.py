"""The system calls that store bytes, with their errors turned into FlashWriteError.

Everything the package writes goes through here, so that a test can make any call fail.

Knows: descriptors and paths. Does not know: what the bytes mean.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import numpy as np

from flashfmt.container import Bytes
from flashfmt.errors import FlashWriteError

_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_HINT: Final = "; make room and run the same command again: it continues where it stopped"

pwrite = os.pwrite
fsync = os.fsync
# macOS has no fdatasync.
fdatasync: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)


@contextmanager
def write_errors(path: Path, action: str) -> Iterator[None]:
    """Turn an OSError of the block into a FlashWriteError "cannot {action}: reason"."""
    try:
        yield
    except OSError as error:
        hint = _HINT if error.errno in _NO_SPACE else ""
        reason = error.strerror or str(error)
        raise FlashWriteError(f"cannot {action}: {reason}{hint}", path=path) from error


def write_at(fd: int, buffer: bytes | Bytes, offset: int, path: Path) -> None:
    """Write all of a contiguous buffer at byte `offset`.

    Raises
    ------
    FlashWriteError
    """
    view = np.frombuffer(buffer, np.uint8)
    with write_errors(path, "write"):
        while view.nbytes:
            count = pwrite(fd, view.data, offset)
            if count == 0:
                raise OSError(errno.EIO, "nothing was written")
            view = view[count:]
            offset += count


def start_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Ask the system to begin storing a range, without waiting; pages that are stored already may be dropped.

    Keeps the final sync short, and the page cache free for the source. A hint: failure means nothing.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


def sync_data(fd: int, path: Path) -> None:
    """Wait until the data of an open file is stored."""
    with write_errors(path, "store"):
        fdatasync(fd)


def sync_file(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are stored."""
    with write_errors(path, "store"):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fsync(fd)
        finally:
            os.close(fd)


def remove(path: Path) -> None:
    """Remove a file, or a directory with all that is in it; nothing where there is none."""
    with write_errors(path, "remove"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
