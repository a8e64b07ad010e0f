"""A model as documents and payloads, sealed with its checksums, and as a file or a directory.

Knows: the Zarr profile. Does not know: decoders, what a case plants.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from generator.checksums import crc32c, hex32
from generator.encodings import DATA_TYPE, QUANTISED, STORAGE, round_up, row_nbytes
from generator.zip_file import ZipEntry, ZipFile

Json = dict[str, Any]
FIELD = b'"metadata_crc32c":"'
GRID = {"name": "default", "configuration": {"separator": "/"}}
ZSTD = {"name": "zstd", "configuration": {"level": 3, "checksum": False}}
BLOSC = {
    "name": "blosc",
    "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "shuffle", "typesize": 4, "blocksize": 0},
}


@dataclass
class Hierarchy:
    """Documents by node name (the root is ""), payloads by key. `edits` change the text of documents, by key."""

    documents: dict[str, Json] = field(default_factory=dict)
    payloads: dict[str, bytes] = field(default_factory=dict)
    edits: dict[str, Callable[[bytes], bytes]] = field(default_factory=dict)
    crc_mask: int = 0

    def copy(self) -> Hierarchy:
        """An independent copy."""
        return copy.deepcopy(self)

    @property
    def manifest(self) -> Json:
        """The manifest of the root document."""
        manifest: Json = self.documents[""]["attributes"]["flashfmt"]
        return manifest

    def attributes(self, name: str) -> Json:
        """Attributes of an array under the key flashfmt."""
        attributes: Json = self.documents[name]["attributes"]["flashfmt"]
        return attributes

    def key(self, name: str) -> str:
        """Key of an array's chunk."""
        return chunk_key(name, len(self.documents[name]["shape"]))

    def add(self, name: str, document: Json, payload: bytes) -> None:
        """Add an array and the groups above it."""
        self.add_groups(name)
        self.documents[name] = document
        self.payloads[self.key(name)] = payload

    def add_groups(self, name: str) -> None:
        """Add the groups above a node."""
        segments = name.split("/")
        for depth in range(1, len(segments)):
            self.documents.setdefault("/".join(segments[:depth]), group())

    def tensor(self, name: str, encoding: str, shape: tuple[int, ...], stored: npt.NDArray[Any]) -> None:
        """Add an uncompressed tensor from its storage form."""
        self.add(name, tensor_document(encoding, shape, stored.tobytes()), stored.tobytes())

    def reseal(self, name: str) -> None:
        """State the CRC-32C of an array's payload as it is now."""
        self.attributes(name)["crc32c"] = hex32(crc32c(self.payloads[self.key(name)]))

    def replace(self, name: str, payload: bytes) -> None:
        """Change an array's payload and the checksum of it."""
        self.payloads[self.key(name)] = payload
        self.reseal(name)

    def texts(self) -> dict[str, bytes]:
        """Every document by key, in file order, with the root's checksum in place."""
        names = sorted(self.documents, key=lambda name: (document_key(name).count("/"), document_key(name)))
        texts = {}
        for name in names:
            key = document_key(name)
            text = encode_json(self.documents[name])
            texts[key] = self.edits[key](text) if key in self.edits else text
        at = texts["zarr.json"].find(FIELD) + len(FIELD)
        if at >= len(FIELD) and "zarr.json" in texts:
            crc = 0
            for key in sorted(texts.keys() - {"zarr.json"}):
                crc = crc32c(texts[key], crc)
            root = texts["zarr.json"]
            crc = crc32c(root[:at] + b"00000000" + root[at + 8 :], crc) ^ self.crc_mask
            texts["zarr.json"] = root[:at] + hex32(crc).encode() + root[at + 8 :]
        return texts

    def keys(self) -> dict[str, bytes]:
        """Every key with its bytes, in file order: documents, small payloads, bundles."""
        bundles = set(self._bundle_keys())
        payloads = sorted(self.payloads, key=lambda key: (key in bundles, key))
        return self.texts() | {key: self.payloads[key] for key in payloads}

    def zip_file(self) -> ZipFile:
        """The hierarchy as one file."""
        bundles = self._bundle_keys()
        return ZipFile([ZipEntry(key.encode(), data, bundles.get(key, 64)) for key, data in self.keys().items()])

    def write_directory(self, path: Path) -> None:
        """The hierarchy as a directory."""
        for key, data in self.keys().items():
            target = path / key
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)

    def _bundle_keys(self) -> dict[str, int]:
        found = {}
        for name, document in self.documents.items():
            attributes = document.get("attributes")
            ours = attributes.get("flashfmt", {}) if isinstance(attributes, dict) else {}
            if name and isinstance(ours, dict) and ours.get("kind") == "bundles":
                alignment = ours.get("alignment", 64)
                power = isinstance(alignment, int) and alignment > 0 and alignment & (alignment - 1) == 0
                found[self.key(name)] = max(16384, alignment if power and alignment <= 32768 else 64)
        return found


def encode_json(document: object) -> bytes:
    """A document as writers write it."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=True).encode()


def document_key(name: str) -> str:
    """Key of a node's document."""
    return f"{name}/zarr.json" if name else "zarr.json"


def chunk_key(name: str, n_dimensions: int) -> str:
    """Key of an array's only chunk."""
    return f"{name}/c" + "/0" * n_dimensions


def group() -> Json:
    """A group document."""
    return {"zarr_format": 3, "node_type": "group", "attributes": {}}


def bytes_codec(encoding: str) -> Json:
    """The codec `bytes` for an encoding."""
    single = np.dtype(STORAGE[encoding]).itemsize == 1
    return {"name": "bytes"} if single else {"name": "bytes", "configuration": {"endian": "little"}}


def array_document(shape: tuple[int, ...], data_type: str, codecs: list[Json], attributes: Json) -> Json:
    """An array document of the profile."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shape)}},
        "chunk_key_encoding": copy.deepcopy(GRID),
        "fill_value": 0,
        "codecs": codecs,
        "attributes": {"flashfmt": attributes},
    }


def storage_shape(encoding: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the Zarr array that stores a tensor."""
    return (shape[0], row_nbytes(encoding, shape[1])) if encoding in QUANTISED else shape


def tensor_document(encoding: str, shape: tuple[int, ...], payload: bytes, compressor: Json | None = None) -> Json:
    """Document of a tensor."""
    attributes = {"kind": "tensor", "encoding": encoding, "shape": list(shape), "crc32c": hex32(crc32c(payload))}
    codecs = [bytes_codec(encoding)] + ([copy.deepcopy(compressor)] if compressor else [])
    return array_document(storage_shape(encoding, shape), DATA_TYPE[encoding], codecs, attributes)


def file_document(filename: str, content: bytes, sha256: str) -> Json:
    """Document of an embedded file."""
    attributes = {"kind": "file", "filename": filename, "sha256": sha256, "crc32c": hex32(crc32c(content))}
    return array_document((len(content),), "uint8", [{"name": "bytes"}], attributes)


@dataclass(frozen=True)
class Geometry:
    """Sizes of a bundles array."""

    encoding: str
    parts: tuple[str, ...]
    n_neurons: int
    d_model: int
    alignment: int

    @property
    def part_nbytes(self) -> int:
        """Bytes of one part."""
        return row_nbytes(self.encoding, self.d_model)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one bundle."""
        return len(self.parts) * self.part_nbytes

    @property
    def stride(self) -> int:
        """Distance of bundles."""
        return round_up(self.row_nbytes, self.alignment)


def shard_index(entries: list[tuple[int, int]]) -> bytes:
    """Index of a shard with its checksum."""
    raw = b"".join(offset.to_bytes(8, "little") + nbytes.to_bytes(8, "little") for offset, nbytes in entries)
    return raw + crc32c(raw).to_bytes(4, "little")


def bundles_payload(rows: list[bytes], geometry: Geometry) -> bytes:
    """Strides and index."""
    strides = b"".join(row.ljust(geometry.stride, b"\0") for row in rows)
    return strides + shard_index([(i * geometry.stride, geometry.row_nbytes) for i in range(len(rows))])


def bundles_document(g: Geometry, payload: bytes) -> Json:
    """Document of a bundles array."""
    item = np.dtype(STORAGE[g.encoding]).itemsize
    shape = (g.n_neurons, len(g.parts), g.part_nbytes // item)
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [1, *shape[1:]],
            "codecs": [bytes_codec(g.encoding)],
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "index_location": "end",
        },
    }
    attributes = {
        "kind": "bundles",
        "encoding": g.encoding,
        "parts": list(g.parts),
        "n_neurons": g.n_neurons,
        "d_model": g.d_model,
        "part_nbytes": g.part_nbytes,
        "row_nbytes": g.row_nbytes,
        "stride": g.stride,
        "alignment": g.alignment,
        "crc32c": hex32(crc32c(payload)),
    }
    return array_document(shape, DATA_TYPE[g.encoding], [sharding], attributes)


def nbytes_of(document: Mapping[str, Any]) -> int:
    """Bytes of an array's values."""
    return prod(document["shape"]) * np.dtype(document["data_type"]).itemsize
