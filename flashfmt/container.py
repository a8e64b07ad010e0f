"""What a container of keys offers, and the checked reads that both containers share (SPEC.md section "Containers").

Knows: keys, byte ranges, the operating system. Does not know: what the bytes mean.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from flashfmt.errors import FlashReadError

Bytes = npt.NDArray[np.uint8]
ContainerKind = Literal["file", "directory"]

DOCUMENT_NAME: Final = "zarr.json"
KEY_PATTERN: Final = re.compile(r"[a-z0-9_][a-z0-9_.-]*(?:/[a-z0-9_][a-z0-9_.-]*)*")


@dataclass(frozen=True, slots=True)
class Extent:
    """Where stored bytes lie: `nbytes` bytes of the file `path` from byte `offset`."""

    path: Path
    offset: int
    nbytes: int


class Container(Protocol):
    """Read-only mapping from keys to byte ranges. All methods may be called from several threads at once."""

    @property
    def path(self) -> Path:
        """The file or directory."""

    @property
    def kind(self) -> ContainerKind:
        """`file` for a `.flash` file, `directory` for a directory."""

    @property
    def nbytes(self) -> int:
        """Size of the file, or of all files of the directory."""

    @property
    def extents(self) -> Mapping[str, Extent]:
        """Every key: documents first, by depth and then by key."""

    @property
    def checksums(self) -> Mapping[str, int]:
        """CRC-32 (zlib's) of each key's bytes, where the container states it; else empty."""

    def read_into(self, key: str, start: int, buffer: Bytes) -> None:
        """Fill the contiguous `buffer` (uint8) with the bytes of `key` from `start`, by pread.

        Raises
        ------
        FlashReadError
            If the operating system delivers fewer bytes.
        """

    def view(self, key: str) -> Bytes:
        """All bytes of `key` as a read-only uint8 array over mapped memory; stays valid after `close`."""

    def close(self) -> None:
        """Release the container's own handles. Views stay valid."""


def is_document(key: str) -> bool:
    """Whether a key names a Zarr document."""
    return key == DOCUMENT_NAME or key.endswith("/" + DOCUMENT_NAME)


def document_order(key: str) -> tuple[int, str]:
    """Sort key of documents in a container: by depth, then by key."""
    return key.count("/"), key


def read_bytes(container: Container, key: str, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes ``[start, stop)`` of a key, by pread; the whole key by default.

    Raises
    ------
    FlashReadError
        If the operating system delivers fewer bytes.
    """
    stop = container.extents[key].nbytes if stop is None else stop
    buffer = np.empty(stop - start, np.uint8)
    container.read_into(key, start, buffer)
    return buffer.tobytes()


def pread_into(fd: int, offset: int, buffer: Bytes, path: Path) -> None:
    """Fill `buffer` from byte `offset` of an open file; a short read raises FlashReadError."""
    done = 0
    while done < buffer.nbytes:
        try:
            count = os.preadv(fd, [buffer.data[done:]], offset + done)
        except OSError as error:
            raise FlashReadError(f"cannot read: {error.strerror}", path=path, where=offset + done) from error
        if count == 0:
            raise FlashReadError(
                "the file ends early", path=path, where=offset, expected=f"{buffer.nbytes} bytes", actual=done
            )
        done += count


def open_read_only(path: Path, flags: int = 0) -> int:
    """File descriptor of an existing file; OSError becomes FlashReadError."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    except OSError as error:
        raise FlashReadError(f"cannot open: {error.strerror}", path=path) from error


def looks_like_file(head: bytes) -> str:
    """What a file that is not a `.flash` file seems to be, judging by its first bytes, for an error message."""
    if not head:
        return "an empty file"
    if head.startswith(b"GGUF"):
        return "a GGUF file; `flashfmt convert` makes a flash model from it"
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "a safetensors file; `flashfmt convert` takes the directory of the checkpoint"
    if head.startswith(b"PK"):
        return "a ZIP archive, but not a flash model"
    if head.startswith((b"\x80", b"\x93NUMPY")):
        return "a Python pickle or NumPy file"
    if not head.strip(b"\0"):
        return "a file of zeros"
    if all(byte >= 0x20 or byte in b"\t\n\r\f" for byte in head):
        return "a text file"
    return "an unknown kind of file"


def looks_like_directory(names: Iterable[Any]) -> str:
    """What a directory without zarr.json seems to be, judging by the names in it, for an error message."""
    found = {str(name) for name in names}
    if not found:
        return "an empty directory"
    if any(name.endswith((".safetensors", ".gguf")) for name in found):
        return "a checkpoint; `flashfmt convert` makes a flash model from it"
    if any(name.endswith(".flash") for name in found):
        return "a directory of .flash files; name one of them"
    if found & {".zarray", ".zgroup", ".zattrs", ".zmetadata"}:
        return "a Zarr hierarchy of version 2"
    return "a directory without zarr.json"
