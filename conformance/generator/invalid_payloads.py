"""Faults that only payloads show: FF-TEN-3 to 5, FF-BND-8, FF-IDX, FF-SUM-3 to 6, FF-STAT; and plain damage."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import numpy as np

from generator.checksums import crc32c
from generator.faults import (
    BUNDLES,
    CHECKSUMS,
    QUERY,
    Fault,
    Mutation,
    base,
    change_bundle,
    change_tensor,
    in_bytes,
    in_directory,
    in_model,
    set_in,
)
from generator.hierarchy import BLOSC, ZSTD, Hierarchy, chunk_key, shard_index, tensor_document
from generator.recipes import RAMP, RAMP_BLOSC, RAMP_ZSTD, raw_zstd_frame
from generator.zip_file import ZipFile

NOTE = "extensions/note"
TOKENIZER = "files/tokenizer"
F32_NAN = struct.pack("<I", 0x7FC00001)
F16_INFINITY = struct.pack("<H", 0xFC00)


def faults() -> Iterator[Fault]:
    """All faults of this file."""
    yield from _compressed()
    yield from _values()
    yield from _index()
    yield from _checksums()
    yield from _statistics()
    yield from _damage()


def _compressed() -> Iterator[Fault]:
    raw = RAMP.tobytes()
    skippable = bytes.fromhex("502a4d18") + struct.pack("<I", 4) + b"\0" * 4
    more, other = bytearray(RAMP_BLOSC), bytearray(RAMP_BLOSC)
    more[4:8] = struct.pack("<I", len(raw) + 4)
    other[12:16] = struct.pack("<I", len(RAMP_BLOSC) - 1)
    block = raw_zstd_frame(raw)[9:]
    for name, what, codec, frame in [
        ("zstd-states-more", "a frame states four bytes more than the shape has", ZSTD, raw_zstd_frame(raw, len(raw) + 4)),
        ("zstd-holds-more", "a frame holds four bytes more than it states", ZSTD, raw_zstd_frame(raw + b"\0" * 4, len(raw))),
        ("zstd-holds-less", "a frame holds four bytes less than it states", ZSTD, raw_zstd_frame(raw[:-4], len(raw))),
        ("zstd-states-2-to-63", "a frame states 2^63 bytes", ZSTD, bytes.fromhex("28b52ffde0") + struct.pack("<Q", 2**63) + block),
        ("zstd-cut-short", "a frame ends early", ZSTD, RAMP_ZSTD[:-1]),
        ("zstd-states-nothing", "a frame does not state its size", ZSTD, bytes.fromhex("28b52ffd0058") + block),
        ("zstd-two-frames", "a second frame follows", ZSTD, raw_zstd_frame(raw) + raw_zstd_frame(b"")),
        ("zstd-skippable-frame", "a skippable frame stands in front", ZSTD, skippable + RAMP_ZSTD),
        ("zstd-is-not", "a payload declared zstd is no frame", ZSTD, raw),
        ("blosc-states-more", "a buffer states four bytes more than the shape has", BLOSC, bytes(more)),
        ("blosc-other-length", "a buffer states another length than the payload's", BLOSC, bytes(other)),
        ("blosc-cut-short", "a buffer ends within its header", BLOSC, RAMP_BLOSC[:15]),
    ]:  # fmt: skip

        def plant(h: Hierarchy, codec: dict[str, object] = codec, frame: bytes = frame) -> None:
            h.payloads.pop(h.key(NOTE))
            h.add(NOTE, tensor_document("f32", RAMP.shape, frame, codec), frame)

        yield in_model(name, "FF-TEN-3", what, plant, "rich", codecs=[codec["name"]])


def _values() -> Iterator[Fault]:
    def bundle(neuron: int, at: int, value: bytes) -> Mutation:
        return lambda h: change_bundle(h, neuron, at, value)

    def tensor(name: str, at: int, value: bytes) -> Mutation:
        return lambda h: change_tensor(h, name, at, value)

    def gap(h: Hierarchy) -> None:
        payload = bytearray(h.payloads[h.key(BUNDLES)])
        payload[2 * h.attributes(BUNDLES)["stride"] - 1] = 1
        h.replace(BUNDLES, bytes(payload))

    part = 128
    for name, rule, what, mutate, on in [
        ("nan-in-vector", "FF-TEN-4", "a norm weight is NaN", tensor("final_norm/weight", 4, F32_NAN), "rich"),
        ("infinity-in-matrix", "FF-TEN-4", "a weight of a matrix is -Infinity", tensor(QUERY, 6, F16_INFINITY), "minimal"),
        ("infinity-in-bundle", "FF-TEN-4", "a weight of the last bundle is -Infinity", bundle(5, 62, F16_INFINITY), "minimal"),
        ("nan-in-q8-scale", "FF-TEN-4", "a scale of q8 bundles is NaN", bundle(1, part, F32_NAN), "q8"),
        ("infinity-in-q4-scale", "FF-TEN-4", "a scale of q4 bundles is -Infinity", bundle(1, part + 2, F16_INFINITY), "q4"),
        ("infinity-in-q4-tensor", "FF-TEN-4", "a scale of a q4 tensor is -Infinity", tensor("embedding/tokens", part, F16_INFINITY), "q4"),
        ("q8-padding", "FF-TEN-5", "a byte between scale and values of a q8 bundle is not zero", bundle(2, 63, b"\1"), "q8"),
        ("q4-padding-after-scales", "FF-TEN-5", "a byte after the scales of a q4 bundle is not zero", bundle(0, 4, b"\1"), "q4"),
        ("q4-padding-at-end", "FF-TEN-5", "the last byte of a q4 part is not zero", bundle(2, 3 * part - 1, b"\1"), "q4"),
        ("q8-tensor-padding", "FF-TEN-5", "a byte after the scale of a q8 tensor is not zero", tensor("embedding/tokens", 3 * part + 4, b"\1"), "q8"),
        ("gap-not-zero", "FF-BND-8", "the last byte of a gap is not zero", gap, "minimal"),
    ]:  # fmt: skip
        yield in_model(name, rule, what, mutate, on)


def _index() -> Iterator[Fault]:
    def entries(change: Callable[[list[tuple[int, int]]], object]) -> Mutation:
        def mutate(h: Hierarchy) -> None:
            a, payload = h.attributes(BUNDLES), h.payloads[h.key(BUNDLES)]
            n, stride = a["n_neurons"], a["stride"]
            index = [(i * stride, a["row_nbytes"]) for i in range(n)]
            change(index)
            h.replace(BUNDLES, payload[: n * stride] + shard_index(index))

        return mutate

    def put(neuron: int, offset: int, nbytes: int) -> Mutation:
        return entries(lambda index: index.__setitem__(neuron, (offset, nbytes)))

    def wrong_crc(h: Hierarchy) -> None:
        payload = bytearray(h.payloads[h.key(BUNDLES)])
        payload[-1] ^= 0x80
        h.replace(BUNDLES, bytes(payload))

    def big_endian_crc(h: Hierarchy) -> None:
        payload = h.payloads[h.key(BUNDLES)]
        h.replace(BUNDLES, payload[:-4] + payload[:-5:-1])

    def swap(index: list[tuple[int, int]]) -> None:
        index[1], index[2] = index[2], index[1]

    rule = "FF-IDX-3"
    yield in_model("index-checksum", "FF-IDX-2", "the checksum of the index has one wrong bit", wrong_crc)
    yield in_model("index-checksum-big-endian", "FF-IDX-2", "the checksum of the index is big-endian", big_endian_crc)
    yield in_model("index-swapped", rule, "two entries of the index are swapped", entries(swap))
    yield in_model("index-alias", rule, "two entries point to bundle 0", put(3, 0, 64))
    yield in_model("index-hole", rule, "a bundle is marked as absent", put(3, 2**64 - 1, 2**64 - 1))
    yield in_model("index-past-the-end", rule, "a bundle begins behind the payload", put(5, 1 << 40, 64))
    yield in_model("index-size", rule, "an entry covers the gap too", put(0, 0, 128))


def _checksums() -> Iterator[Fault]:
    def digits(name: str, field: str = "crc32c") -> Mutation:
        def mutate(h: Hierarchy) -> None:
            value = h.attributes(name)[field]
            h.attributes(name)[field] = ("0" if value[0] != "0" else "1") + value[1:]

        return mutate

    def of_bundle(h: Hierarchy) -> None:
        payload = bytearray(h.payloads[h.key(CHECKSUMS)])
        payload[4 * 5] ^= 1
        h.replace(CHECKSUMS, bytes(payload))

    def of_strides(h: Hierarchy) -> None:
        a, payload = h.attributes(BUNDLES), h.payloads[h.key(BUNDLES)]
        strides = [payload[i * a["stride"] :][: a["stride"]] for i in range(a["n_neurons"])]
        h.replace(CHECKSUMS, np.array([crc32c(stride) for stride in strides], "<u4").tobytes())

    def of_values(h: Hierarchy) -> None:
        h.payloads.pop(h.key(NOTE))
        h.add(NOTE, tensor_document("f32", RAMP.shape, RAMP_ZSTD, ZSTD), RAMP_ZSTD)
        set_in(h.documents[NOTE], "attributes.flashfmt.crc32c", f"{crc32c(RAMP.tobytes()):08x}")

    yield in_model("tensor-checksum", "FF-SUM-3", "the crc32c of a tensor is wrong", digits(QUERY))
    what = "a crc32c covers the decompressed values"
    yield in_model("tensor-checksum-of-values", "FF-SUM-3", what, of_values, "rich", codecs=["zstd"])
    yield in_model("bundles-checksum", "FF-SUM-4", "the crc32c of bundles is wrong", digits(BUNDLES))
    yield in_model("bundle-checksum", "FF-SUM-5", "the checksum of the last bundle has one wrong bit", of_bundle)
    yield in_model("bundle-checksum-with-gap", "FF-SUM-5", "checksums of bundles cover the gaps", of_strides)
    yield in_model("file-checksum", "FF-SUM-6", "the crc32c of an embedded file is wrong", digits(TOKENIZER), "rich")
    yield in_model(
        "file-digest", "FF-SUM-6", "the sha256 of an embedded file is wrong", digits(TOKENIZER, "sha256"), "rich"
    )


def _statistics() -> Iterator[Fault]:
    def value(name: str, index: int, number: float) -> Mutation:
        return lambda h: change_tensor(h, f"layers/1/statistics/{name}", 4 * index, struct.pack("<f", number))

    frequency, curve = "firing_frequency", "aggregated_window"
    yield in_model("frequency-above-1", "FF-STAT-1", "a firing frequency is 1.5", value(frequency, 5, 1.5), "rich")
    yield in_model("frequency-negative", "FF-STAT-1", "a firing frequency is -0.5", value(frequency, 0, -0.5), "rich")
    yield in_model("window-decreases", "FF-STAT-2", "the aggregated window decreases", value(curve, 2, 0.25), "rich")
    yield in_model(
        "window-negative", "FF-STAT-2", "the aggregated window begins below 0", value(curve, 0, -0.25), "rich"
    )


def _damage() -> Iterator[Fault]:
    """Single flipped bits, as storage makes them: every checksum above the place disagrees."""
    bundles = chunk_key(BUNDLES, 3)
    stride, n = base().attributes(BUNDLES)["stride"], base().attributes(BUNDLES)["n_neurons"]
    in_zip = "FF-ZIP-13"
    for name, key, at, rules, on in [
        ("bundle", bundles, stride + 3, ["FF-SUM-5", "FF-SUM-4"], "minimal"),
        ("gap", bundles, stride - 1, ["FF-BND-8", "FF-SUM-4"], "minimal"),
        ("index", bundles, n * stride + 8, ["FF-IDX-2", "FF-IDX-3", "FF-SUM-4"], "minimal"),
        ("tensor", chunk_key(QUERY, 2), 100, ["FF-SUM-3"], "minimal"),
        ("checksums", chunk_key(CHECKSUMS, 1), 9, ["FF-SUM-3", "FF-SUM-5"], "minimal"),
        ("file", chunk_key(TOKENIZER, 1), 4, ["FF-SUM-6"], "rich"),
    ]:
        yield in_bytes(f"damaged-{name}", [*rules, in_zip], f"a bit of a {name} is flipped", _flip(key, at), on)
        if on == "minimal":
            yield in_directory(
                f"damaged-{name}-in-directory", rules, f"a bit of a {name} is flipped", _flip_in(key, at)
            )
    at = base().keys()["zarr.json"].index(b"minimal")
    what, rules = "a bit of the model's name is flipped", ["FF-SUM-1"]
    yield in_bytes("damaged-document", [*rules, in_zip], what, _flip("zarr.json", at))
    yield in_directory("damaged-document-in-directory", rules, what, _flip_in("zarr.json", at))

    def zeroed(raw: bytearray, archive: ZipFile) -> bytearray:
        start = archive.entries[-1].payload_offset
        raw[start + stride : start + 3 * stride] = bytes(2 * stride)
        return raw

    lost = ["FF-SUM-5", "FF-SUM-4", in_zip]
    yield in_bytes("damaged-sectors", lost, "two bundles are zeros, as after a lost write", zeroed)


def _flip(key: str, at: int) -> Callable[[bytearray, ZipFile], bytearray]:
    def change(raw: bytearray, archive: ZipFile) -> bytearray:
        entry = next(entry for entry in archive.entries if entry.name == key.encode())
        raw[entry.payload_offset + at] ^= 1
        return raw

    return change


def _flip_in(key: str, at: int) -> Callable[[dict[str, bytes]], object]:
    def change(keys: dict[str, bytes]) -> None:
        data = bytearray(keys[key])
        data[at] ^= 1
        keys[key] = bytes(data)

    return change
