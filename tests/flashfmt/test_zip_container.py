"""The strict ZIP reader: each rule broken once in the bytes, and agreement with the standard library's reader."""

import os
import shutil
import subprocess
import time
import zipfile

import numpy as np
import pytest

import flashfmt
from flashfmt.container import Extent, read_bytes
from flashfmt.zip_container import ZipContainer

LAST = "files/chat_template/c/0"
SOME = "final_norm/weight/c/0"
ROOT = "zarr.json"


def patch(form, value, *, local=None, central=None, tail=None):
    """Overwrite a field at an offset in a local header, a central entry, or the end records."""

    def change(z):
        if local is not None:
            z.patch(z.local[SOME] + local, form, value)
        if central is not None:
            z.patch(z.central[SOME] + central, form, value)
        if tail is not None:
            z.patch(z.end64 + tail, form, value)

    return change


def splice(z, offset, raw, n_removed=0):
    z.data[offset : offset + n_removed] = raw


def move_directory(z, by):
    """Correct the end records of a file whose central directory has moved by some bytes."""
    start = min(z.central.values()) + by
    z.end64 += by
    z.patch(z.end64 + 48, "Q", start)
    z.patch(z.end64 + 56 + 8, "Q", z.end64)


def gap_before_directory(z):
    splice(z, min(z.central.values()), bytes(64))
    move_directory(z, 64)


def two_names(z):
    """The central directory names an entry otherwise than its local header does."""
    z.data[z.central[SOME] + 46 + len(SOME) - 1] = ord("1")


def same_name(z):
    """Two entries whose names have one length get one name, in both places."""
    first, second = "layers/0/ffn/up_bias/c/0", "layers/1/ffn/up_bias/c/0"
    raw = first.encode()
    z.data[z.central[second] + 46 : z.central[second] + 46 + len(raw)] = raw
    z.data[z.local[second] + 30 : z.local[second] + 30 + len(raw)] = raw


def rename(name):
    raw = name.encode("latin-1")
    assert len(raw) == len(SOME)

    def change(z):
        z.data[z.central[SOME] + 46 : z.central[SOME] + 46 + len(raw)] = raw
        z.data[z.local[SOME] + 30 : z.local[SOME] + 30 + len(raw)] = raw

    return change


def dirty_padding(z):
    z.data[z.payload[SOME] - 1] = 1


def alias(z):
    """An entry points at the local header of another."""
    z.patch(z.central[SOME] + 46 + len(SOME) + 4 + 16, "Q", z.local[ROOT])


EXTRA = 46 + len(SOME)
LOCAL_EXTRA = 30 + len(SOME)

BREAKS = [
    ("FF-ZIP-1", lambda z: splice(z, 0, b"\0")),
    ("FF-ZIP-1", lambda z: splice(z, 0, b"#!/bin/sh\n")),
    ("FF-ZIP-2", lambda z: splice(z, len(z.data), b"\0")),
    ("FF-ZIP-2", lambda z: splice(z, len(z.data) - 1, b"", 1)),
    ("FF-ZIP-2", lambda z: splice(z, 60, b"", len(z.data) - 60)),
    ("FF-ZIP-2", patch("H", 5, tail=56 + 20 + 20)),
    ("FF-ZIP-2", patch("I", 0, tail=56)),
    ("FF-ZIP-2", patch("I", 0, tail=0)),
    ("FF-ZIP-2", patch("Q", 45, tail=4)),
    ("FF-ZIP-2", patch("Q", 0, tail=56 + 8)),
    ("FF-ZIP-3", patch("H", 20, tail=12)),
    ("FF-ZIP-3", patch("H", 20, tail=14)),
    ("FF-ZIP-3", patch("I", 1, tail=16)),
    ("FF-ZIP-3", patch("I", 2, tail=56 + 16)),
    ("FF-ZIP-3", patch("H", 1, tail=76 + 4)),
    ("FF-ZIP-3", patch("H", 3, tail=76 + 8)),
    ("FF-ZIP-3", patch("I", 3, tail=76 + 16)),
    ("FF-ZIP-3", patch("Q", 3, tail=24)),
    ("FF-ZIP-4", patch("Q", 1 << 63, tail=48)),
    ("FF-ZIP-4", patch("Q", 64, tail=48)),
    ("FF-ZIP-4", patch("I", 0, central=0)),
    ("FF-ZIP-4", patch("H", 0xFFFF, central=28)),
    ("FF-ZIP-5", patch("H", 20, central=6)),
    ("FF-ZIP-5", patch("H", 0x0801, central=8)),
    ("FF-ZIP-5", patch("H", 8, central=10)),
    ("FF-ZIP-5", patch("H", 1, central=12)),
    ("FF-ZIP-5", patch("H", 0x22, central=14)),
    ("FF-ZIP-5", patch("H", 1, central=34)),
    ("FF-ZIP-5", patch("H", 1, central=36)),
    ("FF-ZIP-5", patch("I", 0o120777 << 16, central=38)),
    ("FF-ZIP-5", patch("Q", 255, central=EXTRA + 4)),
    ("FF-ZIP-6", patch("I", 256, central=20)),
    ("FF-ZIP-6", patch("I", 0, central=42)),
    ("FF-ZIP-6", patch("H", 2, central=EXTRA)),
    ("FF-ZIP-6", patch("H", 16, central=EXTRA + 2)),
    ("FF-ZIP-7", rename("../../../../../../etc"[: len(SOME)].ljust(len(SOME), "x"))),
    ("FF-ZIP-7", rename("/" + SOME[1:])),
    ("FF-ZIP-7", rename(SOME[:-1] + "/")),
    ("FF-ZIP-7", rename(SOME.replace("/", "\\"))),
    ("FF-ZIP-7", rename(SOME.upper())),
    ("FF-ZIP-7", rename("é" + SOME[1:])),
    ("FF-ZIP-7", rename("\n" + SOME[1:])),
    ("FF-ZIP-7", rename(SOME.replace("/", "//", 1)[:-1])),
    ("FF-ZIP-8", same_name),
    ("FF-ZIP-9", two_names),
    ("FF-ZIP-9", patch("I", 0, local=0)),
    ("FF-ZIP-9", patch("H", 20, local=4)),
    ("FF-ZIP-9", patch("H", 0x0808, local=6)),
    ("FF-ZIP-9", patch("H", 8, local=8)),
    ("FF-ZIP-9", patch("I", 1, local=14)),
    ("FF-ZIP-9", patch("I", 256, local=18)),
    ("FF-ZIP-9", patch("B", ord("F"), local=30)),
    ("FF-ZIP-10", patch("Q", 255, local=LOCAL_EXTRA + 4)),
    ("FF-ZIP-10", patch("H", 2, local=LOCAL_EXTRA)),
    ("FF-ZIP-10", patch("H", 0xCAFE, local=LOCAL_EXTRA + 20)),
    ("FF-ZIP-10", patch("H", 0xFFFF, local=LOCAL_EXTRA + 22)),
    ("FF-ZIP-10", dirty_padding),
    ("FF-ZIP-11", alias),
    ("FF-ZIP-11", gap_before_directory),
    ("FF-ZIP-11", patch("H", 26, local=28)),
    ("FF-ZIP-11", patch("Q", 1 << 62, central=EXTRA + 20)),
    ("FF-ALIGN-3", patch("H", 0, local=LOCAL_EXTRA + 24)),
    ("FF-ALIGN-3", patch("H", 96, local=LOCAL_EXTRA + 24)),
    ("FF-ALIGN-3", patch("H", 1, local=LOCAL_EXTRA + 24)),
    ("FF-ALIGN-3", patch("H", 32768, local=LOCAL_EXTRA + 24)),
    ("FF-LIM-1", lambda z: (z.patch(z.end64 + 24, "Q", (1 << 20) + 1), z.patch(z.end64 + 32, "Q", (1 << 20) + 1))),
    ("FF-LIM-2", patch("Q", (256 << 20) + 1, tail=40)),
]


@pytest.mark.parametrize(("rule", "change"), BREAKS, ids=[f"{i}-{rule}" for i, (rule, _) in enumerate(BREAKS)])
def test_a_broken_rule_is_named(model, tmp_path, rule, change):
    z = model.zip()
    change(z)
    path = tmp_path / "tiny.flash"
    path.write_bytes(z.data)
    with pytest.raises(flashfmt.FlashFormatError) as caught:
        flashfmt.open(path)
    assert caught.value.rule == rule, str(caught.value)


def test_an_entry_of_all_sizes_wrong_is_refused(model, tmp_path):
    """Sizes that wrap 64 bits when added."""
    z = model.zip()
    for offset in (4, 12):
        z.patch(z.central[SOME] + EXTRA + offset, "Q", (1 << 64) - 64)
    path = tmp_path / "tiny.flash"
    path.write_bytes(z.data)
    with pytest.raises(flashfmt.FlashFormatError) as caught:
        flashfmt.open(path)
    assert caught.value.rule == "FF-ZIP-11"


def reorder(entries, first, second):
    keys = [key for key, _, _ in entries]
    i, j = keys.index(first), keys.index(second)
    entries[i], entries[j] = entries[j], entries[i]
    return entries


@pytest.mark.parametrize(
    ("first", "second"),
    [(ROOT, "layers/zarr.json"), ("layers/0/zarr.json", "layers/1/zarr.json"), ("layers/zarr.json", SOME)],
)
def test_documents_come_first_in_order(model, tmp_path, pack_zip, first, second):
    path = tmp_path / "tiny.flash"
    path.write_bytes(pack_zip(reorder(model.entries(), first, second)).data)
    with pytest.raises(flashfmt.FlashFormatError) as caught:
        flashfmt.open(path)
    assert caught.value.rule == "FF-ZIP-12"


@pytest.mark.parametrize("entries", [[], [("readme.txt", b"x", 64)]])
def test_another_archive_is_refused(tmp_path, pack_zip, entries):
    path = tmp_path / "other.flash"
    path.write_bytes(pack_zip(entries).data)
    with pytest.raises(flashfmt.FlashFormatError, match="not a flash model"):
        flashfmt.open(path)


def test_a_payload_at_a_smaller_alignment_is_refused(model, tmp_path, pack_zip):
    entries = [(key, raw, 32 if key == SOME else alignment) for key, raw, alignment in model.entries()]
    z = pack_zip(entries)
    if z.payload[SOME] % 64 == 0:
        entries = [(key, raw + b" " * (32 if key == ROOT else 0), alignment) for key, raw, alignment in entries]
        z = pack_zip(entries)
    path = tmp_path / "tiny.flash"
    path.write_bytes(z.data)
    with pytest.raises(flashfmt.FlashFormatError) as caught:
        ZipContainer(path)
    assert caught.value.rule == "FF-ALIGN-2"


def test_offsets_agree_with_the_standard_library(model, tmp_path):
    path = model.write_file(tmp_path / "tiny.flash")
    container = ZipContainer(path)
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == list(container.extents)
        for entry in archive.infolist():
            extent = container.extents[entry.filename]
            assert extent == Extent(path, extent.offset, entry.file_size)
            assert archive.read(entry) == raw[extent.offset : extent.offset + extent.nbytes]
            assert (
                archive.read(entry) == read_bytes(container, entry.filename) == container.view(entry.filename).tobytes()
            )
            assert container.checksums[entry.filename] == entry.CRC
    container.close()


@pytest.mark.skipif(shutil.which("unzip") is None, reason="unzip is not installed")
def test_unzip_accepts_the_file(model, tmp_path):
    path = model.write_file(tmp_path / "tiny.flash")
    subprocess.run(["unzip", "-tqq", path], check=True)


def test_views_outlive_the_container(model, tmp_path):
    container = ZipContainer(model.write_file(tmp_path / "tiny.flash"))
    view = container.view(SOME)
    container.close()
    container.close()
    assert view.tobytes() == model.arrays["final_norm/weight"].payload
    assert not view.flags.writeable
    with pytest.raises(flashfmt.FlashError, match="closed"):
        read_bytes(container, SOME)
    with pytest.raises(flashfmt.FlashError, match="closed"):
        container.view(SOME)


def test_a_file_cut_while_open_is_a_read_error(model, tmp_path):
    path = model.write_file(tmp_path / "tiny.flash")
    container = ZipContainer(path)
    os.truncate(path, container.extents[LAST].offset + 3)
    with pytest.raises(flashfmt.FlashReadError, match="ends early") as caught:
        read_bytes(container, LAST)
    assert caught.value.exit_code == 1
    with pytest.raises(flashfmt.FlashReadError, match="cannot map"):
        container.view(LAST)
    container.close()


def test_a_range_outside_an_entry_is_a_programming_error(model, tmp_path):
    container = ZipContainer(model.write_file(tmp_path / "tiny.flash"))
    for start, nbytes in ((-1, 1), (250, 7)):
        with pytest.raises(ValueError, match="outside"):
            container.read_into(SOME, start, np.empty(nbytes, np.uint8))
    container.close()


def test_many_entries_open_quickly(tmp_path, pack_zip):
    """Generous against a loaded machine; quadratic work would take minutes."""
    path = tmp_path / "many.flash"
    path.write_bytes(pack_zip([(ROOT, b"{}", 64), *((f"a/c/{i}", b"x", 64) for i in range(20_000))]).data)
    start = time.perf_counter()
    ZipContainer(path).close()
    assert time.perf_counter() - start < 5
