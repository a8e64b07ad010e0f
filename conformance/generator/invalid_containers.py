"""Faults of the containers: FF-ZIP, FF-DIR, FF-ALIGN-1 to 3, FF-LIM-1 and 2."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

from generator.faults import BUNDLES, Fault, by_recipe, in_bytes, in_directory, in_zip
from generator.hierarchy import chunk_key
from generator.zip_file import ONES, ZipEntry, ZipFile

TAIL = 98  # ZIP64 end record, locator, end record
TOKENS = chunk_key("embedding/tokens", 2)


def faults() -> Iterator[Fault]:
    """All faults of this file."""
    yield from _ends()
    yield from _central()
    yield from _names()
    yield from _local()
    yield from _order()
    yield from _alignment()
    yield from _directories()


def entry(archive: ZipFile, key: str = TOKENS) -> ZipEntry:
    """Entry of a key."""
    return next(entry for entry in archive.entries if entry.name == key.encode())


def _ends() -> Iterator[Fault]:
    def directory(raw: bytearray, archive: ZipFile) -> tuple[int, int]:
        nbytes, start = struct.unpack_from("<QQ", raw, len(raw) - TAIL + 40)
        return start, nbytes

    def restate(start: Callable[[int, int, int], tuple[int, int]]) -> Callable[[bytearray, ZipFile], bytes]:
        def change(raw: bytearray, archive: ZipFile) -> bytes:
            at = len(raw) - TAIL
            struct.pack_into("<QQ", raw, at + 40, *start(*directory(raw, archive), at))
            struct.pack_into("<II", raw, len(raw) - 10, ONES, ONES)
            return bytes(raw)

        return change

    def recount(count: Callable[[int], int]) -> Callable[[ZipFile], object]:
        def mutate(archive: ZipFile) -> None:
            n = count(len(archive.entries))
            archive.end64 = {"count_here": n, "count": n}
            archive.end = {"count_here": min(n, 0xFFFF), "count": min(n, 0xFFFF)}

        return mutate

    def without_zip64(raw: bytearray, archive: ZipFile) -> bytes:
        return bytes(raw[:-TAIL] + raw[-22:])

    yield in_zip(
        "bytes-before-the-first-entry", "FF-ZIP-1", "64 bytes stand before the first local header",
        lambda z: setattr(z, "prefix", bytes(64)),
    )  # fmt: skip
    not_zip = ["FF-ZIP-1", "FF-ZIP-2"]
    yield Fault("empty-file", not_zip, "the file has no bytes", b"")
    yield Fault("another-format", not_zip, "a GGUF header", b"GGUF\x03\0\0\0" + bytes(120))
    yield in_zip(
        "bytes-after-the-end", "FF-ZIP-2", "a byte follows the end record", lambda z: setattr(z, "suffix", b"\0")
    )
    yield in_bytes("cut-in-half", "FF-ZIP-2", "the second half is missing", lambda raw, z: raw[: len(raw) // 2])
    yield in_bytes("cut-by-one-byte", "FF-ZIP-2", "the last byte is missing", lambda raw, z: raw[:-1])

    def comment(z: ZipFile) -> None:
        z.end, z.suffix = {"n_comment": 3}, b"abc"

    yield in_zip("archive-comment", "FF-ZIP-2", "the archive has a comment", comment)
    yield in_bytes("without-zip64-records", "FF-ZIP-2", "the ZIP64 end record and locator are missing", without_zip64)
    yield in_zip(
        "locator-points-elsewhere", "FF-ZIP-2", "the locator gives another offset of the ZIP64 end record",
        lambda z: z.locator.update(offset=0),
    )  # fmt: skip
    yield in_zip(
        "end-record-of-other-size", "FF-ZIP-2", "the ZIP64 end record claims an extensible part",
        lambda z: z.end64.update(size=48),
    )  # fmt: skip
    yield in_zip("two-disks", "FF-ZIP-3", "the locator counts two disks", lambda z: z.locator.update(disks=2))
    yield in_zip("end-made-by-dos", "FF-ZIP-3", "the end record is made by DOS", lambda z: z.end64.update(made_by=45))
    yield in_zip(
        "end-version-20", "FF-ZIP-3", "the ZIP64 end record needs version 20", lambda z: z.end64.update(needed=20)
    )
    yield in_zip("end-records-disagree", "FF-ZIP-3", "the end record counts one entry", lambda z: z.end.update(count=1))
    yield in_zip("one-entry-unstated", "FF-ZIP-4", "the count leaves out the last entry", recount(lambda n: n - 1))
    yield in_zip("one-entry-too-many", "FF-ZIP-4", "the count exceeds the records by one", recount(lambda n: n + 1))
    yield in_zip(
        "bytes-after-the-directory", "FF-ZIP-4", "four bytes lie between the last central record and the end records",
        lambda z: setattr(z, "after_directory", b"\0\0\0\0"),
    )  # fmt: skip
    yield in_bytes(
        "directory-ends-early", "FF-ZIP-4", "the stated directory ends one byte before the end records",
        restate(lambda start, nbytes, at: (nbytes - 1, start)),
    )  # fmt: skip
    yield in_bytes(
        "directory-wraps-around", "FF-ZIP-4", "start + size of the directory is right only modulo 2^64",
        restate(lambda start, nbytes, at: (at + 4096, 2**64 - 4096)),
    )  # fmt: skip
    yield in_zip("too-many-entries", "FF-LIM-1", "the end records count 2^20 + 1 entries", recount(lambda n: 2**20 + 1))
    yield in_bytes(
        "directory-too-large", "FF-LIM-2", "the end records state a directory of 256 MiB and one byte",
        restate(lambda start, nbytes, at: ((256 << 20) + 1, start)),
    )  # fmt: skip


def _both(**fields: int) -> Callable[[ZipFile], object]:
    def mutate(archive: ZipFile) -> None:
        entry(archive).local.update(fields)
        entry(archive).central.update(fields)

    return mutate


def _central_only(**fields: int | bytes) -> Callable[[ZipFile], object]:
    return lambda archive: entry(archive).central.update(fields)


def _central() -> Iterator[Fault]:
    rule = "FF-ZIP-5"
    yield in_zip("deflated-entry", rule, "an entry says that it is deflated", _both(method=8))
    yield in_zip("encrypted-entry", rule, "an entry says that it is encrypted", _both(flags=0x0801))
    yield in_zip("data-descriptor", rule, "an entry announces a data descriptor", _both(flags=0x0808))
    yield in_zip("flags-zero", rule, "an entry lacks the UTF-8 flag", _both(flags=0))
    yield in_zip("entry-version-20", rule, "an entry needs version 20", _both(needed=20))
    for name, description, fields in (
        ("entry-made-by-dos", "an entry is made by DOS", {"made_by": 45}),
        ("entry-internal-attributes", "an entry is said to be text", {"internal": 1}),
        ("entry-executable", "an entry is an executable file", {"external": 0o100755 << 16}),
    ):
        yield in_zip(name, rule, description, lambda z, fields=fields: z.entries[1].central.update(fields))
    yield in_zip("entry-time", rule, "an entry has a time of day", _both(time=0x6000))
    yield in_zip("entry-date", rule, "an entry is of 2024", _both(date=0x5821))
    yield in_zip("directory-entry", rule, "an entry has the DOS attribute of a directory", _central_only(external=0x10))
    yield in_zip(
        "symlink-entry", rule, "an entry has the mode of a symbolic link", _central_only(external=0o120777 << 16)
    )
    yield in_zip("entry-comment", rule, "an entry has a comment", _central_only(comment=b"hello"))
    yield in_zip("entry-on-another-disk", rule, "an entry begins on disk 1", _central_only(disk=1))

    def two_sizes(z: ZipFile) -> None:
        e = entry(z)
        n = len(e.payload)
        e.central["extra"] = struct.pack("<HHQQQ", 1, 24, n, n - 1, e.offset)

    def stated(z: ZipFile) -> None:
        entry(z).central["size"] = len(entry(z).payload)

    def more_extra(z: ZipFile) -> None:
        e = entry(z)
        n = len(e.payload)
        extra = struct.pack("<HHQQQ", 1, 24, n, n, e.offset) + struct.pack("<HHI", 0x5455, 4, 0)
        e.central["extra"] = extra

    def short_field(z: ZipFile) -> None:
        e = entry(z)
        n = len(e.payload)
        e.central["extra"] = struct.pack("<HHQQ", 1, 16, n, n) + struct.pack("<HHI", 0x5455, 4, 0)

    yield in_zip("two-sizes", rule, "a stored entry has a compressed size one byte smaller", two_sizes)
    yield in_zip("size-outside-zip64", "FF-ZIP-6", "a 32-bit size field holds the size", stated)
    yield in_zip("another-central-field", "FF-ZIP-6", "a central record has a timestamp field besides", more_extra)
    yield in_zip(
        "central-field-without-offset", "FF-ZIP-6", "the ZIP64 field of a central record has no offset", short_field
    )


def _names() -> Iterator[Fault]:
    def add(name: bytes) -> Callable[[ZipFile], object]:
        return lambda archive: archive.entries.insert(len(archive.entries) - 1, ZipEntry(name, b"x"))

    for name, raw, what in [
        ("upper-case-name", b"extensions/Note", "an entry name has an upper-case letter"),
        ("parent-name", b"../evil", "an entry name leads to the parent directory"),
        ("absolute-name", b"/etc/evil", "an entry name is an absolute path"),
        ("directory-name", b"layers/", "an entry name ends with a slash"),
        ("name-not-ascii", "extensions/\u00e9".encode(), "an entry name is not ASCII"),
        ("name-with-backslash", b"extensions\\note", "an entry name has a backslash"),
        ("name-with-nul", b"extensions/no\0te", "an entry name has a NUL"),
        ("name-with-line-feed", b"extensions/note\n", "an entry name ends with a line feed"),
        ("option-name", b"extensions/-rf", "a segment of an entry name begins with a hyphen"),
        ("empty-name", b"", "an entry name is empty"),
        ("name-of-1025-bytes", b"extensions/" + b"a" * 1014, "an entry name has 1025 bytes"),
    ]:
        yield in_zip(name, "FF-ZIP-7", what, add(raw))

    def twice(z: ZipFile) -> None:
        z.entries.insert(len(z.entries) - 1, ZipEntry(TOKENS.encode(), entry(z).payload))

    yield in_zip("duplicate-entry", "FF-ZIP-8", "two entries have the same name", twice)


def _local() -> Iterator[Fault]:
    def local(**fields: int | bytes) -> Callable[[ZipFile], object]:
        return lambda archive: entry(archive).local.update(fields)

    def other_name(z: ZipFile) -> None:
        entry(z).local["name"] = TOKENS.replace("tokens", "nekots").encode()

    def extra(make: Callable[[bytes, bytes], bytes]) -> Callable[[ZipFile], object]:
        def mutate(z: ZipFile) -> None:
            e = entry(z)
            fixed = e.offset + 30 + len(e.name)
            n_padding = e.payload_offset - fixed - 26
            zip64 = struct.pack("<HHQQ", 1, 16, len(e.payload), len(e.payload))
            e.local["extra"] = make(zip64, struct.pack("<HHH", 0xD935, 2 + n_padding, 64) + bytes(n_padding))

        return mutate

    def other_size(zip64: bytes, alignment: bytes) -> bytes:
        return zip64[:4] + struct.pack("<QQ", 1, 1) + alignment

    yield in_zip("local-crc-differs", "FF-ZIP-9", "the local header states another CRC-32", local(crc32=1))
    yield in_zip("local-name-differs", "FF-ZIP-9", "the local header states another name", other_name)
    yield in_zip("local-flags-differ", "FF-ZIP-9", "the local header states other flags", local(flags=0))
    yield in_zip("local-method-differs", "FF-ZIP-9", "the local header says deflated", local(method=8))
    yield in_zip("local-signature", "FF-ZIP-9", "a local header has no signature", local(signature=0x04034B51))
    sizes = ["FF-ZIP-9", "FF-ZIP-10"]
    yield in_zip("local-sizes-differ", sizes, "the local header states other sizes", extra(other_size))
    yield in_zip(
        "zip64-field-last", "FF-ZIP-10", "the alignment field stands before the ZIP64 field", extra(lambda a, b: b + a)
    )
    yield in_zip(
        "another-alignment-field", "FF-ZIP-10", "a field of another id pads the local header",
        extra(lambda a, b: a + struct.pack("<H", 0xCAFE) + b[2:]),
    )  # fmt: skip
    yield in_zip(
        "padding-not-zero",
        "FF-ZIP-10",
        "the padding of a local header is not zero",
        extra(lambda a, b: a + b[:-1] + b"\1"),
    )
    yield in_zip(
        "padding-outside-the-field", "FF-ZIP-10", "the alignment field ends one byte before the extra data",
        extra(lambda a, b: a + b[:2] + struct.pack("<H", len(b) - 5) + b[4:]),
    )  # fmt: skip


def _order() -> Iterator[Fault]:
    rule = "FF-ZIP-11"

    def gap(z: ZipFile) -> None:
        entry(z).gap_before = bytes(64)

    def overlap(z: ZipFile) -> None:
        e = entry(z)
        previous = z.entries[z.entries.index(e) - 1]
        e.central["extra"] = struct.pack("<HHQQQ", 1, 24, len(e.payload), len(e.payload), previous.offset)

    def beyond(z: ZipFile) -> None:
        e = z.entries[-1]
        e.central["extra"] = struct.pack("<HHQQQ", 1, 24, 2**63, 2**63, e.offset)

    def past_the_end(z: ZipFile) -> None:
        e = z.entries[-1]
        e.central["extra"] = struct.pack("<HHQQQ", 1, 24, len(e.payload), len(e.payload), 2**64 - 64)

    def swapped(z: ZipFile) -> None:
        n = len(z.entries)
        z.directory_order = [*range(n - 2), n - 1, n - 2]

    yield in_zip("gap-between-entries", rule, "64 bytes belong to no entry", gap)
    yield in_zip("entries-overlap", rule, "two central records point to the same local header", overlap)
    yield in_zip("size-of-2-to-63", rule, "the last entry claims 2^63 bytes", beyond)
    yield in_zip("offset-past-the-end", rule, "the last entry claims to begin near 2^64", past_the_end)
    yield in_zip("directory-out-of-order", rule, "the central records of two payloads are swapped", swapped)
    yield in_zip(
        "gap-before-the-directory", rule, "16 bytes lie between the last payload and the central directory",
        lambda z: setattr(z, "after_entries", bytes(16)),
    )  # fmt: skip

    def move(start: int, stop: int) -> Callable[[ZipFile], object]:
        return lambda archive: archive.entries.insert(stop, archive.entries.pop(start))

    yield in_zip("root-not-first", "FF-ZIP-12", "another document stands before the root's", move(0, 1))
    yield in_zip("documents-out-of-order", "FF-ZIP-12", "two documents of one depth are swapped", move(1, 2))
    yield in_zip("document-after-payloads", "FF-ZIP-12", "a document stands behind the payloads", move(3, 10**6))

    def other_crc(z: ZipFile) -> None:
        entry(z).crc32 = 0x12345678

    yield in_zip("entry-crc", "FF-ZIP-13", "both headers state a CRC-32 that the payload does not have", other_crc)


def _alignment() -> Iterator[Fault]:
    bundles = chunk_key(BUNDLES, 3)

    def align(key: str, alignment: int, shift: int = 0) -> Callable[[ZipFile], object]:
        def mutate(archive: ZipFile) -> None:
            entry(archive, key).alignment = alignment
            entry(archive, key).shift = shift

        return mutate

    def stated(z: ZipFile) -> None:
        e = entry(z)
        e.local["extra"] = _extra_stating(e, 1 << 15)

    yield in_zip("bundles-misaligned", "FF-ALIGN-1", "bundles begin at a multiple of 64 only", align(bundles, 64))
    yield in_zip("payload-misaligned", "FF-ALIGN-2", "a payload begins at an odd multiple of 32", _odd_multiple_of_32)
    yield in_zip("document-misaligned", "FF-ALIGN-2", "a document begins at an odd multiple of 32", _document_at_32)
    yield in_zip("alignment-not-reached", "FF-ALIGN-3", "a local header states 32768, the payload is at less", stated)
    yield in_zip(
        "alignment-no-power-of-two", "FF-ALIGN-3", "a local header states the alignment 192", align(TOKENS, 192)
    )
    yield in_zip("alignment-zero", "FF-ALIGN-3", "a local header states the alignment 0", _alignment_zero)
    yield in_zip("padding-not-least", "FF-ALIGN-3", "a payload is padded by 64 bytes too many", align(TOKENS, 64, 64))


def _extra_stating(e: ZipEntry, alignment: int) -> bytes:
    n_padding = e.payload_offset - e.offset - 30 - len(e.name) - 26
    zip64 = struct.pack("<HHQQ", 1, 16, len(e.payload), len(e.payload))
    return zip64 + struct.pack("<HHH", 0xD935, 2 + n_padding, alignment) + bytes(n_padding)


def _alignment_zero(z: ZipFile) -> None:
    entry(z).local["extra"] = _extra_stating(entry(z), 0)


def _odd_multiple_of_32(z: ZipFile) -> None:
    _first_that_misaligns(z, [i for i, e in enumerate(z.entries[:-1]) if not e.name.endswith(b"zarr.json")])


def _document_at_32(z: ZipFile) -> None:
    _first_that_misaligns(z, [i for i, e in enumerate(z.entries[:-1]) if e.name.endswith(b"zarr.json")])


def _first_that_misaligns(z: ZipFile, candidates: list[int]) -> None:
    """Give alignment 32 to the first entry whose least padding then ends at an odd multiple of 32."""
    for index in candidates:
        z.entries[index].alignment = 32
        z.build()
        if z.entries[index].payload_offset % 64:
            return
        z.entries[index].alignment = 64
    raise ValueError("no entry can be misaligned with the least padding")


def _directories() -> Iterator[Fault]:
    def without_root(keys: dict[str, bytes]) -> None:
        del keys["zarr.json"]

    def with_file(key: str) -> Callable[[dict[str, bytes]], Any]:
        return lambda keys: keys.update({key: b"x"})

    yield in_directory("directory-without-root", "FF-DIR-1", "the directory has no zarr.json", without_root)
    yield by_recipe(
        "symlink-to-payload", "FF-DIR-2", "a payload is a symbolic link to its bytes",
        ["rename", TOKENS, "../payload"], ["symlink", TOKENS, "../../../../../payload"],
    )  # fmt: skip
    yield by_recipe(
        "symlink-to-nothing", "FF-DIR-2", "a symbolic link leads nowhere", ["symlink", "extensions", "nowhere"]
    )
    yield by_recipe(
        "symlink-loop", "FF-DIR-2", "a symbolic link leads to the directory above", ["symlink", "loop", "."]
    )
    yield by_recipe("named-pipe", "FF-DIR-2", "a named pipe lies in the directory", ["mkfifo", "pipe"])
    yield in_directory("file-with-upper-case-name", "FF-DIR-3", "a file is called README", with_file("README"))
    yield in_directory("hidden-file", "FF-DIR-3", "a file is called .zattrs", with_file("layers/.zattrs"))
    yield by_recipe("empty-directory", "FF-DIR-3", "a directory is empty", ["mkdir", "extensions"])
