"""Zarr v3 documents of the profile, parsed into typed structs (SPEC.md section "Arrays").

The types admit what a flash model may say and nothing else; what depends on two fields at once is checked in
`flashfmt.validate`.

Knows: the form of `zarr.json`. Does not know: the manifest, payloads.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from flashfmt.encodings import Encoding
from flashfmt.errors import FlashFormatError
from flashfmt.json_document import convert
from flashfmt.manifest import Hex32, Sha256

Dimension = Annotated[int, Meta(ge=1)]
Shape = Annotated[tuple[Dimension, ...], Meta(min_length=1, max_length=8)]

DATA_TYPES: Final[dict[Encoding, str]] = {
    Encoding.F32: "float32",
    Encoding.F16: "float16",
    Encoding.BF16: "uint16",
    Encoding.Q8: "uint8",
    Encoding.Q4: "uint8",
    Encoding.U8: "uint8",
    Encoding.U32: "uint32",
}


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of structs whose fields Zarr fixes."""


class LittleEndian(_Strict, frozen=True):
    """Configuration of `bytes` for types of several bytes."""

    endian: Literal["little"]


class BytesCodec(_Strict, frozen=True, tag_field="name", tag="bytes"):
    """Values as they lie in memory."""

    configuration: LittleEndian | UnsetType = UNSET


class ZstdConfiguration(_Strict, frozen=True):
    """Settings the writer used; a reader needs none of them."""

    level: int = 0
    checksum: bool = False


class ZstdCodec(_Strict, frozen=True, tag_field="name", tag="zstd"):
    """Zstandard."""

    configuration: ZstdConfiguration = ZstdConfiguration()


class BloscConfiguration(_Strict, frozen=True):
    """Settings the writer used; a reader needs none of them."""

    cname: Literal["lz4", "lz4hc", "blosclz", "zstd", "zlib"]
    clevel: Annotated[int, Meta(ge=0, le=9)]
    shuffle: Literal["noshuffle", "shuffle", "bitshuffle"]
    typesize: Annotated[int, Meta(ge=1, le=255)] = 1
    blocksize: Annotated[int, Meta(ge=0)] = 0


class BloscCodec(_Strict, frozen=True, tag_field="name", tag="blosc"):
    """Blosc."""

    configuration: BloscConfiguration


class Crc32cCodec(_Strict, frozen=True, tag_field="name", tag="crc32c"):
    """Checksum of the shard index."""


class ShardingConfiguration(_Strict, frozen=True):
    """Inner chunks and index of a shard."""

    chunk_shape: Shape
    codecs: Annotated[tuple[BytesCodec, ...], Meta(max_length=8)]
    index_codecs: Annotated[tuple[BytesCodec | Crc32cCodec, ...], Meta(max_length=8)]
    index_location: Literal["start", "end"] = "end"


class ShardingCodec(_Strict, frozen=True, tag_field="name", tag="sharding_indexed"):
    """One shard an array, one inner chunk a bundle."""

    configuration: ShardingConfiguration


Codec = BytesCodec | ZstdCodec | BloscCodec | ShardingCodec

VALUES: Final = BytesCodec(LittleEndian("little"))
SINGLE_BYTES: Final = BytesCodec()
INDEX_CODECS: Final = (VALUES, Crc32cCodec())


class ChunkShape(_Strict, frozen=True):
    """Configuration of the regular grid."""

    chunk_shape: Shape


class ChunkGrid(_Strict, frozen=True):
    """The grid of chunks."""

    name: Literal["regular"]
    configuration: ChunkShape


class Separator(_Strict, frozen=True):
    """Configuration of the chunk keys."""

    separator: Literal["/"] = "/"


class ChunkKeyEncoding(_Strict, frozen=True):
    """How chunks are named."""

    name: Literal["default"]
    configuration: Separator = Separator()


class TensorAttributes(msgspec.Struct, frozen=True, tag_field="kind", tag="tensor"):
    """Attributes of a tensor: `shape` is the logical one."""

    encoding: Encoding
    shape: Shape
    crc32c: Hex32


class FileAttributes(msgspec.Struct, frozen=True, tag_field="kind", tag="file"):
    """Attributes of an embedded file."""

    filename: str
    sha256: Sha256
    crc32c: Hex32


class BundlesAttributes(msgspec.Struct, frozen=True, tag_field="kind", tag="bundles"):
    """Attributes of the bundles of a layer."""

    encoding: Encoding
    parts: Annotated[tuple[str, ...], Meta(max_length=8)]
    n_neurons: Dimension
    d_model: Dimension
    part_nbytes: Dimension
    row_nbytes: Dimension
    stride: Dimension
    alignment: Dimension
    crc32c: Hex32


class ArrayAttributes(msgspec.Struct, frozen=True):
    """Attributes of an array; keys other than `flashfmt` are not ours."""

    flashfmt: TensorAttributes | FileAttributes | BundlesAttributes


class ArrayDocument(_Strict, frozen=True):
    """A `zarr.json` of an array."""

    zarr_format: Literal[3]
    node_type: Literal["array"]
    shape: Shape
    data_type: str
    chunk_grid: ChunkGrid
    chunk_key_encoding: ChunkKeyEncoding
    fill_value: int | float
    codecs: Annotated[tuple[Codec, ...], Meta(min_length=1, max_length=2)]
    attributes: ArrayAttributes
    storage_transformers: Annotated[tuple[str, ...], Meta(max_length=0)] = ()
    dimension_names: Annotated[tuple[str | None, ...], Meta(max_length=8)] | None = None


class GroupDocument(_Strict, frozen=True):
    """A `zarr.json` of a group."""

    zarr_format: Literal[3]
    node_type: Literal["group"]
    attributes: dict[str, Any] = {}


_FIELD: Final = re.compile(r"\$\.([a-z_]+)")
_RULE_OF_FIELD: Final = {
    "shape": "FF-ARR-4",
    "chunk_grid": "FF-ARR-5",
    "chunk_key_encoding": "FF-ARR-6",
    "fill_value": "FF-ARR-7",
    "codecs": "FF-ARR-8",
    "data_type": "FF-ARR-9",
    "attributes": "FF-ARR-10",
}


def _array_rule(place: str) -> str:
    """Rule that a mismatch at a JSON path of an array document breaks."""
    field = _FIELD.match(place)
    return _RULE_OF_FIELD.get(field[1], "FF-ARR-3") if field else "FF-ARR-3"


def parse_node(document: dict[str, Any], *, path: Path, key: str) -> ArrayDocument | GroupDocument:
    """Typed form of one document; attributes of a group, which mean nothing here and may be large, are left out.

    Raises
    ------
    FlashFormatError
        With the FF-ARR rule that is broken and the JSON path where.
    """
    node_type, zarr_format = document.get("node_type"), document.get("zarr_format")
    if zarr_format != 3 or isinstance(zarr_format, bool) or node_type not in ("array", "group"):
        raise FlashFormatError(
            "not a Zarr v3 document",
            path=path,
            where=key,
            rule="FF-ARR-1",
            expected="zarr_format 3, node_type array or group",
            actual=(zarr_format, node_type),
        )
    if node_type == "group":
        group = convert(document, GroupDocument, path=path, where=key, rule="FF-ARR-2")
        return msgspec.structs.replace(group, attributes={})
    return convert(document, ArrayDocument, path=path, where=key, rule=_array_rule)


def chunk_key(name: str, n_dimensions: int) -> str:
    """Key of the one chunk of an array."""
    return f"{name}/c" + "/0" * n_dimensions
