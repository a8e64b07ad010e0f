"""Writer of the directory form (SPEC.md section "Directory"): one file a key.

Knows: files and keys. Does not know: Zarr, arrays, when bytes are safe.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flashfmt.container import ContainerKind
from flashfmt.journal import StoredPayload
from flashfmt.output import remove, start_writeback, sync_file, write_at, write_errors

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW


class DirectoryWriter:
    """One model directory under construction at `path`."""

    kind: ContainerKind = "directory"
    needs_crc32 = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: tuple[str, int] | None = None
        self._unsynced: list[Path] = []
        self._made: set[Path] = set()

    def create(self) -> None:
        """Begin a new, empty directory."""
        with write_errors(self.path, "create"):
            self.path.mkdir()

    def resume(self, payloads: Sequence[StoredPayload], alignments: Mapping[str, int]) -> bool:
        """Continue after `payloads` of an existing directory; False where they cannot be this directory's.

        Every other file in it is removed.
        """
        kept = {self.path / payload.key: payload.nbytes for payload in payloads}
        if self.path.is_symlink() or not self.path.is_dir():
            return False
        found = {file: file.lstat().st_size for file in self.path.rglob("*") if not file.is_dir()}
        if any(found.get(file) != nbytes for file, nbytes in kept.items()):
            return False
        for file in found.keys() - kept.keys():
            remove(file)
        return True

    def place(self, key: str, nbytes: int, alignment: int) -> int:
        """Announce the next payload; its offset in its file, which is 0."""
        return 0

    def descriptor(self, key: str) -> tuple[int, Path]:
        """Where the bytes of a placed payload are written: descriptor and path."""
        path = self.path / key
        if self._open is None or self._open[0] != key:
            self.close()
            self._open = key, self._create(path)
        return self._open[1], path

    def seal(self, payload: StoredPayload) -> None:
        """Complete a file all of whose bytes have been written."""
        fd, path = self.descriptor(payload.key)
        start_writeback(fd, 0, 0)
        self._unsynced.append(path)
        self.close()

    def syncer(self) -> Callable[[], None]:
        """A function that waits until every file sealed so far is stored; another thread may call it."""
        files, self._unsynced = self._unsynced, []
        directories, self._made = sorted(self._made, reverse=True), set()
        paths = (*files, *directories, self.path)

        def sync() -> None:
            for path in paths:
                sync_file(path)

        return sync

    def finish(self, documents: Mapping[str, bytes]) -> None:
        """Write the documents, and wait until all of it is stored."""
        for key, raw in documents.items():
            path = self.path / key
            fd = self._create(path)
            try:
                write_at(fd, raw, 0, path)
                start_writeback(fd, 0, 0)
            finally:
                os.close(fd)
            self._unsynced.append(path)
        self.syncer()()

    def close(self) -> None:
        """Close the file that is being written; it stays."""
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def _create(self, path: Path) -> int:
        with write_errors(path, "create"):
            for directory in (path.parent, *path.parent.parents):
                if directory == self.path or directory in self._made:
                    break
                self._made.add(directory)
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, _NEW_FILE, 0o666)
