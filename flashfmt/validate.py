"""Structure of a flash model: documents, arrays and manifest must agree (SPEC.md, all rules not marked *verify*).

Reads the documents and nothing else, so that opening costs the same for every size of model.

Knows: all rules that metadata can break. Does not know: the values in payloads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Final, NoReturn

import google_crc32c

from flashfmt.container import DOCUMENT_NAME, Container, Extent, is_document, read_bytes
from flashfmt.encodings import Encoding, part_layout
from flashfmt.errors import ChecksumError, FlashFormatError
from flashfmt.json_document import parse_document
from flashfmt.layout import (
    BUNDLES_FILE_ALIGNMENT,
    MAX_ALIGNMENT,
    MAX_DIMENSION,
    MAX_EMBEDDED_FILE_BYTES,
    MAX_METADATA_BYTES,
    MAX_NEURONS,
    MAX_ROW_BYTES,
    MIN_ALIGNMENT,
    BundleGeometry,
)
from flashfmt.manifest import ArrayRule, Manifest, bundles_name, required_arrays
from flashfmt.manifest_rules import check_version, manifest_object, read_manifest
from flashfmt.tensor import BundlesInfo, Compression, FileInfo, TensorInfo
from flashfmt.zarr_metadata import (
    DATA_TYPES,
    INDEX_CODECS,
    SINGLE_BYTES,
    VALUES,
    ArrayDocument,
    BundlesAttributes,
    Codec,
    FileAttributes,
    GroupDocument,
    ShardingCodec,
    TensorAttributes,
    ZstdCodec,
    chunk_key,
    parse_node,
)

EXTENSIONS: Final = "extensions/"
CHECKSUM_FIELD: Final = b'"metadata_crc32c":"'
_CHECKSUM_DIGITS: Final = 8
_FILE_KEY: Final = re.compile(r"files/([a-z][a-z0-9_]{0,63})")
_FILENAME: Final = re.compile(r"[ -.0-\[\]-~]{1,255}")  # printable ASCII without / and \


@dataclass(frozen=True, slots=True)
class Contents:
    """What a model holds, all of it checked against the manifest."""

    manifest: Manifest
    tensors: Mapping[str, TensorInfo]
    layers: tuple[BundlesInfo, ...]
    files: Mapping[str, FileInfo]


def read_contents(container: Container) -> Contents:
    """Read and check every document of a container.

    Raises
    ------
    FlashFormatError
        With the rule of SPEC.md that is broken.
    UnsupportedError
        For a major version or a required feature that this reader does not know.
    """
    return _Validator(container).contents()


def metadata_checksum(documents: Mapping[str, bytes]) -> int:
    """CRC-32C of all documents: the others in bytewise order of key, then the root with its own checksum as zeros.

    Raises
    ------
    ValueError
        If the root does not hold the field `metadata_crc32c` exactly once.
    """
    root = documents[DOCUMENT_NAME]
    if root.count(CHECKSUM_FIELD) != 1:
        raise ValueError(f"the root document holds {CHECKSUM_FIELD.decode()} {root.count(CHECKSUM_FIELD)} times")
    digits = root.index(CHECKSUM_FIELD) + len(CHECKSUM_FIELD)
    blanked = root[:digits] + b"0" * _CHECKSUM_DIGITS + root[digits + _CHECKSUM_DIGITS :]
    crc = 0
    for key in sorted(documents.keys() - {DOCUMENT_NAME}):
        crc = google_crc32c.extend(crc, documents[key])
    return int(google_crc32c.extend(crc, blanked))


class _Validator:
    """Checks one container, from the root document inwards."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.path: Path = container.path
        self.tensors: dict[str, TensorInfo] = {}
        self.bundles: dict[str, BundlesInfo] = {}
        self.files: dict[str, FileInfo] = {}

    def contents(self) -> Contents:
        """The documents in order of what an error in them would hide: version, damage, manifest, arrays."""
        raw = self._raw_documents()
        manifest = self._manifest(raw)
        nodes = self._nodes(raw)
        self._check_keys(nodes)
        for name, document in nodes.items():
            if isinstance(document, ArrayDocument):
                self._read_array(name, document, manifest)
        self._check_roles(manifest)
        layers = tuple(self.bundles[bundles_name(layer)] for layer in range(manifest.decoder.n_layers))
        return Contents(manifest, MappingProxyType(self.tensors), layers, MappingProxyType(self.files))

    def _manifest(self, raw: Mapping[str, bytes]) -> Manifest:
        """The manifest of the root document; the rest of the root is dropped, because a hostile one may be large."""
        root = parse_document(raw[DOCUMENT_NAME], path=self.path, where=DOCUMENT_NAME)
        if root.get("node_type") == "array":
            self._fail("FF-ARR-1", DOCUMENT_NAME, "the root is not a group", "group", "array")
        parse_node({**root, "attributes": {}}, path=self.path, key=DOCUMENT_NAME)
        members = manifest_object(root, self.path)
        check_version(members, self.path)
        self._check_metadata_checksum(raw, members.get("metadata_crc32c"))
        return read_manifest(members, self.path)

    def _raw_documents(self) -> dict[str, bytes]:
        raw: dict[str, bytes] = {}
        for key, extent in self.container.extents.items():
            if is_document(key):
                if extent.nbytes > MAX_METADATA_BYTES:
                    self._fail(
                        "FF-LIM-3", key, "a document is too large", f"at most {MAX_METADATA_BYTES}", extent.nbytes
                    )
                raw[key] = read_bytes(self.container, key)
        return raw

    def _check_metadata_checksum(self, raw: Mapping[str, bytes], stated: object) -> None:
        try:
            actual = f"{metadata_checksum(raw):08x}"
        except ValueError as error:
            raise FlashFormatError(str(error), path=self.path, where=DOCUMENT_NAME, rule="FF-SUM-2") from None
        if stated != actual:
            raise ChecksumError(
                "the metadata is damaged",
                path=self.path,
                where=DOCUMENT_NAME,
                rule="FF-SUM-1",
                expected=stated if isinstance(stated, str) else repr(stated),
                actual=actual,
            )
        if CHECKSUM_FIELD + actual.encode() not in raw[DOCUMENT_NAME]:
            message = "the field metadata_crc32c of the manifest is written in another way, or in another place"
            expected = f"{CHECKSUM_FIELD.decode()}{actual}"
            self._fail("FF-SUM-2", DOCUMENT_NAME, message, expected, "other digits there")

    def _nodes(self, raw: Mapping[str, bytes]) -> dict[str, ArrayDocument | GroupDocument]:
        """Typed document of every node but the root, by name."""
        nodes: dict[str, ArrayDocument | GroupDocument] = {}
        for key, text in raw.items():
            if key != DOCUMENT_NAME:
                document = parse_document(text, path=self.path, where=key)
                nodes[key.removesuffix("/" + DOCUMENT_NAME)] = parse_node(document, path=self.path, key=key)
        for name in nodes:
            parent = name.rpartition("/")[0]
            if DOCUMENT_NAME in name.split("/"):
                self._fail("FF-ARR-11", name, "a node has the name of a document", "another name", name)
            if parent and not isinstance(nodes.get(parent), GroupDocument):
                self._fail("FF-ARR-2", name, "a node outside a group", f"a group document {parent}/zarr.json", None)
        return nodes

    def _check_keys(self, nodes: Mapping[str, ArrayDocument | GroupDocument]) -> None:
        """Every array has its chunk, and every other key is such a chunk."""
        chunks = {chunk_key(name, len(node.shape)) for name, node in nodes.items() if isinstance(node, ArrayDocument)}
        for key in self.container.extents:
            if not is_document(key) and key not in chunks:
                self._fail("FF-ARR-11", key, "not a document and not the chunk of an array", "nothing", key)
        for key in chunks:
            if key not in self.container.extents:
                self._fail("FF-ARR-12", key, "an array without its chunk", key, "nothing")

    def _read_array(self, name: str, document: ArrayDocument, manifest: Manifest) -> None:
        if document.fill_value != 0:
            self._fail("FF-ARR-7", name, "the fill value is not 0", 0, document.fill_value)
        grid = document.chunk_grid.configuration.chunk_shape
        if grid != document.shape:
            self._fail("FF-ARR-5", name, "the chunk is not the whole array", document.shape, grid)
        names = document.dimension_names
        if names is not None and len(names) != len(document.shape):
            self._fail("FF-ARR-3", name, "dimension_names do not fit the shape", len(document.shape), len(names))
        if max(document.shape) > MAX_DIMENSION:
            self._fail("FF-LIM-7", name, "a dimension is too large", f"at most {MAX_DIMENSION}", max(document.shape))
        attributes = document.attributes.flashfmt
        extent = self.container.extents[chunk_key(name, len(document.shape))]
        if isinstance(attributes, TensorAttributes):
            self.tensors[name] = self._tensor(name, document, attributes, extent)
        elif name.startswith(EXTENSIONS):
            self._fail("FF-ARR-10", name, "an extension array is not a tensor", "tensor", "another kind")
        elif isinstance(attributes, FileAttributes):
            info = self._file(name, document, attributes, extent)
            self.files[info.role] = info
        else:
            self.bundles[name] = self._bundles(name, document, attributes, extent, manifest)

    def _tensor(self, name: str, document: ArrayDocument, attributes: TensorAttributes, extent: Extent) -> TensorInfo:
        encoding, shape = attributes.encoding, attributes.shape
        if encoding.is_quantised:
            if len(shape) != 2:
                self._fail("FF-TEN-1", name, f"a {encoding} tensor is not a matrix", "2 dimensions", len(shape))
            part_nbytes = self._part_nbytes("FF-TEN-1", name, encoding, shape[1])
            if part_nbytes > MAX_ROW_BYTES:
                self._fail("FF-LIM-6", name, "rows are too large", f"at most {MAX_ROW_BYTES}", part_nbytes)
            expected: tuple[int, ...] = (shape[0], part_nbytes)
        else:
            expected = shape
        if document.shape != expected:
            self._fail(
                "FF-TEN-1", name, "the storage shape does not follow from the logical one", expected, document.shape
            )
        self._check_data_type(name, document, encoding)
        values, *compressors = document.codecs
        if values != _values_codec(encoding) or any(isinstance(codec, ShardingCodec) for codec in compressors):
            self._fail_codecs(name, document, "[bytes], [bytes, zstd] or [bytes, blosc]")
        compression: Compression = "raw"
        if compressors:
            compression = "zstd" if isinstance(compressors[0], ZstdCodec) else "blosc"
            if compressors[0] in (SINGLE_BYTES, VALUES):
                self._fail_codecs(name, document, "[bytes], [bytes, zstd] or [bytes, blosc]")
        nbytes = prod(document.shape) * encoding.storage_dtype.itemsize
        if compression == "raw" and extent.nbytes != nbytes:
            self._fail("FF-TEN-2", name, "the payload does not fit the shape", f"{nbytes} bytes", extent.nbytes)
        self._check_aligned(name, extent, 1)
        return TensorInfo(name, encoding, shape, document.shape, extent, compression, int(attributes.crc32c, 16))

    def _file(self, name: str, document: ArrayDocument, attributes: FileAttributes, extent: Extent) -> FileInfo:
        match = _FILE_KEY.fullmatch(name)
        if match is None or len(document.shape) != 1:
            self._fail("FF-FILE-1", name, "not an embedded file", "files/{role}, one dimension", document.shape)
        filename = attributes.filename
        if not _FILENAME.fullmatch(filename) or filename in (".", ".."):
            self._fail("FF-FILE-2", name, "not a plain file name", "printable ASCII", ascii(filename[:80]))
        self._check_data_type(name, document, Encoding.U8)
        if document.codecs != (SINGLE_BYTES,):
            self._fail_codecs(name, document, "[bytes]")
        if document.shape[0] > MAX_EMBEDDED_FILE_BYTES:
            self._fail("FF-LIM-8", name, "an embedded file is too large", MAX_EMBEDDED_FILE_BYTES, document.shape[0])
        if extent.nbytes != document.shape[0]:
            self._fail("FF-TEN-2", name, "the payload does not fit the shape", document.shape[0], extent.nbytes)
        return FileInfo(match[1], filename, extent, attributes.sha256, int(attributes.crc32c, 16))

    def _bundles(
        self, name: str, document: ArrayDocument, a: BundlesAttributes, extent: Extent, manifest: Manifest
    ) -> BundlesInfo:
        layer = self._layer_of(name, manifest)
        d = manifest.decoder
        if a.n_neurons > MAX_NEURONS:
            self._fail("FF-LIM-5", name, "too many neurons", f"at most {MAX_NEURONS}", a.n_neurons)
        if max(a.row_nbytes, a.stride) > MAX_ROW_BYTES:
            self._fail("FF-LIM-6", name, "bundles are too large", f"at most {MAX_ROW_BYTES}", (a.row_nbytes, a.stride))
        found, wanted = (a.parts, a.n_neurons, a.d_model), (d.ffn.parts, d.ffn.d_ff, d.d_model)
        if found != wanted:
            self._fail("FF-BND-1", name, "bundles do not fit the decoder", wanted, found)
        if not a.encoding.is_weight:
            self._fail("FF-BND-2", name, "bundles of integers", "a weight encoding", a.encoding)
        part_nbytes = self._part_nbytes("FF-BND-2", name, a.encoding, a.d_model)
        sizes = (part_nbytes, part_nbytes * len(a.parts))
        if (a.part_nbytes, a.row_nbytes) != sizes:
            self._fail("FF-BND-3", name, "wrong size of part or row", sizes, (a.part_nbytes, a.row_nbytes))
        if not MIN_ALIGNMENT <= a.alignment <= MAX_ALIGNMENT or a.alignment.bit_count() != 1:
            self._fail("FF-ALIGN-4", name, "not an alignment", "a power of two, 64 to 32768", a.alignment)
        if a.stride % a.alignment:
            self._fail("FF-ALIGN-5", name, "the stride is not aligned", f"a multiple of {a.alignment}", a.stride)
        if a.stride < a.row_nbytes:
            self._fail("FF-BND-6", name, "bundles overlap", f"a stride of at least {a.row_nbytes}", a.stride)
        part = part_layout(a.encoding, a.d_model)
        shape = (a.n_neurons, len(a.parts), part.storage_length)
        if document.shape != shape:
            self._fail("FF-BND-4", name, "the storage shape does not follow from the attributes", shape, document.shape)
        self._check_data_type(name, document, a.encoding)
        self._check_sharding(name, document, a.encoding)
        geometry = BundleGeometry(a.n_neurons, a.row_nbytes, a.stride, a.alignment)
        if extent.nbytes != geometry.payload_nbytes:
            self._fail(
                "FF-BND-7", name, "the payload does not fit the geometry", geometry.payload_nbytes, extent.nbytes
            )
        self._check_aligned(name, extent, max(BUNDLES_FILE_ALIGNMENT, a.alignment))
        crc32c = int(a.crc32c, 16)
        return BundlesInfo(name, layer, a.encoding, a.parts, a.d_model, part, geometry, extent, crc32c)

    def _layer_of(self, name: str, manifest: Manifest) -> int:
        segments = name.split("/")
        layer = int(segments[1]) if len(segments) == 4 and segments[1].isdecimal() and len(segments[1]) < 6 else -1
        if not 0 <= layer < manifest.decoder.n_layers or name != bundles_name(layer):
            self._fail("FF-MAN-10", name, "the manifest calls for no bundles of this name", "nothing", name)
        return layer

    def _check_sharding(self, name: str, document: ArrayDocument, encoding: Encoding) -> None:
        codec = document.codecs[0]
        if len(document.codecs) != 1 or not isinstance(codec, ShardingCodec):
            self._fail_codecs(name, document, "[sharding_indexed]")
        sharding = codec.configuration
        found = (sharding.chunk_shape, sharding.codecs, sharding.index_codecs, sharding.index_location)
        if found != ((1, *document.shape[1:]), (_values_codec(encoding),), INDEX_CODECS, "end"):
            message = "the shard is not one bundle a chunk with its index at the end"
            self._fail("FF-BND-5", name, message, (1, *document.shape[1:]), sharding.chunk_shape)

    def _check_data_type(self, name: str, document: ArrayDocument, encoding: Encoding) -> None:
        if document.data_type != DATA_TYPES[encoding]:
            self._fail(
                "FF-ARR-9", name, f"the data type is not that of {encoding}", DATA_TYPES[encoding], document.data_type
            )

    def _check_aligned(self, name: str, extent: Extent, alignment: int) -> None:
        if self.container.kind == "file" and extent.offset % alignment:
            self._fail("FF-ALIGN-1", name, "bundles are not aligned", f"a multiple of {alignment}", extent.offset)

    def _part_nbytes(self, rule: str, name: str, encoding: Encoding, n_values: int) -> int:
        try:
            return part_layout(encoding, n_values).nbytes
        except ValueError as error:
            raise FlashFormatError(str(error), path=self.path, where=name, rule=rule) from None

    def _check_roles(self, manifest: Manifest) -> None:
        """Compare the arrays found with those that the manifest calls for."""
        for layer in range(manifest.decoder.n_layers):
            if bundles_name(layer) not in self.bundles:
                self._fail("FF-MAN-11", bundles_name(layer), "bundles are missing", bundles_name(layer), "nothing")
        wanted = required_arrays(manifest)
        for name, rule in wanted.items():
            info = self.tensors.get(name)
            if info is None:
                self._fail("FF-MAN-11", name, "an array is missing", name, "nothing")
            if info.shape != rule.shape:
                self._fail("FF-MAN-12", name, "not the shape that the manifest implies", rule.shape, info.shape)
            if not _allows(rule, info.encoding):
                self._fail("FF-MAN-13", name, "not an encoding for this array", _allowed(rule), info.encoding)
        for name in self.tensors:
            if name not in wanted and not name.startswith(EXTENSIONS):
                self._fail("FF-MAN-10", name, "the manifest calls for no such array", "nothing", name)

    def _fail_codecs(self, name: str, document: ArrayDocument, expected: str) -> NoReturn:
        found = [type(codec).__struct_config__.tag for codec in document.codecs]
        self._fail("FF-ARR-8", name, "not the codecs of this kind of array", expected, found)

    def _fail(self, rule: str, where: str, message: str, expected: object, actual: object) -> NoReturn:
        raise FlashFormatError(message, path=self.path, where=where, rule=rule, expected=expected, actual=actual)


def _values_codec(encoding: Encoding) -> Codec:
    return VALUES if encoding.storage_dtype.itemsize > 1 else SINGLE_BYTES


def _allows(rule: ArrayRule, encoding: Encoding) -> bool:
    if rule.encodable:
        return encoding.is_weight
    return encoding is (Encoding.U32 if rule.integers else Encoding.F32)


def _allowed(rule: ArrayRule) -> str:
    if rule.encodable:
        return "a weight encoding"
    return "u32" if rule.integers else "f32"
