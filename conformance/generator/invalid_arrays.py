"""Faults of array documents: FF-ARR, FF-TEN-1 and 2, FF-BND, FF-FILE, FF-MAN-10 to 13, FF-LIM-6 to 8, FF-ALIGN-4, 5."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from generator.checksums import crc32c
from generator.encodings import DATA_TYPE, STORAGE
from generator.faults import BUNDLES, CHECKSUMS, QUERY, Fault, Mutation, in_directory, in_model, set_in
from generator.hierarchy import (
    ZSTD,
    Geometry,
    Hierarchy,
    array_document,
    bundles_document,
    bundles_payload,
    bytes_codec,
    file_document,
    group,
    shard_index,
    tensor_document,
)
from generator.model import random_bytes

NOTE = "extensions/note"
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
BIG = {"name": "bytes", "configuration": {"endian": "big"}}


def faults() -> Iterator[Fault]:
    """All faults of this file."""
    yield from _nodes()
    yield from _documents()
    yield from _attributes()
    yield from _keys()
    yield from _tensors()
    yield from _bundles()
    yield from _sharding()
    yield from _files()
    yield from _roles()


def document(name: str, path: str, value: Any) -> Mutation:
    """Set a field of an array document."""
    return lambda h: set_in(h.documents[name], path, value)


def _nodes() -> Iterator[Fault]:
    def root_is_array(h: Hierarchy) -> None:
        attributes = h.documents[""]["attributes"]
        h.documents[""] = array_document((1,), "uint8", [bytes_codec("u8")], {}) | {"attributes": attributes}

    def without_group(h: Hierarchy) -> None:
        del h.documents["layers/0/attention"]

    def below_array(h: Hierarchy) -> None:
        h.tensor(f"{NOTE}/below", "u8", (1,), np.zeros(1, np.uint8))

    consolidated = {"kind": "inline", "must_understand": False, "metadata": {}}
    for name, rule, what, mutate, on in [
        ("zarr-format-2", "FF-ARR-1", "a group says zarr_format 2", document("layers", "zarr_format", 2), "minimal"),
        ("zarr-format-true", "FF-ARR-1", "a group says zarr_format true", document("layers", "zarr_format", True), "minimal"),
        ("node-type-table", "FF-ARR-1", "a node_type is 'table'", document("layers", "node_type", "table"), "minimal"),
        ("root-is-array", "FF-ARR-1", "the root is an array", root_is_array, "minimal"),
        ("consolidated-metadata", "FF-ARR-2", "a group has consolidated metadata", document("layers", "consolidated_metadata", consolidated), "minimal"),
        ("group-without-document", "FF-ARR-2", "an intermediate group has no document", without_group, "minimal"),
        ("node-below-array", "FF-ARR-2", "an array lies below an array", below_array, "rich"),
    ]:  # fmt: skip
        yield in_model(name, rule, what, mutate, on)


def _documents() -> Iterator[Fault]:
    def shape(*dimensions: int) -> Mutation:
        def mutate(h: Hierarchy) -> None:
            payload = h.payloads.pop(h.key(NOTE))
            h.documents[NOTE] = tensor_document("u8", dimensions, payload)
            h.payloads[h.key(NOTE)] = payload

        return mutate

    def codecs(*names: dict[str, Any]) -> Mutation:
        return document(QUERY, "codecs", list(names))

    def sharded(h: Hierarchy) -> None:
        h.documents[QUERY]["codecs"] = h.documents[BUNDLES]["codecs"]

    grid, keys = "chunk_grid.configuration.chunk_shape", "chunk_key_encoding"
    dimension = ["FF-ARR-4", "FF-ARR-10"]
    for name, rule, what, mutate, on in [
        ("unknown-array-field", "FF-ARR-3", "an array has an unknown field", document(QUERY, "extra", {}), "minimal"),
        ("storage-transformer", "FF-ARR-3", "an array has a storage transformer", document(QUERY, "storage_transformers", [{"name": "x"}]), "minimal"),
        ("dimension-names-short", "FF-ARR-3", "one name for two dimensions", document(QUERY, "dimension_names", ["x"]), "minimal"),
        ("no-dimensions", dimension, "an array has no dimensions", shape(), "rich"),
        ("nine-dimensions", dimension, "an array has nine dimensions", shape(3, *[1] * 8), "rich"),
        ("dimension-zero", dimension, "a dimension is zero", shape(3, 0), "rich"),
        ("dimension-negative", dimension, "a dimension is negative", shape(-3), "rich"),
        ("two-chunks", "FF-ARR-5", "the chunk is half of the array", document(QUERY, grid, [8, 16]), "minimal"),
        ("chunk-larger-than-array", "FF-ARR-5", "the chunk is larger than the array", document(QUERY, grid, [32, 16]), "minimal"),
        ("rectangular-grid", "FF-ARR-5", "the chunk grid is rectangular", document(QUERY, "chunk_grid.name", "rectangular"), "minimal"),
        ("dot-separator", "FF-ARR-6", "the separator of chunk keys is a dot", document(QUERY, f"{keys}.configuration.separator", "."), "minimal"),
        ("v2-chunk-keys", "FF-ARR-6", "chunk keys are those of Zarr v2", document(QUERY, keys, {"name": "v2"}), "minimal"),
        ("fill-value-one", "FF-ARR-7", "the fill value is 1", document(QUERY, "fill_value", 1), "minimal"),
        ("fill-value-text", "FF-ARR-7", "the fill value is 'NaN'", document(QUERY, "fill_value", "NaN"), "minimal"),
        ("fill-value-false", "FF-ARR-7", "the fill value is false", document(QUERY, "fill_value", False), "minimal"),
        ("big-endian", "FF-ARR-8", "values are big-endian", codecs(BIG), "minimal"),
        ("gzip", "FF-ARR-8", "a tensor is compressed by gzip", codecs(LITTLE, {"name": "gzip", "configuration": {"level": 1}}), "minimal"),
        ("two-compressors", "FF-ARR-8", "a tensor is compressed twice", codecs(LITTLE, ZSTD, ZSTD), "minimal"),
        ("transpose", "FF-ARR-8", "a tensor is transposed", codecs({"name": "transpose", "configuration": {"order": [1, 0]}}, LITTLE), "minimal"),
        ("inner-crc32c", "FF-ARR-8", "a tensor has a crc32c codec", codecs(LITTLE, {"name": "crc32c"}), "minimal"),
        ("no-codecs", "FF-ARR-8", "a tensor has no codecs", codecs(), "minimal"),
        ("tensor-in-shards", "FF-ARR-8", "a tensor is sharded", sharded, "minimal"),
        ("file-compressed", "FF-ARR-8", "an embedded file is compressed", document("files/tokenizer", "codecs", [bytes_codec("u8"), ZSTD]), "rich"),
        ("bundles-without-shards", ["FF-ARR-8", "FF-BND-5"], "bundles have the codec bytes alone", document(BUNDLES, "codecs", [LITTLE]), "minimal"),
        ("data-type-int16", "FF-ARR-9", "f16 values are declared int16", document(QUERY, "data_type", "int16"), "minimal"),
        ("checksums-int32", "FF-ARR-9", "u32 values are declared int32", document(CHECKSUMS, "data_type", "int32"), "minimal"),
        ("bundles-uint16", "FF-ARR-9", "f16 bundles are declared uint16", document(BUNDLES, "data_type", "uint16"), "minimal"),
    ]:  # fmt: skip
        yield in_model(name, rule, what, mutate, on)


def _attributes() -> Iterator[Fault]:
    ours = "attributes.flashfmt"
    for name, what, mutate, on in [
        ("attributes-missing", "an array has no attribute flashfmt", document(QUERY, "attributes", {}), "minimal"),
        ("kind-unknown", "an array is of kind 'table'", document(QUERY, f"{ours}.kind", "table"), "minimal"),
        ("encoding-unknown", "an encoding is called q5", document(QUERY, f"{ours}.encoding", "q5"), "minimal"),
        ("checksum-short", "a crc32c has seven digits", document(QUERY, f"{ours}.crc32c", "1234567"), "minimal"),
        ("checksum-capitals", "a crc32c has capitals", document(QUERY, f"{ours}.crc32c", "ABCDEF01"), "minimal"),
        (
            "logical-shape-missing",
            "a tensor has no logical shape",
            lambda h: h.attributes(QUERY).pop("shape"),
            "minimal",
        ),
        ("stride-missing", "bundles have no stride", lambda h: h.attributes(BUNDLES).pop("stride"), "minimal"),
        ("stride-is-text", "a stride is a string", document(BUNDLES, f"{ours}.stride", "128"), "minimal"),
        ("digest-short", "a sha256 has 63 digits", document("files/tokenizer", f"{ours}.sha256", "0" * 63), "rich"),
    ]:
        yield in_model(name, "FF-ARR-10", what, mutate, on)

    def extension_file(h: Hierarchy) -> None:
        content = b"abc"
        h.documents[NOTE] = file_document("note", content, hashlib.sha256(content).hexdigest())
        h.payloads[h.key(NOTE)] = content

    both = ["FF-ARR-10", "FF-FILE-1"]
    yield in_model("extension-of-kind-file", both, "an array under extensions is a file", extension_file, "rich")


def _keys() -> Iterator[Fault]:
    def stray(key: str) -> Mutation:
        return lambda h: h.payloads.update({key: b"x"})

    def no_chunk(h: Hierarchy) -> None:
        del h.payloads[h.key(QUERY)]

    def chunk_of_other_rank(h: Hierarchy) -> None:
        h.payloads[f"{QUERY}/c/0"] = h.payloads.pop(h.key(QUERY))

    def named_document(h: Hierarchy) -> None:
        h.documents["extensions/zarr.json"] = group()

    def stray_file(keys: dict[str, bytes]) -> None:
        keys["notes.txt"] = b"x"

    rule = "FF-ARR-11"
    yield in_model("stray-key", rule, "a key belongs to no array", stray("notes.txt"))
    yield in_directory("stray-file", rule, "a file belongs to no array", stray_file)
    yield in_model("second-chunk", rule, "an array has a second chunk", stray(f"{QUERY}/c/1/0"))
    yield in_model("chunk-of-a-group", rule, "a group has a chunk", stray("layers/c/0"))
    yield in_model("node-named-document", rule, "a group is called zarr.json", named_document, "rich")
    yield in_model("chunk-missing", "FF-ARR-12", "an array has no chunk", no_chunk)
    lost = ["FF-ARR-11", "FF-ARR-12"]
    yield in_model("chunk-of-other-rank", lost, "the chunk of a matrix is called c/0", chunk_of_other_rank)


def _tensors() -> Iterator[Fault]:
    def note(
        encoding: str, logical: tuple[int, ...], stored: tuple[int, ...], payload: bytes, codec: Any = None
    ) -> Mutation:
        def mutate(h: Hierarchy) -> None:
            attributes = {"kind": "tensor", "encoding": encoding, "shape": list(logical)}
            attributes["crc32c"] = f"{crc32c(payload):08x}"
            codecs = [bytes_codec(encoding)] + ([codec] if codec else [])
            h.payloads.pop(h.key(NOTE), None)
            h.documents[NOTE] = array_document(stored, DATA_TYPE[encoding], codecs, attributes)
            h.payloads[h.key(NOTE)] = payload

        return mutate

    for name, rule, what, mutate in [
        ("logical-shape-differs", "FF-TEN-1", "the two shapes of a plain tensor differ", note("u8", (2, 3), (3, 2), bytes(6))),
        ("q8-of-three-dimensions", "FF-TEN-1", "a q8 tensor has three dimensions", note("q8", (1, 2, 64), (1, 2, 128), bytes(256))),
        ("q8-of-one-dimension", "FF-TEN-1", "a q8 tensor has one dimension", note("q8", (64,), (128,), bytes(128))),
        ("q8-row-of-32", "FF-TEN-1", "a q8 row has 32 weights", note("q8", (2, 32), (2, 96), bytes(192))),
        ("q4-row-of-96", "FF-TEN-1", "a q4 row has 96 weights", note("q4", (2, 96), (2, 128), bytes(256))),
        ("q8-stored-as-weights", "FF-TEN-1", "a q8 tensor has the storage shape of u8", note("q8", (2, 64), (2, 64), bytes(128))),
        ("tensor-too-short", "FF-TEN-2", "a payload lacks its last byte", note("u8", (3,), (3,), bytes(2))),
        ("tensor-too-long", "FF-TEN-2", "a payload has a byte too many", note("u8", (3,), (3,), bytes(4))),
        ("tensor-empty", "FF-TEN-2", "a payload has no bytes", note("u8", (3,), (3,), b"")),
        ("shape-wraps-around", "FF-TEN-2", "the bytes of a shape are 0 modulo 2^64", note("u8", *[(2**31, 2**31, 4)] * 2, b"")),
        ("dimension-above-2-to-31", "FF-LIM-7", "a dimension is 2^31 + 1", note("u8", *[(2**31 + 1,)] * 2, bytes(9), ZSTD)),
        ("q8-row-above-16-mib", "FF-LIM-6", "a q8 row has 2^24 + 64 bytes", note("q8", (1, 2**24), (1, 2**24 + 64), bytes(9), ZSTD)),
    ]:  # fmt: skip
        yield in_model(name, rule, what, mutate, "rich")


def _rebuilt(**changes: Any) -> Mutation:
    """Bundles of another geometry, otherwise sound."""

    def mutate(h: Hierarchy) -> None:
        a = h.attributes(BUNDLES)
        fields = {key: a[key] for key in ("encoding", "n_neurons", "d_model", "alignment")}
        g = Geometry(**({"parts": tuple(a["parts"])} | fields | changes))
        rows = [bytes(g.row_nbytes)] * g.n_neurons
        payload = bundles_payload(rows, g)
        h.documents[BUNDLES] = bundles_document(g, payload)
        h.payloads[h.key(BUNDLES)] = payload
        n = h.documents[CHECKSUMS]["shape"][0]
        h.replace(CHECKSUMS, np.full(n, crc32c(rows[0]), STORAGE["u32"]).tobytes())

    return mutate


def _bundles() -> Iterator[Fault]:
    def attribute(**fields: Any) -> Mutation:
        return lambda h: h.attributes(BUNDLES).update(fields)

    def overlapping(h: Hierarchy) -> None:
        _rebuilt(encoding="f32", alignment=64)(h)
        a = h.attributes(BUNDLES)
        a["stride"] = 64
        index = shard_index([(i * 64, a["row_nbytes"]) for i in range(a["n_neurons"])])
        h.replace(BUNDLES, bytes(64 * a["n_neurons"]) + index)

    def transposed(h: Hierarchy) -> None:
        d = h.documents[BUNDLES]
        n, parts, width = d["shape"]
        d["shape"] = d["chunk_grid"]["configuration"]["chunk_shape"] = [n, width, parts]
        d["codecs"][0]["configuration"]["chunk_shape"] = [1, width, parts]

    def longer(h: Hierarchy) -> None:
        h.replace(BUNDLES, h.payloads[h.key(BUNDLES)] + b"\0")

    def one_entry_less(h: Hierarchy) -> None:
        payload = h.payloads[h.key(BUNDLES)]
        h.replace(BUNDLES, payload[:-20] + payload[-4:])

    def stride_192(h: Hierarchy) -> None:
        _rebuilt(alignment=192)(h)
        h.attributes(BUNDLES)["alignment"] = 128

    size, alignment = ["FF-BND-7", "FF-IDX-1"], ["FF-ALIGN-4", "FF-ALIGN-1"]
    stride, row = ["FF-LIM-6", "FF-BND-7"], ["FF-LIM-6", "FF-BND-3", "FF-BND-6"]
    for name, rule, what, mutate in [
        ("parts-reversed", "FF-BND-1", "the parts are down, up", _rebuilt(parts=("down", "up"))),
        ("parts-of-gated", "FF-BND-1", "a plain FFN has three parts", _rebuilt(parts=("gate", "up", "down"))),
        ("another-number-of-neurons", "FF-BND-1", "there are 7 bundles, d_ff is 6", _rebuilt(n_neurons=7)),
        ("another-width", "FF-BND-1", "bundles are of d_model 32 instead of 16", _rebuilt(d_model=32)),
        ("bundles-of-integers", "FF-BND-2", "bundles are encoded as u8", _rebuilt(encoding="u8")),
        ("q8-bundles-of-16", "FF-BND-2", "q8 bundles of d_model 16", _rebuilt(encoding="q8")),
        ("part-size", "FF-BND-3", "part_nbytes is 31 instead of 32", attribute(part_nbytes=31)),
        ("row-size", "FF-BND-3", "row_nbytes is 32 instead of 64", attribute(row_nbytes=32)),
        ("bundles-transposed", "FF-BND-4", "the storage shape is [n, d_model, parts]", transposed),
        ("bundles-overlap", "FF-BND-6", "the stride is 64, rows have 128 bytes", overlapping),
        ("bundles-too-long", size, "the payload has a byte too many", longer),
        ("index-entry-missing", size, "the shard index has one entry less", one_entry_less),
        ("bundle-alignment-32", "FF-ALIGN-4", "the alignment is 32", _rebuilt(alignment=32)),
        ("bundle-alignment-96", alignment, "the alignment is 96", _rebuilt(alignment=96)),
        ("stride-misaligned", "FF-ALIGN-5", "the stride is 192, the alignment 128", stride_192),
        ("stride-above-16-mib", stride, "the stride is 2^24 + 128", attribute(stride=2**24 + 128)),
        ("row-above-16-mib", row, "row_nbytes is 2^24 + 128", attribute(row_nbytes=2**24 + 128)),
        ("stride-wraps-around", stride, "n * stride wraps around 2^64", attribute(stride=2**63)),
    ]:
        yield in_model(name, rule, what, mutate)


def _sharding() -> Iterator[Fault]:
    def configure(**fields: Any) -> Mutation:
        return lambda h: h.documents[BUNDLES]["codecs"][0]["configuration"].update(fields)

    crc = {"name": "crc32c"}
    rule, inside = ["FF-BND-5"], ["FF-BND-5", "FF-ARR-8"]
    for name, rules, what, mutate in [
        ("two-bundles-a-chunk", rule, "inner chunks hold two bundles", configure(chunk_shape=[2, 2, 16])),
        ("one-part-a-chunk", rule, "inner chunks hold one part", configure(chunk_shape=[1, 1, 16])),
        ("index-at-start", rule, "the index is at the start", configure(index_location="start")),
        ("index-without-checksum", rule, "the index has no checksum codec", configure(index_codecs=[LITTLE])),
        ("index-checksum-first", rule, "the index codecs are reversed", configure(index_codecs=[crc, LITTLE])),
        ("inner-zstd", inside, "inner chunks are compressed", configure(codecs=[LITTLE, ZSTD])),
        ("inner-big-endian", inside, "inner chunks are big-endian", configure(codecs=[BIG])),
        ("index-big-endian", inside, "the index is big-endian", configure(index_codecs=[BIG, crc])),
    ]:
        yield in_model(name, rules, what, mutate)


def _files() -> Iterator[Fault]:
    def add(name: str, shape: tuple[int, ...] = (2,), filename: str = "a") -> Mutation:
        def mutate(h: Hierarchy) -> None:
            d = file_document(filename, b"{}", hashlib.sha256(b"{}").hexdigest())
            d["shape"] = d["chunk_grid"]["configuration"]["chunk_shape"] = list(shape)
            h.add(name, d, b"{}")

        return mutate

    def called(filename: str) -> Mutation:
        return add("files/config", filename=filename)

    def tensor_among_files(h: Hierarchy) -> None:
        h.tensor("files/config", "u8", (2,), np.zeros(2, np.uint8))

    place, elsewhere, label = "FF-FILE-1", ["FF-FILE-1", "FF-MAN-10"], "FF-FILE-2"
    claims = add("files/config", shape=((1 << 28) + 1,))
    for name, rule, what, mutate in [
        ("role-begins-with-digit", place, "a role is called 9lives", add("files/9lives")),
        ("role-with-hyphen", place, "a role is called chat-template", add("files/chat-template")),
        ("role-of-65-characters", place, "a role has 65 characters", add("files/" + "a" * 65)),
        ("file-below-role", place, "a file lies at files/a/b", add("files/a/b")),
        ("file-of-two-dimensions", place, "a file has two dimensions", add("files/config", shape=(1, 2))),
        ("file-elsewhere", elsewhere, "a file lies at notes/config", add("notes/config")),
        ("tensor-among-files", elsewhere, "a tensor lies at files/config", tensor_among_files),
        ("filename-with-slash", label, "a filename leads elsewhere", called("../config")),
        ("filename-with-backslash", label, "a filename has a backslash", called("a\\b")),
        ("filename-dots", label, "a filename is '..'", called("..")),
        ("filename-empty", label, "a filename is empty", called("")),
        ("filename-with-escape", label, "a filename has a control character", called("a\x1b[2J")),
        ("filename-not-ascii", label, "a filename is not ASCII", called("\u00e9")),
        ("filename-too-long", label, "a filename has 256 characters", called("a" * 256)),
        ("file-above-256-mib", ["FF-LIM-8", "FF-TEN-2"], "a file claims 256 MiB and one byte", claims),
    ]:
        yield in_model(name, rule, what, mutate)


def _roles() -> Iterator[Fault]:
    def remove(name: str) -> Mutation:
        def mutate(h: Hierarchy) -> None:
            del h.payloads[h.key(name)]
            del h.documents[name]

        return mutate

    def replace(name: str, encoding: str, *shape: int) -> Mutation:
        def mutate(h: Hierarchy) -> None:
            nbytes = int(np.prod(shape)) * np.dtype(STORAGE[encoding]).itemsize
            h.tensor(name, encoding, shape, random_bytes(name, nbytes) & 0x3F)

        return mutate

    def more_bundles(h: Hierarchy) -> None:
        h.add("layers/1/ffn/bundles", h.copy().documents[BUNDLES], h.payloads[h.key(BUNDLES)])

    def norm_as_matrix(h: Hierarchy) -> None:
        payload = h.payloads.pop(h.key("final_norm/weight"))
        h.add("final_norm/weight", tensor_document("f32", (1, len(payload) // 4), payload), payload)

    attention = "layers/0/attention/q"
    for name, rule, what, mutate, on in [
        ("unknown-array", "FF-MAN-10", "a tensor that nothing calls for", replace(f"{attention}/scale", "f32", 1), "minimal"),
        ("bias-not-called-for", "FF-MAN-10", "a bias that the manifest does not state", replace(f"{attention}/bias", "f32", 16), "minimal"),
        ("bundles-of-no-layer", "FF-MAN-10", "bundles of layer 1 of 1", more_bundles, "minimal"),
        ("tensor-missing", "FF-MAN-11", "the query projection is missing", remove(QUERY), "minimal"),
        ("bundles-missing", "FF-MAN-11", "the bundles of a layer are missing", remove(BUNDLES), "minimal"),
        ("checksums-missing", "FF-MAN-11", "bundle_crc32c is missing", remove(CHECKSUMS), "minimal"),
        ("predictor-missing", "FF-MAN-11", "a predictor's array is missing", remove("layers/0/predictor/up"), "rich"),
        ("statistics-missing", "FF-MAN-11", "a statistics array is missing", remove("layers/1/statistics/firing_frequency"), "rich"),
        ("matrix-too-wide", "FF-MAN-12", "the query projection has another width", replace(QUERY, "f16", 16, 32), "minimal"),
        ("matrix-transposed", "FF-MAN-12", "the token embedding is transposed", replace("embedding/tokens", "f16", 16, 8), "minimal"),
        ("vector-as-matrix", "FF-MAN-12", "a norm weight has two dimensions", norm_as_matrix, "rich"),
        ("vector-of-f16", "FF-MAN-13", "a norm weight is f16", replace("final_norm/weight", "f16", 16), "rich"),
        ("matrix-of-integers", "FF-MAN-13", "the query projection is u8", replace(QUERY, "u8", 16, 16), "minimal"),
        ("checksums-of-bytes", "FF-MAN-13", "bundle_crc32c is u8", replace(CHECKSUMS, "u8", 6), "minimal"),
    ]:  # fmt: skip
        yield in_model(name, rule, what, mutate, on)
