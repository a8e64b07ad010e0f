"""The `zarr.json` documents of a model, rendered (SPEC.md sections "Hierarchy" and "Arrays").

Documents are rendered twice: before the payloads with checksums of zero, for their sizes, and at the end with the
real ones. Checksums have a fixed width, so both have the same size.

Knows: the form of documents. Does not know: where they are stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from flashfmt.compression import BLOSC_LEVEL, BLOSC_NAME, ZSTD_LEVEL
from flashfmt.container import DOCUMENT_NAME, document_order
from flashfmt.encodings import Encoding
from flashfmt.manifest import Manifest
from flashfmt.specs import BundlesSpec, FileSpec, TensorSpec
from flashfmt.validate import CHECKSUM_FIELD, metadata_checksum
from flashfmt.zarr_metadata import DATA_TYPES

Spec = TensorSpec | BundlesSpec | FileSpec
Document = dict[str, Any]

ATTRIBUTES_KEY: Final = "flashfmt"
CONVENTION: Final = {
    "uuid": "5bd0f6f5-2a3c-4f2b-9d7e-6b1f0c8e4a57",
    "name": "flashfmt",
    "description": "A language model laid out to be run from flash: one record per neuron, aligned and checksummed",
}


def render_documents(manifest: Manifest, specs: Iterable[Spec], checksums: Mapping[str, int]) -> dict[str, bytes]:
    """Every document of a model, sealed with the checksum of all of them.

    Parameters
    ----------
    checksums : CRC-32C of each array's payload, by array name; 0 is stated for those it lacks.

    Returns
    -------
    Key to bytes, in the order in which a container holds them.
    """
    documents: dict[str, Document] = {}
    for spec in specs:
        documents[f"{spec.name}/{DOCUMENT_NAME}"] = _array(spec, f"{checksums.get(spec.name, 0):08x}")
        for parent in _ancestors(spec.name):
            documents[f"{parent}/{DOCUMENT_NAME}"] = _group({})
    unsealed = msgspec.structs.replace(manifest, metadata_crc32c="00000000")
    attributes = {ATTRIBUTES_KEY: msgspec.to_builtins(unsealed), "zarr_conventions": [CONVENTION]}
    documents[DOCUMENT_NAME] = _group(attributes)
    rendered = {key: _render(documents[key]) for key in sorted(documents, key=document_order)}
    rendered[DOCUMENT_NAME] = _seal(rendered)
    return rendered


def _seal(documents: Mapping[str, bytes]) -> bytes:
    """The root document with the checksum of all documents in its field."""
    root = documents[DOCUMENT_NAME]
    digits = root.index(CHECKSUM_FIELD) + len(CHECKSUM_FIELD)
    checksum = f"{metadata_checksum(documents):08x}".encode("ascii")
    return root[:digits] + checksum + root[digits + len(checksum) :]


def _render(document: Document) -> bytes:
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii")


def _ancestors(name: str) -> Iterable[str]:
    """Names of the groups above a node, the root excepted."""
    segments = name.split("/")
    return ("/".join(segments[:depth]) for depth in range(1, len(segments)))


def _group(attributes: Document) -> Document:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def _array(spec: Spec, crc32c: str) -> Document:
    attributes: Document
    if isinstance(spec, TensorSpec):
        attributes = {"kind": "tensor", "encoding": spec.encoding, "shape": list(spec.shape), "crc32c": crc32c}
        codecs = [_bytes_codec(spec.encoding), *_compressor(spec)]
        return _array_document(spec.storage_shape, spec.encoding, codecs, attributes)
    if isinstance(spec, FileSpec):
        attributes = {"kind": "file", "filename": spec.filename, "sha256": spec.sha256, "crc32c": crc32c}
        return _array_document((spec.nbytes,), Encoding.U8, [_bytes_codec(Encoding.U8)], attributes)
    geometry = spec.geometry
    attributes = {
        "kind": "bundles",
        "encoding": spec.encoding,
        "parts": list(spec.parts),
        "n_neurons": spec.n_neurons,
        "d_model": spec.d_model,
        "part_nbytes": spec.part.nbytes,
        "row_nbytes": geometry.row_nbytes,
        "stride": geometry.stride,
        "alignment": geometry.alignment,
        "crc32c": crc32c,
    }
    return _array_document(spec.storage_shape, spec.encoding, [_sharding(spec)], attributes)


def _array_document(shape: tuple[int, ...], encoding: Encoding, codecs: list[Document], ours: Document) -> Document:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": DATA_TYPES[encoding],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": codecs,
        "attributes": {ATTRIBUTES_KEY: ours},
    }


def _bytes_codec(encoding: Encoding) -> Document:
    if encoding.storage_dtype.itemsize == 1:
        return {"name": "bytes"}
    return {"name": "bytes", "configuration": {"endian": "little"}}


def _compressor(spec: TensorSpec) -> list[Document]:
    if spec.codec == "raw":
        return []
    if spec.codec == "zstd":
        return [{"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}]
    configuration = {
        "cname": BLOSC_NAME,
        "clevel": BLOSC_LEVEL,
        "shuffle": "shuffle",
        "typesize": spec.encoding.storage_dtype.itemsize,
        "blocksize": 0,
    }
    return [{"name": "blosc", "configuration": configuration}]


def _sharding(spec: BundlesSpec) -> Document:
    _, *inner = spec.storage_shape
    configuration = {
        "chunk_shape": [1, *inner],
        "codecs": [_bytes_codec(spec.encoding)],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {"name": "sharding_indexed", "configuration": configuration}
