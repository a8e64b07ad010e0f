"""A `.flash` file from its entries, every field open to being falsified (SPEC.md section "Single file").

Knows: ZIP records. Does not know: Zarr, which fields are right.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

from generator.encodings import round_up

ONES = 0xFFFFFFFF
VERSION = 45
MADE_BY = 0x032D
DOS_DATE = 0x0021


@dataclass
class ZipEntry:
    """One entry. `local` and `central` replace single fields of its two headers; `nbytes` what they call its size."""

    name: bytes
    payload: bytes
    alignment: int = 64
    crc32: int | None = None
    local: dict[str, int | bytes] = field(default_factory=dict)
    central: dict[str, int | bytes] = field(default_factory=dict)
    gap_before: bytes = b""
    shift: int = 0
    offset: int = 0
    payload_offset: int = 0


@dataclass
class ZipFile:
    """Entries and end records; the dictionaries replace single fields."""

    entries: list[ZipEntry]
    end64: dict[str, int] = field(default_factory=dict)
    locator: dict[str, int] = field(default_factory=dict)
    end: dict[str, int] = field(default_factory=dict)
    prefix: bytes = b""
    after_entries: bytes = b""
    after_directory: bytes = b""
    suffix: bytes = b""
    directory_order: list[int] | None = None

    def build(self) -> bytes:
        """The file's bytes; sets the offsets of the entries."""
        out = bytearray(self.prefix)
        for entry in self.entries:
            out += entry.gap_before
            entry.offset = len(out)
            out += _local_header(entry)
            entry.payload_offset = len(out)
            out += entry.payload
        out += self.after_entries
        start = len(out)
        order = self.directory_order or range(len(self.entries))
        for index in order:
            out += _central_record(self.entries[index])
        out += self.after_directory
        out += self._end_records(start, len(out) - start, len(list(order)))
        return bytes(out + self.suffix)

    def _end_records(self, start: int, nbytes: int, count: int) -> bytes:
        e = {"signature": 0x06064B50, "size": 44, "made_by": MADE_BY, "needed": VERSION, "disk": 0, "start_disk": 0}
        e |= {"count_here": count, "count": count, "nbytes": nbytes, "start": start} | self.end64
        x = {"signature": 0x07064B50, "disk": 0, "offset": start + nbytes, "disks": 1} | self.locator
        f = {"signature": 0x06054B50, "disk": 0, "start_disk": 0, "count_here": min(count, 0xFFFF)}
        f |= {"count": min(count, 0xFFFF), "nbytes": min(nbytes, ONES), "start": min(start, ONES), "n_comment": 0}
        f |= self.end
        return (
            struct.pack("<IQHHIIQQQQ", *e.values())
            + struct.pack("<IIQI", *x.values())
            + struct.pack("<IHHHHIIH", *f.values())
        )


def _local_header(entry: ZipEntry) -> bytes:
    zip64 = struct.pack("<HHQQ", 1, 16, len(entry.payload), len(entry.payload))
    unpadded = entry.offset + 30 + len(entry.name) + len(zip64) + 6
    padding = bytes(round_up(unpadded, entry.alignment) - unpadded + entry.shift)
    extra = zip64 + struct.pack("<HHH", 0xD935, 2 + len(padding), entry.alignment) + padding
    extra = _bytes(entry.local.get("extra", extra))
    name = _bytes(entry.local.get("name", entry.name))
    f: dict[str, int | bytes] = {"signature": 0x04034B50, "needed": VERSION, "flags": 0x0800, "method": 0}
    f |= {"time": 0, "date": DOS_DATE, "crc32": _crc32(entry), "packed": ONES, "size": ONES}
    f |= {"n_name": len(name), "n_extra": len(extra)}
    f |= {key: value for key, value in entry.local.items() if key in f}
    return struct.pack("<IHHHHHIIIHH", *f.values()) + name + extra


def _central_record(entry: ZipEntry) -> bytes:
    zip64 = struct.pack("<HHQQQ", 1, 24, len(entry.payload), len(entry.payload), entry.offset)
    extra = _bytes(entry.central.get("extra", zip64))
    comment = _bytes(entry.central.get("comment", b""))
    name = _bytes(entry.central.get("name", entry.name))
    f: dict[str, int | bytes] = {"signature": 0x02014B50, "made_by": MADE_BY, "needed": VERSION}
    f |= {"flags": 0x0800, "method": 0, "time": 0, "date": DOS_DATE, "crc32": _crc32(entry), "packed": ONES}
    f |= {"size": ONES, "n_name": len(name), "n_extra": len(extra), "n_comment": len(comment), "disk": 0}
    f |= {"internal": 0, "external": 0o100644 << 16, "offset": ONES}
    f |= {key: value for key, value in entry.central.items() if key in f}
    return struct.pack("<IHHHHHHIIIHHHHHII", *f.values()) + name + extra + comment


def _crc32(entry: ZipEntry) -> int:
    return zlib.crc32(entry.payload) if entry.crc32 is None else entry.crc32


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise TypeError("bytes wanted")
    return value
