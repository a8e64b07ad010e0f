"""Structure-aware damage to a `.flash` file: a pure function from random numbers and bytes to bytes.

A mutation takes a file apart into keys, changes documents, payloads or the order of entries, puts it together again
with (mostly) matching checksums, so that the change is met by the code that is meant to meet it, and then may patch
a field of a ZIP record. Files that cannot be taken apart are damaged as bytes.

Knows: the containers' records, JSON, where checksums are. Does not know: what the reader makes of it.
"""

from __future__ import annotations

import copy
import hashlib
import math
import random
import re
import struct
from collections.abc import Callable
from types import ModuleType
from typing import Any

import google_crc32c
import numpy as np
from entries import Entry, dumped, parsed, unpack
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd
from odd_values import SNIPPETS, change_tree, damage, integer
from zip_records import patch_records

MAX_INPUT_BYTES = 1 << 20
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
        if rng.random() < 0.05:
            entry.payload = rng.choice(SNIPPETS).encode()
            return
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
            new = integer(rng, old)
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
        struct.pack_into("<Q", raw, at, integer(rng, old) % (1 << 64))
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

    def move(self, rng: random.Random, entries: list[Entry]) -> None:
        """Give a node another name, with all that is below it: only the name is wrong."""
        entry = _document(rng, entries, 0)
        if entry is not None:
            old = entry.key.removesuffix("/zarr.json")
            new = rng.choice(
                (old + "x", "files/9x", "files/" + "a" * 65, "files/a/b", "extensions/x", "layers/01/x", "x")
            )
            for other in entries:
                if other.key.startswith(old + "/"):
                    other.key = new + other.key[len(old) :]

    def retype(self, rng: random.Random, entries: list[Entry]) -> None:
        """Store a tensor in another encoding, right in itself."""
        entry = _some(rng, entries, lambda e: e.is_document and b'"kind":"tensor"' in e.payload)
        document = parsed(entry) if entry else None
        payload = self._chunk(entries, entry.key, document) if entry else None
        try:
            shape = document["attributes"]["flashfmt"]["shape"]
            encoding = rng.choice(("f32", "f16", "bf16", "u8", "u32"))
            ours = {"kind": "tensor", "encoding": encoding, "shape": shape, "crc32c": "00000000"}
            n = math.prod(size for size in shape if isinstance(size, int))
            nbytes = min(max(n * np.dtype(self.dtypes[encoding]).itemsize, 0), 1 << 17)
            payload.payload = payload.payload[:nbytes].ljust(nbytes, b"\0")
        except (KeyError, TypeError, AttributeError):
            return
        entry.payload = dumped(self.array_document(shape, self.dtypes[encoding], ours))

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
        Mutator.rearrange, Mutator.move, Mutator.retype,
    ],
    [6, 3, 3, 4, 2, 2, 4, 1, 2, 2, 1, 1],
)  # fmt: skip


def _document(rng: random.Random, entries: list[Entry], root_share: float) -> Any:
    """A document: the root with the given probability."""
    root = rng.random() < root_share
    return _some(rng, entries, lambda e: e.is_document and (e.key == "zarr.json") == root)


def _some(rng: random.Random, entries: list[Entry], wanted: Callable[[Entry], bool]) -> Any:
    found = [entry for entry in entries if wanted(entry)]
    return rng.choice(found) if found else None
