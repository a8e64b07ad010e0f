"""Strict reader of the `.flash` file: a ZIP64 archive of STORED, aligned entries (SPEC.md section "Single file").

A ZIP says everything twice; this reader accepts a file only where both copies agree and no byte is left over, so
that no two readers can see different contents. Every offset is checked before it is used.

Knows: ZIP records and keys. Does not know: Zarr, JSON, arrays.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from types import MappingProxyType
from typing import Final, NoReturn

import numpy as np

from flashfmt.container import (
    DOCUMENT_NAME,
    KEY_PATTERN,
    Bytes,
    ContainerKind,
    Extent,
    document_order,
    is_document,
    looks_like_file,
    open_read_only,
    pread_into,
)
from flashfmt.errors import FlashError, FlashFormatError, FlashReadError
from flashfmt.layout import MAX_DIRECTORY_BYTES, MAX_ENTRIES, MAX_NAME_BYTES, PAYLOAD_ALIGNMENT, round_up

LOCAL_SIGNATURE: Final = 0x04034B50
CENTRAL_SIGNATURE: Final = 0x02014B50
END64_SIGNATURE: Final = 0x06064B50
LOCATOR_SIGNATURE: Final = 0x07064B50
END_SIGNATURE: Final = 0x06054B50
VERSION_NEEDED: Final = 45
UTF8_FLAG: Final = 0x0800
DOS_DATE: Final = 0x0021  # 1980-01-01
ZIP64_FIELD: Final = 0x0001
ALIGNMENT_FIELD: Final = 0xD935
ALL_ONES_16: Final = 0xFFFF
ALL_ONES_32: Final = 0xFFFFFFFF
MADE_BY: Final = 0x032D  # Unix, version 4.5
FILE_ATTRIBUTES: Final = 0o100644 << 16

LOCAL_RECORD: Final = Struct("<IHHHHHIIIHH")
LOCAL_ZIP64_RECORD: Final = Struct("<HHQQ")
ALIGNMENT_RECORD: Final = Struct("<HHH")
CENTRAL_RECORD: Final = Struct("<IHHHHHHIIIHHHHHII")
CENTRAL_ZIP64_RECORD: Final = Struct("<HHQQQ")
END64_RECORD: Final = Struct("<IQHHIIQQQQ")
LOCATOR_RECORD: Final = Struct("<IIQI")
END_RECORD: Final = Struct("<IHHHHIIH")
_TAIL_NBYTES: Final = END64_RECORD.size + LOCATOR_RECORD.size + END_RECORD.size
# Versions made by and needed, flags, method, time, date; then comment size, disk, internal and external attributes.
_PLAIN_ENTRY: Final = (MADE_BY, VERSION_NEEDED, UTF8_FLAG, 0, 0, DOS_DATE, 0, 0, 0, FILE_ATTRIBUTES)
# Versions made by and needed, four disk numbers with the number of disks between them.
_PLAIN_END: Final = (MADE_BY, VERSION_NEEDED, 0, 0, 0, 1, 0, 0)
_MAX_EXTRA: Final = 0xFFFF


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry as the central directory states it; `at` is the offset of its central record."""

    name: bytes
    at: int
    offset: int
    nbytes: int
    crc32: int


class ZipContainer:
    """A `.flash` file: one descriptor for checked reads, one mapping for views."""

    kind: ContainerKind = "file"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapping: Bytes | None = None
        self._lock = threading.Lock()
        self._fd = open_read_only(path)
        try:
            self.nbytes = os.fstat(self._fd).st_size
            parser = _Parser(self._fd, path, self.nbytes)
            extents: dict[str, Extent] = {}
            checksums: dict[str, int] = {}
            for key, extent, crc32 in parser.parse():
                extents[key] = extent
                checksums[key] = crc32
        except BaseException:
            self.close()
            raise
        self.extents: Mapping[str, Extent] = MappingProxyType(extents)
        self.checksums: Mapping[str, int] = MappingProxyType(checksums)

    def read_into(self, key: str, start: int, buffer: Bytes) -> None:
        """Fill the contiguous `buffer` (uint8) with the bytes of `key` from `start`, by pread."""
        extent = self.extents[key]
        if not 0 <= start <= start + buffer.nbytes <= extent.nbytes:
            raise ValueError(f"[{start}, {start + buffer.nbytes}) is outside {key} of {extent.nbytes} bytes")
        if self._fd < 0:
            raise FlashError("the model is closed", path=self.path)
        pread_into(self._fd, extent.offset + start, buffer, self.path)

    def view(self, key: str) -> Bytes:
        """All bytes of `key` as a read-only uint8 array over the mapped file; stays valid after `close`."""
        extent = self.extents[key]
        return self._mapped()[extent.offset : extent.offset + extent.nbytes]

    def close(self) -> None:
        """Close the descriptor; the mapping goes with its last view."""
        with self._lock:
            self._mapping = None
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _mapped(self) -> Bytes:
        with self._lock:
            if self._mapping is None:
                if self._fd < 0:
                    raise FlashError("the model is closed", path=self.path)
                try:
                    memory = mmap.mmap(self._fd, self.nbytes, access=mmap.ACCESS_READ)
                except (OSError, ValueError) as error:
                    raise FlashReadError(f"cannot map the file: {error}", path=self.path) from error
                self._mapping = np.frombuffer(memory, np.uint8)
            return self._mapping


class _Parser:
    """Reads the records of one file, from its end to the local headers."""

    def __init__(self, fd: int, path: Path, nbytes: int) -> None:
        self.fd = fd
        self.path = path
        self.nbytes = nbytes

    def parse(self) -> Iterator[tuple[str, Extent, int]]:
        """Key, extent and CRC-32 of every entry, in file order."""
        self._check_head()
        n_entries, start, stop = self._end_records()
        entries = list(self._central_directory(n_entries, start, stop))
        self._check_document_order(entries)
        position = 0
        for index, entry in enumerate(entries):
            if entry.offset != position:
                self._fail(
                    "FF-ZIP-11", entry.at, "an entry does not begin where the last one ends", position, entry.offset
                )
            following = entries[index + 1].offset if index + 1 < len(entries) else start
            if following > start:
                self._fail("FF-ZIP-11", entry.at, "an entry begins behind the payloads", f"at most {start}", following)
            offset = following - entry.nbytes
            self._check_local_header(entry, offset)
            position = following
            yield entry.name.decode("ascii"), Extent(self.path, offset, entry.nbytes), entry.crc32

    def _check_head(self) -> None:
        head = self._read(0, min(self.nbytes, 256))
        if head[:4] != LOCAL_SIGNATURE.to_bytes(4, "little"):
            raise FlashFormatError(
                f"not a flash model: this looks like {looks_like_file(head)}", path=self.path, rule="FF-ZIP-1"
            )

    def _end_records(self) -> tuple[int, int, int]:
        """Number of entries, and the half-open byte range of the central directory."""
        at = self.nbytes - _TAIL_NBYTES
        if at < 0:
            self._fail(
                "FF-ZIP-2", self.nbytes, "the file is cut short", f"{_TAIL_NBYTES} bytes of end records", self.nbytes
            )
        tail = self._read(at, _TAIL_NBYTES)
        end64 = END64_RECORD.unpack_from(tail)
        locator = LOCATOR_RECORD.unpack_from(tail, END64_RECORD.size)
        end = END_RECORD.unpack_from(tail, END64_RECORD.size + LOCATOR_RECORD.size)
        if end[0] != END_SIGNATURE or end[7] != 0:
            message = "no end record: the file is cut short, has bytes after its end, or is not a flash model"
            raise FlashFormatError(message, path=self.path, rule="FF-ZIP-2", where=self.nbytes - END_RECORD.size)
        if locator[0] != LOCATOR_SIGNATURE or end64[0] != END64_SIGNATURE:
            message = "a ZIP archive without ZIP64 end records is not a flash model"
            raise FlashFormatError(message, path=self.path, rule="FF-ZIP-2", where=at)
        if end64[1] != END64_RECORD.size - 12 or locator[2] != at:
            self._fail("FF-ZIP-2", at, "the ZIP64 end record is not where the locator says", at, locator[2])
        found = (*end64[2:6], locator[1], locator[3], end[1], end[2])
        if found != _PLAIN_END:
            self._fail("FF-ZIP-3", at, "the end records have other versions, or several disks", _PLAIN_END, found)
        _, _, _, _, _, _, n_on_disk, n_entries, nbytes, start = end64
        small = ((end[3], n_on_disk, ALL_ONES_16), (end[4], n_entries, ALL_ONES_16))
        large = ((end[5], nbytes, ALL_ONES_32), (end[6], start, ALL_ONES_32))
        for stated, value, ones in (*small, *large):
            if stated not in (ones, value) or n_on_disk != n_entries:
                self._fail("FF-ZIP-3", at, "the end records disagree", value, stated)
        if n_entries > MAX_ENTRIES:
            self._fail("FF-LIM-1", at, "too many entries", f"at most {MAX_ENTRIES}", n_entries)
        if nbytes > MAX_DIRECTORY_BYTES:
            self._fail("FF-LIM-2", at, "the central directory is too large", f"at most {MAX_DIRECTORY_BYTES}", nbytes)
        if start + nbytes != at:
            self._fail("FF-ZIP-4", at, "the central directory does not end at the end records", at, start + nbytes)
        return n_entries, start, at

    def _central_directory(self, n_entries: int, start: int, stop: int) -> Iterator[_Entry]:
        directory = self._read(start, stop - start)
        fixed = CENTRAL_RECORD.size
        names: set[bytes] = set()
        position = 0
        for _ in range(n_entries):
            at = start + position
            if position + fixed > len(directory):
                self._fail("FF-ZIP-4", at, "the central directory is cut short", f"{n_entries} entries", len(names))
            record = CENTRAL_RECORD.unpack_from(directory, position)
            signature, *form, crc32, packed, size, n_name, n_extra, n_comment, disk, internal, external, offset = record
            if signature != CENTRAL_SIGNATURE or position + fixed + n_name + n_extra + n_comment > len(directory):
                self._fail("FF-ZIP-4", at, "no central directory entry here", f"{n_entries} entries", len(names))
            found = (*form, n_comment, disk, internal, external)
            if found != _PLAIN_ENTRY:
                self._fail("FF-ZIP-5", at, "an entry is not plainly stored", _PLAIN_ENTRY, found)
            name = directory[position + fixed : position + fixed + n_name]
            extra = directory[position + fixed + n_name : position + fixed + n_name + n_extra]
            if n_extra != CENTRAL_ZIP64_RECORD.size or (packed, size, offset) != (ALL_ONES_32,) * 3:
                self._fail(
                    "FF-ZIP-6",
                    at,
                    "sizes and offset are not in a ZIP64 field alone",
                    CENTRAL_ZIP64_RECORD.size,
                    n_extra,
                )
            field, field_nbytes, nbytes, packed_nbytes, local = CENTRAL_ZIP64_RECORD.unpack(extra)
            if (field, field_nbytes) != (ZIP64_FIELD, CENTRAL_ZIP64_RECORD.size - 4):
                self._fail(
                    "FF-ZIP-6", at, "sizes and offset are not in a ZIP64 field alone", (1, 24), (field, field_nbytes)
                )
            if nbytes != packed_nbytes:
                self._fail("FF-ZIP-5", at, "a stored entry has two sizes", nbytes, packed_nbytes)
            self._check_name(name, at)
            if name in names:
                self._fail("FF-ZIP-8", at, "an entry name occurs twice", "unique names", name.decode("ascii"))
            names.add(name)
            yield _Entry(name, at, local, nbytes, crc32)
            position += fixed + n_name + n_extra
        if position != len(directory):
            self._fail("FF-ZIP-4", start + position, "bytes follow the central directory", len(directory), position)

    def _check_name(self, name: bytes, at: int) -> None:
        if len(name) > MAX_NAME_BYTES or not name.isascii() or not KEY_PATTERN.fullmatch(name.decode("ascii")):
            self._fail("FF-ZIP-7", at, "an entry name is not a key", "[a-z0-9_.-] segments", ascii(name[:80]))

    def _check_document_order(self, entries: list[_Entry]) -> None:
        names = [entry.name.decode("ascii") for entry in entries]
        documents = [name for name in names if is_document(name)]
        if not documents or names[0] != DOCUMENT_NAME:
            self._fail(
                "FF-ZIP-12", 0, "a ZIP archive, but not a flash model", "zarr.json first", names[0] if names else None
            )
        for entry, name, expected in zip(entries, names, sorted(documents, key=document_order), strict=False):
            if name != expected:
                self._fail("FF-ZIP-12", entry.at, "documents do not come first, by depth and key", expected, name)

    def _check_local_header(self, entry: _Entry, offset: int) -> None:
        """Check the local header of an entry whose payload begins at `offset`."""
        n_header = offset - entry.offset
        n_extra = n_header - LOCAL_RECORD.size - len(entry.name)
        if not LOCAL_ZIP64_RECORD.size + ALIGNMENT_RECORD.size <= n_extra <= _MAX_EXTRA:
            message = "an entry does not fit between its neighbours: a gap, an overlap, or a wrong size"
            raise FlashFormatError(message, path=self.path, rule="FF-ZIP-11", where=entry.at)
        header = self._read(entry.offset, n_header)
        fixed = LOCAL_RECORD.pack(
            LOCAL_SIGNATURE, VERSION_NEEDED, UTF8_FLAG, 0, 0, DOS_DATE, entry.crc32,
            ALL_ONES_32, ALL_ONES_32, len(entry.name), n_extra,
        )  # fmt: skip
        zip64 = LOCAL_ZIP64_RECORD.pack(ZIP64_FIELD, LOCAL_ZIP64_RECORD.size - 4, entry.nbytes, entry.nbytes)
        expected = fixed + entry.name + zip64
        if not header.startswith(expected):
            self._fail_local(entry, header, expected)
        field, field_nbytes, alignment = ALIGNMENT_RECORD.unpack_from(header, len(expected))
        n_padding = n_header - len(expected) - ALIGNMENT_RECORD.size
        padding = header[n_header - n_padding :]
        if field != ALIGNMENT_FIELD or field_nbytes != n_padding + 2 or padding.strip(b"\0"):
            at = entry.offset + len(expected)
            self._fail(
                "FF-ZIP-10",
                at,
                "no alignment field of zero padding",
                (ALIGNMENT_FIELD, n_padding + 2),
                (field, field_nbytes),
            )
        if offset % PAYLOAD_ALIGNMENT:
            self._fail("FF-ALIGN-2", offset, "a payload is not aligned", f"a multiple of {PAYLOAD_ALIGNMENT}", offset)
        if alignment.bit_count() != 1 or offset != round_up(offset - n_padding, alignment):
            self._fail("FF-ALIGN-3", entry.offset, "the stated alignment is not that of the payload", offset, alignment)

    def _fail_local(self, entry: _Entry, header: bytes, expected: bytes) -> NoReturn:
        """Name the rule that a local header breaks."""
        n_fixed = LOCAL_RECORD.size + len(entry.name)
        stated = LOCAL_RECORD.unpack_from(header)
        if stated[0] == LOCAL_SIGNATURE and stated[10] != len(header) - n_fixed:
            self._fail(
                "FF-ZIP-11", entry.offset, "a gap or an overlap before a payload", len(header) - n_fixed, stated[10]
            )
        if header[:n_fixed] == expected[:n_fixed]:
            found = header[n_fixed : len(expected)].hex()
            self._fail(
                "FF-ZIP-10", entry.offset + n_fixed, "no ZIP64 field of the sizes", expected[n_fixed:].hex(), found
            )
        self._fail(
            "FF-ZIP-9",
            entry.offset,
            "local header and central directory disagree",
            expected.hex(),
            header[: len(expected)].hex(),
        )

    def _read(self, offset: int, nbytes: int) -> bytes:
        buffer = np.empty(nbytes, np.uint8)
        pread_into(self.fd, offset, buffer, self.path)
        return buffer.tobytes()

    def _fail(self, rule: str, where: int, message: str, expected: object, actual: object) -> NoReturn:
        raise FlashFormatError(message, path=self.path, rule=rule, where=where, expected=expected, actual=actual)
