"""Writer of the `.flash` file (SPEC.md section "Single file"): aligned, STORED entries in a ZIP64 archive.

The sizes of all documents are given up front, so the region they fill at the front of the file is left free and
payloads follow it at once. An entry's local header is written after its payload, when the CRC-32 is known: nothing
is written twice. Times and attributes are fixed: equal content gives equal bytes.

Knows: ZIP records, alignment. Does not know: Zarr, arrays, when bytes are safe.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from flashfmt.container import ContainerKind
from flashfmt.journal import StoredPayload
from flashfmt.layout import PAYLOAD_ALIGNMENT, round_up
from flashfmt.output import sync_data, write_at, write_errors
from flashfmt.zip_container import (
    ALIGNMENT_FIELD,
    ALIGNMENT_RECORD,
    ALL_ONES_16,
    ALL_ONES_32,
    CENTRAL_RECORD,
    CENTRAL_SIGNATURE,
    CENTRAL_ZIP64_RECORD,
    DOS_DATE,
    END64_RECORD,
    END64_SIGNATURE,
    END_RECORD,
    END_SIGNATURE,
    FILE_ATTRIBUTES,
    LOCAL_RECORD,
    LOCAL_SIGNATURE,
    LOCAL_ZIP64_RECORD,
    LOCATOR_RECORD,
    LOCATOR_SIGNATURE,
    MADE_BY,
    UTF8_FLAG,
    VERSION_NEEDED,
    ZIP64_FIELD,
)

_FIELD_HEADER_NBYTES: Final = 4


class ZipWriter:
    """One `.flash` file under construction at `path`.

    Parameters
    ----------
    documents : size in bytes of every document by key, in the order of the file.
    """

    kind: ContainerKind = "file"
    needs_crc32 = True

    def __init__(self, path: Path, documents: Mapping[str, int]) -> None:
        self.path = path
        self._fd = -1
        self._position = 0
        self._entries: dict[str, _Entry] = {}
        for key, nbytes in documents.items():
            self._reserve(key, nbytes, PAYLOAD_ALIGNMENT)
        self._n_documents = len(documents)

    def create(self) -> None:
        """Begin a new, empty file."""
        with write_errors(self.path, "create"):
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)

    def resume(self, payloads: Sequence[StoredPayload], alignments: Mapping[str, int]) -> bool:
        """Continue after `payloads` of an existing file; False where they cannot be this file's.

        Everything behind them is cut off.
        """
        entries, position = dict(self._entries), self._position
        for payload in payloads:
            if self.place(payload.key, payload.nbytes, alignments[payload.key]) != payload.offset:
                self._entries, self._position = entries, position
                return False
            self._entries[payload.key].crc32 = payload.crc32
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            fd = -1
        if fd < 0 or os.fstat(fd).st_size < self._position:
            if fd >= 0:
                os.close(fd)
            self._entries, self._position = entries, position
            return False
        self._fd = fd
        with write_errors(self.path, "write"):
            os.ftruncate(fd, self._position)
        return True

    def place(self, key: str, nbytes: int, alignment: int) -> int:
        """Reserve room for the next payload; its offset in the file."""
        return self._reserve(key, nbytes, alignment)

    def descriptor(self, key: str) -> tuple[int, Path]:
        """Where the bytes of a placed payload are written: descriptor and path."""
        return self._fd, self.path

    def seal(self, payload: StoredPayload) -> None:
        """Complete an entry all of whose bytes have been written."""
        entry = self._entries[payload.key]
        entry.crc32 = payload.crc32
        write_at(self._fd, entry.local_header(), entry.header_offset, self.path)

    def syncer(self) -> Callable[[], None]:
        """A function that waits until everything written so far is stored; another thread may call it."""
        return partial(sync_data, self._fd, self.path)

    def finish(self, documents: Mapping[str, bytes]) -> None:
        """Write the documents, the central directory and the end records, and wait until all of it is stored."""
        for key, raw in documents.items():
            entry = self._entries[key]
            entry.crc32 = zlib.crc32(raw)
            write_at(self._fd, entry.local_header() + raw, entry.header_offset, self.path)
        directory = b"".join(entry.central_header() for entry in self._entries.values())
        tail = directory + _end_records(len(self._entries), len(directory), self._position)
        write_at(self._fd, tail, self._position, self.path)
        with write_errors(self.path, "write"):
            os.ftruncate(self._fd, self._position + len(tail))
        sync_data(self._fd, self.path)

    def close(self) -> None:
        """Close the file; it stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _reserve(self, key: str, nbytes: int, alignment: int) -> int:
        entry = _Entry(key, self._position, nbytes, alignment)
        self._entries[key] = entry
        self._position = entry.offset + nbytes
        return entry.offset


class _Entry:
    """Name, place and checksum of one entry."""

    def __init__(self, key: str, header_offset: int, nbytes: int, alignment: int) -> None:
        self.name = key.encode("ascii")
        self.header_offset = header_offset
        self.nbytes = nbytes
        self.alignment = alignment
        self.crc32 = 0
        unpadded = header_offset + LOCAL_RECORD.size + len(self.name) + LOCAL_ZIP64_RECORD.size + ALIGNMENT_RECORD.size
        self.offset = round_up(unpadded, alignment)
        self._n_padding = self.offset - unpadded

    def local_header(self) -> bytes:
        """Local header, name and extra fields: all bytes from `header_offset` to `offset`."""
        n_extra = LOCAL_ZIP64_RECORD.size + ALIGNMENT_RECORD.size + self._n_padding
        fixed = LOCAL_RECORD.pack(
            LOCAL_SIGNATURE, VERSION_NEEDED, UTF8_FLAG, 0, 0, DOS_DATE, self.crc32,
            ALL_ONES_32, ALL_ONES_32, len(self.name), n_extra,
        )  # fmt: skip
        zip64 = LOCAL_ZIP64_RECORD.pack(
            ZIP64_FIELD, LOCAL_ZIP64_RECORD.size - _FIELD_HEADER_NBYTES, self.nbytes, self.nbytes
        )
        alignment = ALIGNMENT_RECORD.pack(
            ALIGNMENT_FIELD, ALIGNMENT_RECORD.size - _FIELD_HEADER_NBYTES + self._n_padding, self.alignment
        )
        return fixed + self.name + zip64 + alignment + bytes(self._n_padding)

    def central_header(self) -> bytes:
        """Record in the central directory."""
        fixed = CENTRAL_RECORD.pack(
            CENTRAL_SIGNATURE, MADE_BY, VERSION_NEEDED, UTF8_FLAG, 0, 0, DOS_DATE, self.crc32,
            ALL_ONES_32, ALL_ONES_32, len(self.name), CENTRAL_ZIP64_RECORD.size, 0, 0, 0, FILE_ATTRIBUTES, ALL_ONES_32,
        )  # fmt: skip
        zip64 = CENTRAL_ZIP64_RECORD.pack(
            ZIP64_FIELD, CENTRAL_ZIP64_RECORD.size - _FIELD_HEADER_NBYTES, self.nbytes, self.nbytes, self.header_offset
        )
        return fixed + self.name + zip64


def _end_records(n_entries: int, directory_nbytes: int, directory_offset: int) -> bytes:
    """ZIP64 end record, its locator and the end record."""
    end64 = END64_RECORD.pack(
        END64_SIGNATURE, END64_RECORD.size - 12, MADE_BY, VERSION_NEEDED, 0, 0, n_entries, n_entries,
        directory_nbytes, directory_offset,
    )  # fmt: skip
    locator = LOCATOR_RECORD.pack(LOCATOR_SIGNATURE, 0, directory_offset + directory_nbytes, 1)
    end = END_RECORD.pack(END_SIGNATURE, 0, 0, ALL_ONES_16, ALL_ONES_16, ALL_ONES_32, ALL_ONES_32, 0)
    return end64 + locator + end
