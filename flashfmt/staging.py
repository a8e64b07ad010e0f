"""A model under construction beside its target, until it takes the target's name in one step.

``<name>.partial`` holds the bytes, ``<name>.partial.journal`` says which of them are safe. Whatever happens before
the rename, the target is what it was before; an interrupted construction is continued by the next one that declares
the same.

Knows: the partial container, the journal, the rename. Does not know: what payloads mean.
"""

from __future__ import annotations

import hashlib
import os
import stat
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

import google_crc32c

from flashfmt.container import Bytes, ContainerKind
from flashfmt.directory_container import DirectoryContainer
from flashfmt.directory_writer import DirectoryWriter
from flashfmt.errors import FlashError, FlashFormatError, FlashWriteError
from flashfmt.journal import Journal, JournalHeader, StoredPayload, Unit
from flashfmt.output import remove, start_writeback, sync_file, write_at, write_errors
from flashfmt.zip_writer import ZipWriter

SYNC_NBYTES: Final = 256 << 20
BLOCK_NBYTES: Final = 8 << 20
FILE_SUFFIX: Final = ".flash"
_N_THREADS: Final = 2  # one writes while one waits for what was written before


class ContainerWriter(Protocol):
    """What the two containers under construction offer; see `ZipWriter`."""

    @property
    def kind(self) -> ContainerKind: ...
    @property
    def needs_crc32(self) -> bool: ...
    def create(self) -> None: ...
    def resume(self, payloads: list[StoredPayload], alignments: Mapping[str, int]) -> bool: ...
    def place(self, key: str, nbytes: int, alignment: int) -> int: ...
    def descriptor(self, key: str) -> tuple[int, Path]: ...
    def seal(self, payload: StoredPayload) -> None: ...
    def syncer(self) -> Callable[[], None]: ...
    def finish(self, documents: Mapping[str, bytes]) -> None: ...
    def close(self) -> None: ...


class Payload:
    """One payload that is being written, from its first byte to its last."""

    def __init__(self, container: ContainerWriter, key: str, offset: int, executor: ThreadPoolExecutor) -> None:
        self._container = container
        self._executor = executor
        self._key = key
        self._offset = offset
        self._nbytes = 0
        self._crc32 = 0
        self._crc32c = 0

    def append(self, block: Bytes) -> None:
        """Write a contiguous block, and sum it meanwhile."""
        fd, path = self._container.descriptor(self._key)
        start = self._offset + self._nbytes
        written = self._executor.submit(write_at, fd, block, start, path)
        if self._container.needs_crc32:
            self._crc32 = zlib.crc32(block.data, self._crc32)
        self._crc32c = google_crc32c.extend(self._crc32c, block)
        written.result()
        start_writeback(fd, start, block.nbytes)
        self._nbytes += block.nbytes

    def seal(self) -> StoredPayload:
        """Complete it."""
        stored = StoredPayload(self._key, self._offset, self._nbytes, self._crc32, self._crc32c)
        self._container.seal(stored)
        return stored


class Staging:
    """A target under construction.

    Parameters
    ----------
    target : the final path.
    kind : file or directory.
    documents : size in bytes of every document by key, in the order of the file.
    alignments : alignment of every payload by key.
    declaration : digest of all that determines the result but the values.
    fingerprint : the caller's mark of where the values come from.
    overwrite : whether an existing target is replaced.

    Attributes
    ----------
    done : payloads that are written, those of an earlier run included.
    resumed : keys of those of an earlier run.
    """

    def __init__(
        self,
        target: Path,
        kind: ContainerKind,
        *,
        documents: Mapping[str, int],
        alignments: Mapping[str, int],
        declaration: str,
        fingerprint: str,
        overwrite: bool,
    ) -> None:
        if target.name in ("", ".."):
            raise FlashWriteError("not a name that a model can take", path=target)
        self.target = target
        self.partial = target.with_name(target.name + ".partial")
        self.done: dict[str, StoredPayload] = {}
        self.resumed: frozenset[str] = frozenset()
        self._journal_path = target.with_name(target.name + ".partial.journal")
        self._documents = documents
        self._alignments = alignments
        digest = hashlib.sha256(f"{declaration}{sorted(alignments.items())}".encode()).hexdigest()
        self._header = JournalHeader(fingerprint, digest, kind)
        self._overwrite = overwrite
        self._journal: Journal | None = None
        self._container: ContainerWriter | None = None
        self._pending: list[Unit] = []
        self._pending_nbytes = 0
        self._syncing: Future[None] | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._sync_failed = False

    @property
    def container(self) -> ContainerWriter:
        """The container under construction, once `open` has been called."""
        if self._container is None:
            raise FlashError("the writer is not open", path=self.target)
        return self._container

    def open(self, nbytes: int) -> None:
        """Lock the target, and continue or begin.

        Parameters
        ----------
        nbytes : of all payloads, at the least.

        Raises
        ------
        FlashWriteError
            If the target exists and may not be replaced, another process writes it, or the disk is too small.
        """
        self.refuse_existing()
        if not self.target.parent.is_dir():
            raise FlashWriteError("no such directory", path=self.target.parent)
        self._journal = Journal(self._journal_path)
        try:
            if not self._resume(self._journal):
                self._begin(self._journal)
            self._refuse_small_disk(nbytes - sum(payload.nbytes for payload in self.done.values()))
        except BaseException:
            self._release()
            raise
        self._executor = ThreadPoolExecutor(_N_THREADS, "flashfmt-output")

    def refuse_existing(self) -> None:
        """Raise FlashWriteError if the target exists and may not be replaced."""
        try:
            mode = os.lstat(self.target).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return
        except (OSError, ValueError) as error:
            raise FlashWriteError(f"cannot be written: {error}", path=self.target) from error
        if not self._overwrite:
            raise FlashWriteError("exists already, and overwriting was not asked for", path=self.target)
        if stat.S_ISREG(mode) or stat.S_ISLNK(mode):
            return
        if not stat.S_ISDIR(mode) or not _is_replaceable_directory(self.target):
            raise FlashWriteError("exists, and is not a flash model: not overwritten", path=self.target)

    def begin_payload(self, key: str, nbytes: int) -> Payload:
        """Reserve room for the next payload. Payloads are appended to in the order in which they are begun."""
        offset = self.container.place(key, nbytes, self._alignments[key])
        return Payload(self.container, key, offset, self._threads())

    def commit(self, unit: Unit) -> None:
        """Take note of sealed payloads that belong together; from time to time, make what is written safe."""
        self.done.update((payload.key, payload) for payload in unit)
        self._pending.append(unit)
        self._pending_nbytes += sum(payload.nbytes for payload in unit)
        if self._pending_nbytes >= SYNC_NBYTES and (self._syncing is None or self._syncing.done()):
            self._start_sync()

    def publish(self, documents: Mapping[str, bytes], check: Callable[[Path], None]) -> None:
        """Complete the container, let `check` open it, and give it the target's name.

        Raises
        ------
        FlashWriteError
            If anything cannot be stored: the target is what it was, and the partial is kept. Only if the directory
            alone cannot be, the target is the whole new model, and a power failure may undo that.
        """
        self._flush()
        self.container.finish(documents)
        self.container.close()
        check(self.partial)
        self.refuse_existing()
        _replace(self.partial, self.target)
        if self._journal is not None:
            self._journal.remove()
        self._release()
        sync_file(self.target.parent)

    def suspend(self) -> None:
        """Make what is complete safe, as far as the system allows, and release everything; raises nothing."""
        if self._journal is not None and not self._sync_failed:
            with suppress(FlashWriteError):
                self._flush()
        self._release()

    def discard(self) -> None:
        """Remove the partial and its journal.

        Raises
        ------
        FlashWriteError
            If another process is writing this target, or the system refuses.
        """
        self._release()
        if not os.path.lexists(self._journal_path):
            return
        journal = Journal(self._journal_path)
        try:
            self._remove_partial(journal)
            journal.remove()
        finally:
            journal.close()

    def _resume(self, journal: Journal) -> bool:
        if journal.header != self._header:
            return False
        payloads = [payload for unit in journal.units for payload in unit]
        if not {payload.key for payload in payloads} <= self._alignments.keys():
            return False
        container = self._new_container()
        if not container.resume(payloads, self._alignments):
            return False
        self._container = container
        self.done = {payload.key: payload for payload in payloads}
        self.resumed = frozenset(self.done)
        return True

    def _begin(self, journal: Journal) -> None:
        self._remove_partial(journal)
        journal.begin(self._header)
        self._container = self._new_container()
        self._container.create()

    def _new_container(self) -> ContainerWriter:
        if self._header.container == "file":
            return ZipWriter(self.partial, self._documents)
        return DirectoryWriter(self.partial)

    def _remove_partial(self, journal: Journal) -> None:
        """Remove a partial that the journal speaks of; any other is not ours to remove."""
        if journal.header is None and os.path.lexists(self.partial):
            journal.remove()
            raise FlashWriteError("in the way, and not left by an interrupted writer: remove it", path=self.partial)
        remove(self.partial)

    def _refuse_small_disk(self, nbytes: int) -> None:
        with write_errors(self.target.parent, "ask for free space"):
            status = os.statvfs(self.target.parent)
        free = status.f_bavail * status.f_frsize
        if nbytes > free:
            raise FlashWriteError(
                "not enough free space", path=self.target, expected=f"at least {nbytes} bytes", actual=free
            )

    def _start_sync(self) -> None:
        self._await_sync()
        units, self._pending, self._pending_nbytes = self._pending, [], 0
        self._syncing = self._threads().submit(self._make_safe, self.container.syncer(), units)

    def _threads(self) -> ThreadPoolExecutor:
        if self._executor is None:
            raise FlashError("the writer is not open", path=self.target)
        return self._executor

    def _make_safe(self, sync: Callable[[], None], units: list[Unit]) -> None:
        """Wait until bytes are stored, then say so in the journal."""
        sync()
        if self._journal is not None:
            self._journal.add(units)

    def _await_sync(self) -> None:
        syncing, self._syncing = self._syncing, None
        if syncing is not None:
            try:
                syncing.result()
            except FlashWriteError:
                # The system may have dropped the pages: a later sync that succeeds says nothing about them.
                self._sync_failed = True
                raise

    def _flush(self) -> None:
        self._await_sync()
        if self._pending:
            self._start_sync()
            self._await_sync()

    def _release(self) -> None:
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None
        if self._container is not None:
            self._container.close()
        if self._journal is not None:
            self._journal.close()
            self._journal = None


def container_kind(target: Path, kind: ContainerKind | None) -> ContainerKind:
    """The container asked for, or the one that the target's name implies."""
    if kind is not None:
        return kind
    return "file" if target.suffix == FILE_SUFFIX else "directory"


def _is_replaceable_directory(path: Path) -> bool:
    """Whether a directory is empty or has nothing in it but a model's keys."""
    try:
        if not any(path.iterdir()):
            return True
        DirectoryContainer(path).close()
    except (OSError, FlashFormatError, FlashError):
        return False
    return True


def _replace(partial: Path, target: Path) -> None:
    """Give the partial the target's name: in one step, unless a directory is replaced, which needs two."""
    with write_errors(target, "replace"):
        if not os.path.lexists(target) or not (target.is_dir() or partial.is_dir()):
            os.replace(partial, target)
            return
        aside = target.with_name(target.name + ".replaced")
        remove(aside)
        os.rename(target, aside)
        try:
            os.rename(partial, target)
        except OSError:
            os.rename(aside, target)
            raise
    remove(aside)
