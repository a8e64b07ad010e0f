"""A file open for reading past the page cache, and the alignment that this needs.

The page cache counts against a memory ceiling and its contents are not ours to choose, so reads go around it
(O_DIRECT; F_NOCACHE on macOS). Where the file system refuses that, reads are buffered and dropped at once.
"""

from __future__ import annotations

import errno
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from flashfmt.errors import FlashReadError
from reference_engine.flash_io import linux_syscalls
from reference_engine.flash_io.aligned_memory import IO_ALIGNMENT

_F_NOCACHE: Final = 48  # <sys/fcntl.h> of macOS
_AT_EMPTY_PATH: Final = 0x1000
_STATX_DIOALIGN: Final = 0x2000
_STATX_WORDS: Final = 64  # struct statx is 256 bytes
_MASK_WORD, _MEMORY_WORD, _OFFSET_WORD = 0, 38, 39  # stx_mask, stx_dio_mem_align, stx_dio_offset_align


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open file descriptor. Offsets, sizes and addresses of reads must be multiples of `alignment`."""

    path: Path
    fd: int
    is_direct: bool
    alignment: int

    def drop_cached(self, offset: int, nbytes: int) -> None:
        """Forget what a buffered read left in the page cache; nothing to do after direct reads."""
        if not self.is_direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the descriptor; no read may be in flight."""
        os.close(self.fd)


def open_file(path: Path, *, range_alignment: int = IO_ALIGNMENT, direct: bool = True) -> OpenFile:
    """Open `path` for direct reads where the file system and `range_alignment` allow it, else for buffered ones.

    Parameters
    ----------
    range_alignment : what the caller's offsets, sizes and addresses will be multiples of. A device that needs a
        coarser alignment than that is read through the page cache.

    Raises
    ------
    FlashReadError
        If the file cannot be opened.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        if direct and hasattr(os, "O_DIRECT"):
            file = _open_direct(path, flags)
            if file is not None and range_alignment % file.alignment == 0:
                return file
            if file is not None:
                file.close()
        fd = os.open(path, flags)
    except OSError as error:
        raise FlashReadError(f"cannot open: {error.strerror}", path=path) from error
    if direct and sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(fd, _F_NOCACHE, 1)
    return OpenFile(path, fd, is_direct=False, alignment=1)


def _open_direct(path: Path, flags: int) -> OpenFile | None:
    try:
        fd = os.open(path, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:  # tmpfs and some overlay or FUSE file systems
            raise
        return None
    return OpenFile(path, fd, is_direct=True, alignment=direct_alignment(fd))


def direct_alignment(fd: int) -> int:
    """Bytes that offsets, sizes and addresses of direct reads on `fd` must be multiples of; 4096 where unknown.

    Asks statx (STATX_DIOALIGN, Linux 6.1), which gives one figure for memory and one for offsets: the larger.
    """
    if not linux_syscalls.IS_SUPPORTED:
        return IO_ALIGNMENT
    words = np.zeros(_STATX_WORDS, np.uint32)
    failed = linux_syscalls.statx(fd, _AT_EMPTY_PATH, _STATX_DIOALIGN, words.ctypes.data)
    if failed or not words[_MASK_WORD] & _STATX_DIOALIGN or not words[_OFFSET_WORD]:
        return IO_ALIGNMENT
    return int(np.lcm(words[_MEMORY_WORD], words[_OFFSET_WORD]))
