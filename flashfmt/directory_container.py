"""Reader of the directory form: one file a key (SPEC.md section "Directory").

Knows: files and keys. Does not know: Zarr, JSON, arrays.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from flashfmt.container import (
    DOCUMENT_NAME,
    KEY_PATTERN,
    Bytes,
    ContainerKind,
    Extent,
    document_order,
    is_document,
    looks_like_directory,
    open_read_only,
    pread_into,
)
from flashfmt.errors import FlashError, FlashFormatError, FlashReadError
from flashfmt.layout import MAX_ENTRIES, MAX_NAME_BYTES


class DirectoryContainer:
    """A model directory. Sizes are those found when it was opened; a file that changes later raises FlashReadError."""

    kind: ContainerKind = "directory"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checksums: Mapping[str, int] = MappingProxyType({})
        self._mappings: dict[str, Bytes] = {}
        self._lock = threading.Lock()
        self._closed = False
        if not os.path.lexists(path / DOCUMENT_NAME):
            kind = looks_like_directory(self._names(path))
            raise FlashFormatError(f"not a flash model: this looks like {kind}", path=path, rule="FF-DIR-1")
        sizes = self._scan()
        if DOCUMENT_NAME not in sizes:
            raise FlashFormatError("zarr.json is not a file", path=path, rule="FF-DIR-1")
        self.nbytes = sum(sizes.values())
        keys = sorted((key for key in sizes if is_document(key)), key=document_order)
        keys += sorted(key for key in sizes if not is_document(key))
        self.extents: Mapping[str, Extent] = MappingProxyType({key: Extent(path / key, 0, sizes[key]) for key in keys})

    def read_into(self, key: str, start: int, buffer: Bytes) -> None:
        """Fill the contiguous `buffer` (uint8) with the bytes of `key` from `start`, by pread."""
        extent = self.extents[key]
        if not 0 <= start <= start + buffer.nbytes <= extent.nbytes:
            raise ValueError(f"[{start}, {start + buffer.nbytes}) is outside {key} of {extent.nbytes} bytes")
        fd = self._open(extent)
        try:
            pread_into(fd, start, buffer, extent.path)
        finally:
            os.close(fd)

    def view(self, key: str) -> Bytes:
        """All bytes of `key` as a read-only uint8 array over the mapped file; stays valid after `close`."""
        with self._lock:
            if key not in self._mappings:
                self._mappings[key] = self._map(self.extents[key])
            return self._mappings[key]

    def close(self) -> None:
        """Forget the mappings; each goes with its last view."""
        with self._lock:
            self._closed = True
            self._mappings.clear()

    def _open(self, extent: Extent) -> int:
        if self._closed:
            raise FlashError("the model is closed", path=self.path)
        fd = open_read_only(extent.path, os.O_NOFOLLOW)
        if os.fstat(fd).st_size != extent.nbytes:
            os.close(fd)
            raise FlashReadError("the file has changed since it was opened", path=extent.path)
        return fd

    def _map(self, extent: Extent) -> Bytes:
        fd = self._open(extent)
        try:
            if extent.nbytes == 0:
                return np.empty(0, np.uint8)
            return np.frombuffer(mmap.mmap(fd, extent.nbytes, access=mmap.ACCESS_READ), np.uint8)
        except (OSError, ValueError) as error:
            raise FlashReadError(f"cannot map the file: {error}", path=extent.path) from error
        finally:
            os.close(fd)

    def _names(self, directory: Path) -> list[str]:
        try:
            return os.listdir(directory)
        except OSError as error:
            raise FlashReadError(f"cannot list: {error.strerror}", path=directory) from error

    def _scan(self) -> dict[str, int]:
        """Size of every file, by key."""
        sizes: dict[str, int] = {}
        pending = [""]
        n_entries = 0
        while pending:
            prefix = pending.pop()
            names = self._names(self.path / prefix)
            n_entries += len(names)
            if n_entries > MAX_ENTRIES:
                raise FlashFormatError("too many entries", path=self.path, rule="FF-LIM-1")
            if not names:
                self._refuse(prefix, "an empty directory")
            for name in names:
                key = f"{prefix}/{name}" if prefix else name
                if len(key) > MAX_NAME_BYTES or not KEY_PATTERN.fullmatch(key):
                    self._refuse(key, "not a key of a flash model")
                size = self._size_or_directory(key)
                if size is None:
                    pending.append(key)
                else:
                    sizes[key] = size
        return sizes

    def _size_or_directory(self, key: str) -> int | None:
        """Size of a regular file, None for a directory."""
        path = self.path / key
        try:
            status = os.lstat(path)
        except OSError as error:
            raise FlashReadError(f"cannot read: {error.strerror}", path=path) from error
        kind = status.st_mode & 0o170000
        if kind == 0o040000:
            return None
        if kind != 0o100000:
            what = "a symbolic link" if kind == 0o120000 else "neither a file nor a directory"
            raise FlashFormatError(f"{what} in a model directory", path=self.path, rule="FF-DIR-2", where=key)
        return status.st_size

    def _refuse(self, key: str, message: str) -> None:
        raise FlashFormatError(message, path=self.path, rule="FF-DIR-3", where=ascii(key)[1:-1])
