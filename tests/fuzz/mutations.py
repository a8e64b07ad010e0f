"""Structure-aware damage to a `.flash` file: a pure function from random numbers and bytes to bytes.

A mutation takes a file apart into keys, changes documents, payloads or the order of entries, puts it together again
with (mostly) matching checksums, so that the change is met by the code that is meant to meet it, and then may patch
a field of a ZIP record. Files that cannot be taken apart are damaged as bytes.

Knows: the containers' records, JSON, where checksums are. Does not know: what the reader makes of it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd

MAX_INPUT_BYTES = 1 << 20
KEY = re.compile(r"[a-z0-9_][a-z0-9_.-]*(/[a-z0-9_][a-z0-9_.-]*)*")
_CHECKSUM = re.compile(rb'("metadata_crc32c":")[^"]{8}(")')
_NUMBER = re.compile(rb'(?<=[\[,:])(?<!"zarr_format":)[0-9]{1,18}(?=[\],}])')
_CODECS = (
    Zstd(3),
    Zstd(-5),
    Zstd(1, checksum=True),
    Blosc("lz4", 5, Blosc.SHUFFLE, blocksize=64),
    Blosc("blosclz", 9, Blosc.BITSHUFFLE),
    Blosc("zlib", 1, Blosc.NOSHUFFLE),
    Blosc("zstd", 1, Blosc.SHUFFLE),
)
_EMPTY_ZSTD = bytes.fromhex("28b52ffd2000010000")
_SKIPPABLE = bytes.fromhex("502a4d1804000000") + b"skip"

INTEGERS = [0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 512, 4096, 16384, 32768, 65535, 65536]
INTEGERS += [(1 << n) + k for n in (20, 24, 28, 30, 31, 32, 33, 40, 48, 53, 62, 63, 64) for k in (-1, 0, 1)]
VALUES: list[Any] = [
    None, True, False, -1, -(1 << 63), 0.0, -0.0, 1.0, 0.5, -1.5, 1e308, 5e-324, 1e39, 3.0, "", "0", "1.0", "2.0",
    "zarr.json", "..", "/", "\x00", "\x1b[2J", "é", "\U0001f600", "x" * 300, [], {}, [[]], [{}], {"": None}, [0] * 9,
    "f32", "f16", "bf16", "q8", "q4", "u8", "u32", "float32", "uint8", "bytes", "zstd", "blosc", "sharding_indexed",
    "crc32c", "start", "end", "big", "little", "tensor", "file", "bundles", "group", "array", "00000000", "f" * 64,
    "low_rank", "low_bit_gate", "gated", "plain", "parallel", "layer_norm", "moe", ["gate", "up", "down"], ["moe"],
]  # fmt: skip
PLAUSIBLE: dict[str, list[Any]] = {
    "version": ["1.1", "1.9999", "2.0", "0.9", "01.0"],
    "required_features": [[], ["moe"], [None]],
    "kind": ["plain", "gated", "relu", "layer_norm", "rms_norm", "low_rank", "low_bit_gate", "tensor", "file"],
    "activation": [{"kind": "fatrelu", "threshold": 0.1}, {"kind": "relu"}],
    "layers": [[{}], [{}] * 3, [{}] * 10_000, [{"rotary": "main", "attention_window_tokens": 1}]],
    "layer": [0, 1, 2],
    "rank": [None, 1, 4, 8],
    "threshold": [0, 1, -1, 2],
    "bias": [True, False],
    "up_bias": [True, False],
    "tied": [True, False],
    "embedding": [{"d_embed": 32, "projection": True}, {"d_embed": 32}, {"d_embed": 64, "projection": True}],
    "norm": [{"kind": "layer_norm", "eps": 1e-5, "bias": True}, {"kind": "rms_norm", "eps": 1, "weight": False}],
    "ffn": [{"kind": "plain", "d_ff": 6, "activation": {"kind": "relu"}, "gate_bias": True}],
    "logits": [{"tied": True, "bias": True}, {"tied": False}],
    "context_tokens": [1, 1 << 31],
    "provenance": [{"writer": "", "source": "", "source_format": "gguf"}],
    "encoding": ["f32", "f16", "bf16", "q8", "q4", "u8", "u32"],
    "alignment": [64, 128, 512, 4096, 32768, 96],
    "stride": [384, 512, 1024, 448, 1 << 25],
    "filename": ["..", "a/b", "a\\b", "x.json", "\x7f"],
    "data_type": ["uint8", "uint16", "uint32", "float16", "float32", "float64", "r8"],
    "codecs": [[{"name": "bytes"}], [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd"}]],
    "dimension_names": [["a"], [None, None], None],
    "fill_value": [0.0, -0.0, 1, "NaN"],
    "optional_features": [["a"] * 64],
    "positions": [{"n_rows": 4}],
    "statistics": [None, {"n_tokens": 1, "text": "", "window_tokens": 5}],
    "predictors": [[], [{"layer": 0, "kind": "low_bit_gate", "tap": {"layer": 0}, "threshold": 0.5}]],
    "block": [{"order": "parallel", "shared_norm": True}, {"shared_norm": True}],
}
SNIPPETS = [
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 400, "1" * 21, "18446744073709551616", "1.0", "1e0", "-0",
    "0x10", "01", "+1", ".5", "1.", "null", "true", "[]", "{}", '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\n"',
    '"', "\\", "[" * 40 + "]" * 40, '{"a":' * 40 + "1" + "}" * 40, "/**/", ",", ":", "\ufeff", "\x00", "'a'", "\u2028",
    '{"a":1,"a":2}', '{"a":1,"\\u0061":2}', '"metadata_crc32c":"00000000"',
]  # fmt: skip


@dataclass
class Entry:
    """One key of the file being changed."""

    key: str
    payload: bytes
    alignment: int

    @property
    def is_document(self) -> bool:
        return self.key == "zarr.json" or self.key.endswith("/zarr.json")


class Mutator:
    """Mutations with the functions of the builder that write a container and its checksums."""

    def __init__(self, builder: ModuleType, seeds: list[bytes]) -> None:
        self.zip_model: Callable[..., Any] = builder.zip_model
        self.seal: Callable[[bytes, dict[str, bytes]], bytes] = builder.seal
        self.array_document: Callable[..., dict[str, Any]] = builder.array_document
        self.dtypes: dict[str, str] = builder.DTYPES
        self.seeds = seeds

    def generate(self, rng: random.Random) -> bytes:
        """A hostile file made from one of the seeds."""
        return self.mutate(rng, rng.choice(self.seeds))

    def mutate(self, rng: random.Random, raw: bytes) -> bytes:
        """A changed copy of a file, at most MAX_INPUT_BYTES long."""
        entries = unpack(raw)
        if not entries or rng.random() < 0.06:
            return damage(rng, raw)[:MAX_INPUT_BYTES]
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5))):
            rng.choices(*_MUTATIONS)[0](self, rng, entries)
        sealed = rng.random()
        if sealed < 0.93:
            self.reseal(entries, payloads=sealed < 0.85)
        z = self.zip_model([(entry.key, entry.payload, entry.alignment) for entry in entries])
        if rng.random() < 0.2:
            patch_records(rng, z)
        return bytes(z.data[:MAX_INPUT_BYTES])

    def reseal(self, entries: list[Entry], *, payloads: bool = True) -> None:
        """Make the checksum of the metadata match, and those of arrays and embedded files where `payloads`."""
        stored = {entry.key: entry.payload for entry in entries}
        for entry in entries if payloads else ():
            document = parsed(entry) if entry.is_document and entry.key != "zarr.json" else None
            try:
                ours = document["attributes"]["flashfmt"]
                payload = stored[entry.key.removesuffix("zarr.json") + "c" + "/0" * len(document["shape"])]
                stated = ours["crc32c"]
            except (KeyError, TypeError):
                continue
            actual = f"{google_crc32c.value(payload):08x}"
            if stated != actual:
                ours["crc32c"] = actual
                if ours.get("kind") == "file":
                    ours["sha256"] = hashlib.sha256(payload).hexdigest()
                entry.payload = dumped(document)
        documents = {entry.key: entry.payload for entry in entries if entry.is_document}
        root = next((entry for entry in entries if entry.key == "zarr.json"), None)
        if root is not None:
            blank = _CHECKSUM.sub(rb"\g<1>00000000\2", root.payload, count=1)
            root.payload = self.seal(blank, {k: v for k, v in documents.items() if k != "zarr.json"})

    def change_document(self, rng: random.Random, entries: list[Entry]) -> None:
        """Change members of one JSON document, more often than not the root."""
        entry = _document(rng, entries, 0.5)
        document = parsed(entry) if entry else None
        if entry and document is not None:
            for _ in range(rng.choice((1, 1, 2, 4))):
                change_tree(rng, document)
            entry.payload = dumped(document)

    def change_text(self, rng: random.Random, entries: list[Entry]) -> None:
        """Put odd JSON into a document in the place of a token, or damage its bytes."""
        entry = _document(rng, entries, 0.3)
        if entry is None:
            return
        text = entry.payload
        tokens = list(re.finditer(rb'"[^"]*"|[-0-9.e+]+|[\[\]{},:]|[a-z]+', text))
        if tokens and rng.random() < 0.8:
            token = rng.choice(tokens)
            snippet = rng.choice(SNIPPETS).encode()
            start, stop = token.span() if rng.random() < 0.7 else (token.start(), token.start())
            entry.payload = text[:start] + snippet + text[stop:]
        else:
            entry.payload = damage(rng, text)

    def change_number(self, rng: random.Random, entries: list[Entry]) -> None:
        """Give one number another value wherever a document (or all of them) has it, so that fields still agree."""
        entry = _document(rng, entries, 0.2)
        found = sorted({int(n) for n in _NUMBER.findall(entry.payload)}) if entry else []
        if found:
            old = rng.choice(found)
            new = _integer(rng, old)
            for other in entries if rng.random() < 0.3 else [entry]:
                if other.is_document:
                    other.payload = _NUMBER.sub(lambda m: b"%d" % new if int(m[0]) == old else m[0], other.payload)

    def change_payload(self, rng: random.Random, entries: list[Entry]) -> None:
        """Damage the bytes of a payload, its length, or put special values into it."""
        entry = _some(rng, entries, lambda e: not e.is_document)
        if entry is None:
            return
        if entry.payload and rng.random() < 0.5:
            special = rng.choice(
                ("ffff7f7f", "ffff7fff", "0000807f", "007c", "0000c0ff", "00fe", "ff7b", "01000000", "80")
            )
            value = bytes.fromhex(special)
            at = rng.randrange(len(entry.payload)) // 4 * 4
            n = rng.choice((1, 1, 2, 64)) * len(value)
            entry.payload = (entry.payload[:at] + value * 64)[: at + n] + entry.payload[at + n :]
        else:
            entry.payload = damage(rng, entry.payload)

    def change_index(self, rng: random.Random, entries: list[Entry]) -> None:
        """Change an entry of a shard index, with its checksum made to match more often than not."""
        entry = _some(rng, entries, lambda e: e.key.endswith("/ffn/bundles/c/0/0/0"))
        if entry is None or len(entry.payload) < 200:
            return
        raw = bytearray(entry.payload)
        n = 6
        at = len(raw) - 4 - 16 * n + 8 * rng.randrange(2 * n)
        (old,) = struct.unpack_from("<Q", raw, at)
        struct.pack_into("<Q", raw, at, _integer(rng, old) % (1 << 64))
        if rng.random() < 0.8:
            raw[-4:] = struct.pack("<I", google_crc32c.value(bytes(raw[-4 - 16 * n : -4])))
        entry.payload = bytes(raw)

    def change_bundle(self, rng: random.Random, entries: list[Entry]) -> None:
        """Change the bytes of a bundle and its own checksum."""
        entry = _some(rng, entries, lambda e: e.key.endswith("/ffn/bundles/c/0/0/0"))
        sums = _some(rng, entries, lambda e: e.key == (entry.key[:-13] + "bundle_crc32c/c/0" if entry else ""))
        document = _some(rng, entries, lambda e: e.key == (entry.key[:-7] + "/zarr.json" if entry else ""))
        try:
            ours = parsed(document)["attributes"]["flashfmt"]
            stride, row_nbytes, n = ours["stride"], ours["row_nbytes"], ours["n_neurons"]
            neuron = rng.randrange(n)
            raw, checksums = bytearray(entry.payload), bytearray(sums.payload)
            at = neuron * stride + rng.randrange(stride if rng.random() < 0.3 else row_nbytes)
            raw[at : at + 4] = bytes.fromhex(rng.choice(("ffff7f7f", "007c007c", "0000807f", "00000000", "01010101")))
            row = bytes(raw[neuron * stride : neuron * stride + row_nbytes])
            struct.pack_into("<I", checksums, 4 * neuron, google_crc32c.value(row))
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, struct.error):
            return
        entry.payload, sums.payload = bytes(raw[: len(entry.payload)]), bytes(checksums)

    def compress(self, rng: random.Random, entries: list[Entry]) -> None:
        """Compress a raw tensor, and often damage the frame or put another behind it."""
        entry = _some(rng, entries, lambda e: e.is_document and b'"kind":"tensor"' in e.payload)
        document = parsed(entry) if entry else None
        payload = self._chunk(entries, entry.key, document) if entry else None
        if entry is None or payload is None:
            return
        codecs = document.get("codecs")
        if not isinstance(codecs, list):
            return
        if len(codecs) == 1:
            codec = rng.choice(_CODECS)
            payload.payload = bytes(codec.encode(np.frombuffer(payload.payload, np.uint8)))
            codecs.append(
                {"name": "zstd", "configuration": {"level": 3}}
                if isinstance(codec, Zstd)
                else {"name": "blosc", "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "shuffle"}}
            )
            entry.payload = dumped(document)
        frame = payload.payload
        behind = rng.choice((_EMPTY_ZSTD, _SKIPPABLE, frame[:4], b"\0", frame))
        change = rng.randrange(6)
        if change == 0:
            payload.payload = frame + behind
        elif change == 1:
            payload.payload = _SKIPPABLE + frame
        elif change == 2 and frame:
            head = damage(rng, frame[:24])
            payload.payload = (head + frame[24:])[: max(len(frame), 24)]
        elif change == 3:
            payload.payload = damage(rng, frame)

    def state_size(self, rng: random.Random, entries: list[Entry]) -> None:
        """An extension tensor whose frame states (and whose shape has) far more than it holds."""
        n = rng.choice((1 << 16, 1 << 20, 1 << 24, 1 << 27, 1 << 31))
        shape = [n] if rng.random() < 0.5 else [n, rng.choice((1, 2, 1 << 10, 1 << 31))]
        nbytes = n * (shape[1] if len(shape) > 1 else 1)
        blocks = rng.choice((0, 1, 8, 512, 4096))
        if rng.random() < 0.7:
            name = "zstd"
            body = b"".join(struct.pack("<I", (size << 3) | 2)[:3] + b"\0" for size in [131072] * blocks)
            frame = bytes.fromhex("28b52ffd e0") + struct.pack("<Q", nbytes % (1 << 64)) + body + b"\x01\0\0"
        else:
            name = "blosc"
            block = rng.choice((64, 1 << 16, min(nbytes, (1 << 31) - 1)))
            body = struct.pack("<I", 20) * (blocks + 1)
            frame = struct.pack(
                "<BBBBIII", 2, 1, rng.choice((0, 1, 2, 0x21)), 1, nbytes % (1 << 32), block, 16 + len(body)
            )
            frame += body
        self._extension(entries, "u8", shape, frame, name)

    def extend(self, rng: random.Random, entries: list[Entry]) -> None:
        """An extension tensor of any type and shape whose payload fits."""
        encoding = rng.choice(sorted(self.dtypes))
        shape = [rng.choice((1, 1, 2, 3, 64)) for _ in range(rng.randint(1, 8))]
        if encoding in ("q8", "q4"):
            shape = [rng.randint(1, 4), rng.choice((64, 64, 128, 2112))]
            scales = 64 if encoding == "q8" else -(-shape[1] // 1024) * 64
            values = shape[1] if encoding == "q8" else shape[1] // 2
            storage = [shape[0], scales + -(-values // 64) * 64]
        else:
            storage = shape
        itemsize = np.dtype(self.dtypes[encoding]).itemsize
        n = int(np.prod(storage)) * itemsize
        if n <= 1 << 16:
            payload = bytes(n) if rng.random() < 0.5 else rng.randbytes(n)
            self._extension(entries, encoding, shape, payload, None, storage)

    def rearrange(self, rng: random.Random, entries: list[Entry]) -> None:
        """Drop, repeat, rename, exchange or move entries, or align them otherwise."""
        index = rng.randrange(len(entries))
        entry = entries[index]
        change = rng.randrange(8)
        if change == 0:
            entries.pop(index) if len(entries) > 1 else None
        elif change == 1:
            entries.insert(rng.randrange(len(entries)), copy.copy(entry))
        elif change == 2:
            names = (
                damage(rng, entry.key.encode()).decode("latin-1"),
                entry.key + "/x",
                "../x",
                "a/zarr.json",
                "x" * 1025,
            )
            entry.key = rng.choice((*names, "zarr.json/zarr.json", "layers/0/ffn", rng.choice(entries).key))
            entry.key = entry.key.encode("utf-8", "replace").decode("utf-8")
        elif change == 3:
            other = rng.choice(entries)
            entry.payload, other.payload = other.payload, entry.payload
        elif change == 4:
            entries.insert(rng.randrange(len(entries)), entries.pop(index))
        elif change == 5:
            entry.alignment = rng.choice((1, 2, 32, 64, 4096, 16384, 32768))
        elif change == 6:
            prefix = rng.choice(("extensions", "x", "layers/0", "files", "c"))
            group = b'{"zarr_format":3,"node_type":"group","attributes":{}}'
            entries.insert(1, Entry(f"{prefix}/{rng.choice('abc')}/zarr.json", group, 64))
        else:
            entries.append(Entry(rng.choice(("x", "extensions/x/c/0", "files/a/c/0", "zarr")), entry.payload, 64))

    def _extension(
        self,
        entries: list[Entry],
        encoding: str,
        shape: list[int],
        payload: bytes,
        codec: str | None,
        storage: Any = None,
    ) -> None:
        name = f"extensions/f{len(entries)}"
        ours = {"kind": "tensor", "encoding": encoding, "shape": shape, "crc32c": "00000000"}
        document = self.array_document(storage or shape, self.dtypes[encoding], ours)
        if codec == "zstd":
            document["codecs"].append({"name": "zstd", "configuration": {"level": 0, "checksum": False}})
        elif codec == "blosc":
            configuration = {"cname": "lz4", "clevel": 5, "shuffle": "noshuffle", "typesize": 1, "blocksize": 0}
            document["codecs"].append({"name": "blosc", "configuration": configuration})
        keys = {entry.key for entry in entries}
        if "extensions/zarr.json" not in keys:
            entries.append(Entry("extensions/zarr.json", b'{"zarr_format":3,"node_type":"group"}', 64))
        entries.append(Entry(f"{name}/zarr.json", dumped(document), 64))
        entries.append(Entry(f"{name}/c" + "/0" * len(document["shape"]), payload, 64))
        entries.sort(key=lambda e: (0, e.key.count("/"), e.key) if e.is_document else (1, 0, ""))

    def _chunk(self, entries: list[Entry], key: str, document: Any) -> Entry | None:
        try:
            chunk = key.removesuffix("/zarr.json") + "/c" + "/0" * len(document["shape"])
        except (KeyError, TypeError):
            return None
        return next((entry for entry in entries if entry.key == chunk), None)


_MUTATIONS = (
    [
        Mutator.change_document, Mutator.change_text, Mutator.change_number, Mutator.change_payload,
        Mutator.change_index, Mutator.change_bundle, Mutator.compress, Mutator.state_size, Mutator.extend,
        Mutator.rearrange,
    ],
    [6, 3, 3, 4, 2, 2, 4, 1, 2, 2],
)  # fmt: skip


def unpack(raw: bytes) -> list[Entry]:
    """Entries of a file by its central directory, forgiving; empty where that cannot be followed."""
    entries: list[Entry] = []
    try:
        n, _, at = struct.unpack_from("<QQQ", raw, len(raw) - 98 + 32)
        for _ in range(min(n, 4096)):
            n_name, n_extra = struct.unpack_from("<HH", raw, at + 28)
            key = raw[at + 46 : at + 46 + n_name].decode("ascii")
            nbytes, _, local = struct.unpack_from("<QQQ", raw, at + 46 + n_name + 4)
            n_local_name, n_local_extra = struct.unpack_from("<HH", raw, local + 26)
            start = local + 30 + n_local_name + n_local_extra
            alignment = 16384 if key.endswith("bundles/c/0/0/0") else 64
            entries.append(Entry(key, raw[start : start + min(nbytes, len(raw))], alignment))
            at += 46 + n_name + n_extra
    except (struct.error, UnicodeDecodeError, OverflowError):
        return []
    return entries


def parsed(entry: Entry) -> Any:
    """The JSON of a document, or None."""
    try:
        document = json.loads(entry.payload)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def dumped(document: Any) -> bytes:
    """Compact JSON."""
    return json.dumps(document, separators=(",", ":")).encode()


def damage(rng: random.Random, raw: bytes) -> bytes:
    """A copy with bytes changed, cut, repeated or inserted."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(out) + 1)
        change = rng.randrange(7)
        if change == 0:
            del out[at : at + rng.choice((1, 2, 16, 1 << 20))]
        elif change == 1:
            out[at:at] = rng.randbytes(rng.choice((1, 2, 16)))
        elif change == 2:
            out[at:at] = out[at : at + rng.choice((1, 16, 64))]
        elif at < len(out):
            out[at] = rng.choice((out[at] ^ 1 << rng.randrange(8), 0, 255, rng.randrange(256)))
    return bytes(out)


def change_tree(rng: random.Random, document: dict[str, Any]) -> None:
    """Change one place of parsed JSON."""
    places = [(holder, key) for holder in _containers(document) for key in _keys(holder)]
    if not places:
        return
    holder, key = rng.choice(places)
    old = holder[key]
    change = rng.randrange(10)
    if rng.random() < 0.1 and isinstance(holder, dict):
        absent = rng.choice(sorted(PLAUSIBLE))
        holder[absent] = rng.choice(PLAUSIBLE[absent])
    elif key in PLAUSIBLE and rng.random() < 0.4:
        holder[key] = rng.choice(PLAUSIBLE[key])
    elif change <= 2 and isinstance(old, int | float):
        holder[key] = _integer(rng, int(old))
    elif change <= 4:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    elif change == 5:
        other, other_key = rng.choice(places)
        holder[key] = copy.deepcopy(other[other_key])
    elif change == 6:
        del holder[key]
    elif change == 7 and isinstance(holder, list):
        holder[key:key] = [copy.deepcopy(old)] * rng.choice((1, 2, 9, 100))
    elif change == 8 and isinstance(holder, dict):
        holder[rng.choice(("", "x", "flashfmt", "shape", "é", str(key) + "_"))] = copy.deepcopy(old)
    else:
        holder[key] = rng.choice(INTEGERS)


def _containers(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [value, *(c for member in value.values() for c in _containers(member))]
    if isinstance(value, list):
        return [value, *(c for member in value for c in _containers(member))]
    return []


def _keys(holder: Any) -> list[Any]:
    return list(holder) if isinstance(holder, dict) else list(range(len(holder)))


def _integer(rng: random.Random, old: int) -> int:
    near = (old - 1, old + 1, 2 * old, old // 2, old + 64, -old, old ^ (1 << rng.randrange(63)))
    return rng.choice(near) if rng.random() < 0.5 else rng.choice(INTEGERS)


def _document(rng: random.Random, entries: list[Entry], root_share: float) -> Any:
    """A document: the root with the given probability."""
    root = rng.random() < root_share
    return _some(rng, entries, lambda e: e.is_document and (e.key == "zarr.json") == root)


def _some(rng: random.Random, entries: list[Entry], wanted: Callable[[Entry], bool]) -> Any:
    found = [entry for entry in entries if wanted(entry)]
    return rng.choice(found) if found else None


def patch_records(rng: random.Random, z: Any) -> None:
    """Change a field of a ZIP record, sometimes in both places that state it."""
    fields = [(z.end64, form) for form in _END_FIELDS]
    key = rng.choice(list(z.central))
    if rng.random() < 0.4:
        at, (offset, form) = rng.choice(fields)
        _patch(rng, z, at + offset, form)
        return
    n_name = len(key.encode())
    central, local = z.central[key], z.local[key]
    if rng.random() < 0.3:
        value = rng.choice((*INTEGERS, (1 << 63) + local, (1 << 64) - 64)) % (1 << 64)
        for at in rng.choice(((50,), (50, 58), (66,), (50, 58, 66))):
            z.patch(central + n_name + at, "Q", value)
        if rng.random() < 0.7:
            z.patch(local + n_name + 34, "Q", value)
            z.patch(local + n_name + 42, "Q", value)
        return
    records = [
        (central, _CENTRAL_FIELDS),
        (central + n_name, _CENTRAL_EXTRA),
        (local, _LOCAL_FIELDS),
        (local + n_name, _LOCAL_EXTRA),
    ]
    base, choices = rng.choice(records)
    offset, form = rng.choice(choices)
    _patch(rng, z, base + offset, form)


def _patch(rng: random.Random, z: Any, at: int, form: str) -> None:
    (old,) = struct.unpack_from("<" + form, z.data, at)
    z.patch(at, form, _integer(rng, old) % (1 << 8 * struct.calcsize(form)))


_END_FIELDS = [
    (0, "I"), (4, "Q"), (12, "H"), (14, "H"), (16, "I"), (20, "I"), (24, "Q"), (32, "Q"), (40, "Q"), (48, "Q"),
    (56, "I"), (60, "I"), (64, "Q"), (72, "I"), (76, "I"), (80, "H"), (82, "H"), (84, "H"), (86, "H"), (88, "I"),
    (92, "I"), (96, "H"),
]  # fmt: skip
_CENTRAL_FIELDS = [(0, "I"), *((at, "H") for at in range(4, 16, 2)), (16, "I"), (20, "I"), (24, "I")]
_CENTRAL_FIELDS += [(28, "H"), (30, "H"), (32, "H"), (34, "H"), (36, "H"), (38, "I"), (42, "I")]
_CENTRAL_EXTRA = [(46, "H"), (48, "H"), (50, "Q"), (58, "Q"), (66, "Q")]
_LOCAL_FIELDS = [
    (0, "I"),
    *((at, "H") for at in range(4, 14, 2)),
    (14, "I"),
    (18, "I"),
    (22, "I"),
    (26, "H"),
    (28, "H"),
]
_LOCAL_EXTRA = [(30, "H"), (32, "H"), (34, "Q"), (42, "Q"), (50, "H"), (52, "H"), (54, "H")]
