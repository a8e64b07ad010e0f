"""The journal beside a half-written model: which payloads are safely stored, so that writing can continue.

A text file. Each line is eight hex digits (CRC-32C of the rest), a space, and a JSON value: first the header, then
one line a *unit* of payloads that belong together. A line is added only after the bytes it speaks of are stored, and
a damaged line ends the journal. Its lock keeps a second writer away from the same target.

Knows: lines, the lock. Does not know: containers, payload bytes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import google_crc32c
import numpy as np

from flashfmt.container import pread_into
from flashfmt.errors import FlashWriteError
from flashfmt.output import remove, sync_data, sync_file, write_at, write_errors

JOURNAL_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class StoredPayload:
    """A payload that is complete: `offset` in its file, and both checksums of its bytes."""

    key: str
    offset: int
    nbytes: int
    crc32: int
    crc32c: int


Unit = tuple[StoredPayload, ...]


@dataclass(frozen=True, slots=True)
class JournalHeader:
    """What must be the same for writing to continue: the caller's `fingerprint` and all that was declared."""

    fingerprint: str
    declaration: str
    container: str
    version: int = JOURNAL_VERSION


class Journal:
    """An open, locked journal.

    Attributes
    ----------
    header : as found in the file, None where it has none.
    units : as found, in order.

    Raises
    ------
    FlashWriteError
        If another writer holds it, or the system refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = _open_locked(path)
        try:
            self.header: JournalHeader | None = None
            self.units: list[Unit] = []
            self._nbytes = self._read()
        except BaseException:
            self.close()
            raise

    def begin(self, header: JournalHeader) -> None:
        """Start afresh with `header`; stored when this returns."""
        with write_errors(self.path, "write"):
            os.ftruncate(self._fd, 0)
        self.header, self.units, self._nbytes = header, [], 0
        self._append([_line(asdict(header))])
        sync_file(self.path.parent)

    def add(self, units: Sequence[Unit]) -> None:
        """Append units, whose bytes must be stored already; stored when this returns."""
        self._append([_line([_values(payload) for payload in unit]) for unit in units])
        self.units.extend(units)

    def remove(self) -> None:
        """Delete the file and release the lock."""
        remove(self.path)
        self.close()

    def close(self) -> None:
        """Release the lock; the file stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, lines: Iterable[bytes]) -> None:
        raw = b"".join(lines)
        write_at(self._fd, raw, self._nbytes, self.path)
        sync_data(self._fd, self.path)
        self._nbytes += len(raw)

    def _read(self) -> int:
        """Parse what the file holds up to the first damaged line, cut off the rest, and return the size kept."""
        raw = _content(self._fd, self.path)
        kept = 0
        for line in raw.splitlines(keepends=True):
            value = _parse(line)
            if value is None or not self._accept(value):
                break
            kept += len(line)
        if kept < len(raw):
            with write_errors(self.path, "write"):
                os.ftruncate(self._fd, kept)
        return kept

    def _accept(self, value: Any) -> bool:
        try:
            if self.header is None:
                self.header = JournalHeader(**value)
                return self.header.version == JOURNAL_VERSION
            self.units.append(tuple(StoredPayload(*payload) for payload in value))
        except TypeError:
            return False
        return True


def _open_locked(path: Path) -> int:
    """Descriptor of the journal, created where there is none, with an exclusive lock on it."""
    while True:
        with write_errors(path, "open"):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            with write_errors(path, "lock"):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have removed the file between our open and our lock.
            if os.path.lexists(path) and os.path.samestat(os.fstat(fd), os.lstat(path)):
                return fd
        except FlashWriteError as error:
            os.close(fd)
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise FlashWriteError("another process is writing this model", path=path) from None
            raise
        os.close(fd)


def _content(fd: int, path: Path) -> bytes:
    buffer = np.empty(os.fstat(fd).st_size, np.uint8)
    pread_into(fd, 0, buffer, path)
    return buffer.tobytes()


def _values(payload: StoredPayload) -> list[str | int]:
    return [payload.key, payload.offset, payload.nbytes, payload.crc32, payload.crc32c]


def _line(value: Any) -> bytes:
    text = json.dumps(value, separators=(",", ":")).encode("ascii")
    return b"%08x %s\n" % (google_crc32c.value(text), text)


def _parse(line: bytes) -> Any:
    """Value of a line, None where it is damaged or cut short."""
    if not line.endswith(b"\n") or line[:9] != b"%08x " % google_crc32c.value(line[9:-1]):
        return None
    return json.loads(line[9:-1])
