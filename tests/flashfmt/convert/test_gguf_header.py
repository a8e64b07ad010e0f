"""Hostile GGUF headers, written byte by byte: refused at once, never read past a limit."""

import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfmt.convert.gguf_header import read_header
from flashfmt.errors import CheckpointError

BLOCKS = {0: (1, 4), 1: (1, 2), 8: (32, 34)}


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key, kind, payload):
    return text(key) + struct.pack("<I", kind) + payload


def tensor(name, shape, kind, offset):
    dims = struct.pack(f"<{len(shape)}Q", *shape[::-1])
    return text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


def gguf(pairs=(), tensors=(), body=b"", version=3, n_tensors=None, n_pairs=None):
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    n_pairs = len(pairs) if n_pairs is None else n_pairs
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_pairs) + b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + body


GOOD = gguf(
    [
        pair("general.architecture", 8, text("llama")),
        pair("a.flag", 7, b"\1"),
        pair("a.numbers", 9, struct.pack("<IQ3i", 5, 3, -1, 0, 7)),
        pair("a.words", 9, struct.pack("<IQ", 8, 2) + text("x") + text("é")),
        pair("a.half", 6, struct.pack("<f", 0.5)),
    ],
    [tensor("w", (2, 32), 8, 0), tensor("v", (3,), 0, 96)],
    bytes(96 + 12),
)


def parse(path, content):
    path.write_bytes(content)
    with path.open("rb") as file:
        return read_header(file, path, BLOCKS)


def test_a_good_header(tmp_path):
    header = parse(tmp_path / "m.gguf", GOOD)
    assert header.metadata == {
        "general.architecture": "llama",
        "a.flag": True,
        "a.numbers": [-1, 0, 7],
        "a.words": ["x", "é"],
        "a.half": 0.5,
    }
    assert {name: (t.shape, t.type_id, t.nbytes) for name, t in header.tensors.items()} == {
        "w": ((2, 32), 8, 68),
        "v": ((3,), 0, 12),
    }
    assert header.tensors["v"].offset - header.tensors["w"].offset == 96
    assert header.tensors["v"].offset + 12 == len(GOOD)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated"),
        (b"GGML" + bytes(40), "not a GGUF file"),
        (gguf(version=1), "unsupported GGUF version"),
        (gguf(version=0x03000000), r"big-endian\?"),
        (gguf(n_tensors=1 << 62), "too many tensors"),
        (gguf(n_pairs=1 << 62), "too many metadata pairs"),
        # 43 bytes that say one string of nearly 2^64 bytes: the gguf package does not come back from its like
        (gguf(n_pairs=1)[:24] + struct.pack("<Q", (1 << 64) - 1) + bytes(11), "string too long"),
        (gguf(n_pairs=1)[:24] + pair("k", 9, struct.pack("<I", 9))[:19], "truncated|unsupported type"),
        (gguf([pair("k", 9, struct.pack("<IQ", 9, 1) + bytes(64))]), "unsupported type of array"),
        (gguf([pair("k", 9, struct.pack("<IQ", 8, 1 << 60))]), "too many array elements"),
        (gguf([pair("k", 9, struct.pack("<IQ", 0, 1 << 60))]), "too many array elements"),
        (gguf([pair("k", 9, struct.pack("<IQ", 12, 10) + bytes(64))]), "truncated"),
        (gguf([pair("k", 13, bytes(32))]), "unknown type"),
        (gguf([pair("k", 8, struct.pack("<Q", 1 << 40))]), "string too long"),
        (gguf([pair(b"\xff\xfe", 7, b"\0" * 32)]), "not UTF-8"),
        (gguf([pair("k", 7, b"\0"), pair("k", 7, b"\0")]), "duplicate metadata key"),
        (gguf([pair("general.alignment", 4, struct.pack("<I", 3))]), "bad alignment"),
        (gguf([pair("general.alignment", 4, struct.pack("<I", 0))]), "bad alignment"),
        (gguf([], [tensor("w", (4,), 0, 0)] * 2, bytes(64)), "duplicate tensor"),
        (gguf([], [tensor("w", (), 0, 0)], bytes(64)), "bad number of dimensions"),
        (gguf([], [tensor("w", (1,) * 5, 0, 0)], bytes(64)), "bad number of dimensions"),
        (gguf([], [tensor("w", (4,), 77, 0)], bytes(64)), "unsupported tensor type"),
        (gguf([], [tensor("w", (0, 4), 0, 0)], bytes(64)), "bad shape"),
        (gguf([], [tensor("w", (2, 33), 8, 0)], bytes(96)), "bad shape"),
        (gguf([], [tensor("w", (1 << 62, 1 << 62), 0, 0)], bytes(64)), "bad shape"),
        (gguf([], [tensor("w", (4,), 0, 8)], bytes(64)), "misaligned"),
        (gguf([], [tensor("w", (17,), 0, 0)], bytes(64)), "past the end"),
        (gguf([], [tensor("w", (4,), 0, 1 << 63)], bytes(64)), "past the end"),
        (gguf([], [tensor("w", (12,), 0, 0), tensor("v", (4,), 0, 32)], bytes(64)), "overlaps"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)}-bytes",
)
def test_hostile_headers_are_refused_at_once(tmp_path, content, reason):
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=reason):
        parse(tmp_path / "m.gguf", content)
    assert time.perf_counter() - started < 1


def test_every_truncation_is_refused(tmp_path):
    for length in range(len(GOOD)):
        with pytest.raises(CheckpointError):
            parse(tmp_path / "m.gguf", GOOD[:length])


@settings(max_examples=200, deadline=None)
@given(st.integers(4, len(GOOD) - 1), st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused(tmp_path_factory, position, value):
    content = bytearray(GOOD)
    content[position] = value
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    try:
        header = parse(path, bytes(content))
    except CheckpointError:
        return
    assert all(t.offset + t.nbytes <= len(GOOD) for t in header.tensors.values())
