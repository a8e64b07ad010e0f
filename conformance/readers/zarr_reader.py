"""A small reader of flash models on zarr-python: `python zarr_reader.py < request.json > answer.json`.

It shows that a Zarr library finds in a model what SPEC.md says is there. Every weight comes through zarr-python: from
a directory by `LocalStore`, from a single file by `ZipStore`, one neuron at a time out of the shards. Beyond that it
knows the manifest (section 7), the encodings (section 9), and where payloads lie (section 4.2, through `zipfile`).

It is no validator: it takes sound documents at their word. It refuses what a reader must look at to read at all, and
claims these rules and no others: versions and features that it does not know, documents that are no JSON or fail their
checksum, and shard indices that contradict the stride. A compressed tensor's stated size is compared before anything is
decompressed (FF-TEN-3). It needs zarr-python and what that depends on, and imports nothing of flashfmt.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NoReturn

import google_crc32c
import numpy as np
import numpy.typing as npt

Json = dict[str, Any]

REJECTED: Final = 65
MAX_DOCUMENT_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 32

CAPABILITIES: Final[Json] = {
    "name": "zarr-python",
    "spec": "1.0",
    "levels": ["structure", "values"],
    "containers": ["directory", "file"],
    "encodings": ["bf16", "f16", "f32", "q4", "q8", "u32", "u8"],
    "codecs": ["blosc", "raw", "zstd"],
    "rules": ["FF-BND-7", "FF-IDX", "FF-JSON", "FF-LIM-3", "FF-LIM-4", "FF-SUM-1", "FF-SUM-2", "FF-VER"],
}

# Section 7: kind -> field -> (kind of its value[, default]). A kind in lower case is a plain value.
FIELDS: Final[Mapping[str, Mapping[str, tuple[Any, ...]]]] = {
    "Manifest": {
        "version": ("plain",), "metadata_crc32c": ("plain",), "name": ("plain",), "decoder": ("Decoder",),
        "provenance": ("Provenance",), "tokens": ("SpecialTokens", {}), "required_features": ("plain", []),
        "optional_features": ("plain", []), "predictors": ("Predictor", []), "statistics": ("Statistics", None),
    },
    "Decoder": {
        "vocab_size": ("plain",), "d_model": ("plain",), "context_tokens": ("plain",), "embedding": ("Embedding",),
        "positions": ("LearnedPositions", None), "rotary": ("Rotary", []), "norm": ("Norm",),
        "embedding_norm": ("plain", False), "final_norm": ("plain", True), "block": ("Block", {}),
        "attention": ("Attention",), "ffn": ("FeedForward",), "logits": ("Logits",), "layers": ("Layer",),
    },
    "Embedding": {"d_embed": ("plain",), "scale": ("number", 1.0), "projection": ("plain", False)},
    "LearnedPositions": {"n_rows": ("plain",), "offset": ("plain", 0)},
    "Rotary": {
        "name": ("plain",), "n_dims": ("plain",), "pairing": ("plain", "half"), "attention_factor": ("number", 1.0),
    },
    "Norm": {
        "kind": ("plain",), "eps": ("number",), "weight": ("plain", True), "weight_offset": ("number", 0.0),
        "bias": ("plain", False),
    },
    "Block": {"order": ("plain", "pre_norm"), "shared_norm": ("plain", False)},
    "Attention": {
        "n_heads": ("plain",), "n_kv_heads": ("plain",), "head_dim": ("plain",), "scale": ("number",),
        "qkv_bias": ("plain", False), "output_bias": ("plain", False), "qk_norm": ("Norm", None),
        "qk_norm_over": ("plain", "head"),
    },
    "FeedForward": {
        "kind": ("plain",), "d_ff": ("plain",), "activation": ("Activation",),
        "up_activation": ("Activation", {"kind": "identity"}), "gate_bias": ("plain", False),
        "up_bias": ("plain", False), "down_bias": ("plain", False),
    },
    "Activation": {"kind": ("plain",), "threshold": ("number", 0.0)},
    "Logits": {"tied": ("plain",), "bias": ("plain", False), "scale": ("number", 1.0), "softcap": ("number", None)},
    "Layer": {"rotary": ("plain", None), "attention_window_tokens": ("plain", None)},
    "SpecialTokens": {"bos": ("plain", None), "eos": ("plain", []), "add_bos": ("plain", False)},
    "Provenance": {
        "writer": ("plain",), "source": ("plain",), "source_format": ("plain",), "source_sha256": ("plain", None),
        "architecture": ("plain", ""), "licence": ("plain", None),
    },
    "Predictor": {
        "layer": ("plain",), "kind": ("plain",), "tap": ("InputTap",), "threshold": ("number",),
        "rank": ("plain", None), "bias": ("plain", False), "signed": ("plain", True), "measured": ("Measured", None),
    },
    "InputTap": {"layer": ("plain",), "point": ("plain", "ffn_input")},
    "Measured": {
        "recall": ("number",), "precision": ("number",), "predicted_fraction": ("number",), "n_tokens": ("plain",),
        "text": ("plain",), "perplexity_ratio": ("number", None),
    },
    "Statistics": {"n_tokens": ("plain",), "text": ("plain",), "window_tokens": ("plain",)},
}  # fmt: skip


class Rejected(Exception):  # noqa: N818  (a refusal is an answer, not an error)
    """The model breaks a rule."""

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.rule = rule


@dataclass(frozen=True)
class Extent:
    """Where the bytes of a key lie. Offsets in bytes from the start of the file."""

    path: Path
    offset: int
    nbytes: int

    def read(self, start: int = 0, nbytes: int | None = None) -> bytes:
        """The bytes from `start` on, all of them without `nbytes`."""
        wanted = self.nbytes - start if nbytes is None else nbytes
        with self.path.open("rb") as file:
            file.seek(self.offset + start)
            data = file.read(wanted)
        if len(data) != wanted:
            raise OSError(f"{self.path}: wanted {wanted} bytes at {self.offset + start}, got {len(data)}")
        return data


class Model:
    """An open model: its documents checked against their checksum, its arrays through zarr-python."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.container = "directory" if path.is_dir() else "file"
        self.extents = _files(path) if path.is_dir() else _entries(path)
        texts = {key: extent.read() for key, extent in self.extents.items() if key.rpartition("/")[2] == "zarr.json"}
        self.manifest = _manifest(texts)
        documents = {key.removesuffix("/zarr.json"): _parsed(text) for key, text in texts.items() if key != "zarr.json"}
        self.arrays = {name: d for name, d in documents.items() if d["node_type"] == "array"}

    @cached_property
    def group(self) -> Any:
        """The root group as zarr-python opens it. Imported here: describing a model needs no Zarr library."""
        import zarr
        from zarr.storage import LocalStore, ZipStore

        in_folder = self.container == "directory"
        store = LocalStore(self.path, read_only=True) if in_folder else ZipStore(self.path, mode="r")
        return zarr.open_group(store, mode="r", zarr_format=3)

    def attributes(self, name: str) -> Json:
        """The object `flashfmt` of an array."""
        found: Json = self.arrays[name]["attributes"]["flashfmt"]
        return found

    def extent(self, name: str) -> tuple[str, Extent]:
        """Key and place of an array's one chunk."""
        key = name + "/c" + "/0" * len(self.arrays[name]["shape"])
        if key not in self.extents:
            raise Rejected("FF-ARR-12")
        return key, self.extents[key]

    def codec(self, name: str) -> str:
        """`raw`, `zstd` or `blosc`."""
        codecs = self.arrays[name]["codecs"]
        return codecs[1]["name"] if len(codecs) > 1 else "raw"

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """A tensor's numbers in its logical shape: float32, or the integers of u8 and u32."""
        self._check_stated_size(name)
        attributes = self.attributes(name)
        return decoded(self._array(name)[...], attributes["encoding"], attributes["shape"][-1])

    def bundle(self, layer: int, neuron: int) -> npt.NDArray[Any]:
        """Weights of one neuron, float32 [parts, d_model]: one inner chunk of the shard."""
        name = f"layers/{layer}/ffn/bundles"
        self.check_index(name)
        attributes = self.attributes(name)
        return decoded(self._array(name)[neuron], attributes["encoding"], attributes["d_model"])

    def check_index(self, name: str) -> None:
        """Section 11: the index says what the stride says, FF-IDX."""
        attributes, (_, extent) = self.attributes(name), self.extent(name)
        n, stride = attributes["n_neurons"], attributes["stride"]
        if extent.nbytes != n * (stride + 16) + 4:
            raise Rejected("FF-BND-7")
        index = extent.read(n * stride)
        if google_crc32c.value(index[:-4]) != int.from_bytes(index[-4:], "little"):
            raise Rejected("FF-IDX-2")
        entries = np.frombuffer(index[:-4], "<u8").reshape(n, 2)
        if (entries[:, 0] != np.arange(n, dtype=np.uint64) * stride).any() or (
            entries[:, 1] != attributes["row_nbytes"]
        ).any():
            raise Rejected("FF-IDX-3")

    def _array(self, name: str) -> Any:
        self.extent(name)
        return self.group[name]

    def _check_stated_size(self, name: str) -> None:
        """FF-TEN-3, before anything is decompressed."""
        codec, document, (_, extent) = self.codec(name), self.arrays[name], self.extent(name)
        if codec == "raw":
            return
        header = extent.read(0, min(18, extent.nbytes))
        if (zstd_size(header) if codec == "zstd" else blosc_size(header, extent.nbytes)) != math.prod(
            document["shape"]
        ) * np.dtype(document["data_type"]).itemsize:
            raise Rejected("FF-TEN-3")


def zstd_size(header: bytes) -> int | None:
    """`Frame_Content_Size` of a Zstandard frame (RFC 8878, section 3.1.1.1), None where it states none."""
    if len(header) < 6 or header[:4] != bytes.fromhex("28b52ffd"):
        return None
    descriptor = header[4]
    single_segment = descriptor >> 5 & 1
    nbytes = (single_segment, 2, 4, 8)[descriptor >> 6]
    at = 5 + (not single_segment) + (0, 1, 2, 4)[descriptor & 3]
    if nbytes == 0 or len(header) < at + nbytes:
        return None
    return int.from_bytes(header[at : at + nbytes], "little") + (256 if nbytes == 2 else 0)


def blosc_size(header: bytes, nbytes: int) -> int | None:
    """Decompressed size that a Blosc buffer states, None where its own size is not that of the payload."""
    if len(header) < 16 or int.from_bytes(header[12:16], "little") != nbytes:
        return None
    return int.from_bytes(header[4:8], "little")


def decoded(stored: npt.NDArray[Any], encoding: str, width: int) -> npt.NDArray[Any]:
    """Section 9. `stored` has the storage shape; the result has rows of `width` numbers."""
    if encoding in ("u8", "u32"):
        return stored
    if encoding == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if encoding == "q8":
        raw = np.ascontiguousarray(stored)
        return np.asarray(raw[..., :4].copy().view("<f4") * raw[..., 64:].view(np.int8).astype(np.float32))
    if encoding == "q4":
        raw = np.ascontiguousarray(stored)
        scales = raw[..., : width // 16].copy().view("<f2").astype(np.float32)  # [..., groups]
        start = -(-width // 16 // 64) * 64
        packed = raw[..., start : start + width // 2].reshape(*raw.shape[:-1], width // 64, 1, 32)
        nibbles = np.concatenate([packed & 15, packed >> 4], axis=-2)  # [..., blocks, 2, 32]
        weights = scales.reshape(*scales.shape[:-1], -1, 2, 1) * (nibbles.astype(np.float32) - 8)
        return np.asarray(weights.reshape(*raw.shape[:-1], width))
    return stored.astype(np.float32)


def summary(array: npt.NDArray[Any]) -> Json:
    """SHA-256 of the little-endian 32-bit values in C order, and the bits of the first, middle and last."""
    flat = np.ascontiguousarray(array).reshape(-1)
    words = flat.astype("<u4" if flat.dtype.kind == "u" else "<f4").view("<u4")
    samples = [f"{int(words[i]):08x}" for i in (0, len(words) // 2, len(words) - 1)]
    return {"samples": samples, "sha256": hashlib.sha256(words.tobytes()).hexdigest()}


def completed(value: Any, kind: str) -> Any:
    """A value of the manifest with the defaults filled in, unknown fields left out, and numbers as their bits."""
    if isinstance(value, list):
        return [completed(member, kind) for member in value]
    if kind == "plain" or value is None:
        return value
    if kind == "number":
        return struct.pack(">d", value).hex()
    return {
        field: completed(value[field] if field in value else default[0], member)
        for field, (member, *default) in FIELDS[kind].items()
    }


def structure(request: Json) -> Json:
    """Answer at the level structure."""
    model = Model(Path(request["path"]))
    tensors, files = {}, {}
    for name, document in model.arrays.items():
        attributes, (key, extent) = model.attributes(name), model.extent(name)
        place = {"key": key, "nbytes": extent.nbytes, "offset": extent.offset}
        if attributes["kind"] == "tensor":
            same = {field: attributes[field] for field in ("encoding", "shape")}
            tensors[name] = {**same, "storage_shape": document["shape"], "codec": model.codec(name), **place}
        elif attributes["kind"] == "file":
            files[name.removeprefix("files/")] = {**{f: attributes[f] for f in ("filename", "sha256")}, **place}
    geometry = ("alignment", "d_model", "encoding", "n_neurons", "part_nbytes", "parts", "row_nbytes", "stride")
    bundles = []
    for layer in range(len(model.manifest["decoder"]["layers"])):
        name = f"layers/{layer}/ffn/bundles"
        model.check_index(name)
        attributes, (key, extent) = model.attributes(name), model.extent(name)
        place = {"key": key, "nbytes": extent.nbytes, "offset": extent.offset}
        bundles.append({**{field: attributes[field] for field in geometry}, **place})
    return {
        "container": model.container,
        "manifest": completed(model.manifest, "Manifest"),
        "tensors": tensors,
        "files": files,
        "bundles": bundles,
        "chosen": [_chosen(model, layer, neuron) for layer, neuron in request.get("bundles", [])],
    }


def values(request: Json) -> Json:
    """Answer at the level values."""
    model = Model(Path(request["path"]))
    return {
        "tensors": {name: summary(model.tensor(name)) for name in request["tensors"]},
        "bundles": [summary(model.bundle(layer, neuron)) for layer, neuron in request["bundles"]],
    }


def answer(request: Json) -> Json:
    """The answer to a request; raises `Rejected` where the model breaks a rule that this reader knows."""
    levels = {"capabilities": lambda _: CAPABILITIES, "structure": structure, "values": values}
    return levels[request["level"]](request)


def main() -> int:
    """One request on the standard input, one answer on the standard output."""
    request = json.load(sys.stdin)
    try:
        result, status = answer(request), 0
    except Rejected as rejected:
        result, status = {"rule": rejected.rule}, REJECTED
    sys.stdout.write(json.dumps(result, sort_keys=True, separators=(",", ":")) + "\n")
    return status


def _files(root: Path) -> dict[str, Extent]:
    extents = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            extents[path.relative_to(root).as_posix()] = Extent(path, 0, path.stat().st_size)
    if "zarr.json" not in extents:
        raise Rejected("FF-DIR-1")
    return extents


def _entries(path: Path) -> dict[str, Extent]:
    path.stat()  # a missing file is a failure, not a rejected model
    if not zipfile.is_zipfile(path):
        raise Rejected("FF-ZIP-2")
    extents = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise Rejected("FF-ZIP-5")
            n_name, n_extra = struct.unpack("<HH", Extent(path, entry.header_offset, 30).read()[26:])
            extents[entry.filename] = Extent(path, entry.header_offset + 30 + n_name + n_extra, entry.file_size)
    return extents


def _parsed(text: bytes) -> Json:
    """A document as section 5 asks for: FF-JSON, FF-LIM-3, FF-LIM-4."""
    if len(text) > MAX_DOCUMENT_BYTES:
        raise Rejected("FF-LIM-3")
    try:
        decoded_text = text.decode()
    except UnicodeDecodeError:
        raise Rejected("FF-JSON-1") from None
    if decoded_text.startswith("\ufeff"):
        raise Rejected("FF-JSON-1")
    try:
        document = json.loads(
            decoded_text,
            object_pairs_hook=_unique,
            parse_constant=_constant,
            parse_int=_integer,
            parse_float=_finite,
        )
    except RecursionError:
        raise Rejected("FF-LIM-4") from None
    except ValueError:
        raise Rejected("FF-JSON-2") from None
    _check_strings_and_depth(document, 1)
    if not isinstance(document, dict):
        raise Rejected("FF-JSON-5")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> Json:
    if len({key for key, _ in pairs}) != len(pairs):
        raise Rejected("FF-JSON-3")
    return dict(pairs)


def _constant(_: str) -> NoReturn:
    raise Rejected("FF-JSON-2")


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise Rejected("FF-JSON-4")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise Rejected("FF-JSON-4")
    return float(text)


def _check_strings_and_depth(value: Any, depth: int) -> None:
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        raise Rejected("FF-JSON-6")
    if isinstance(value, dict | list):
        if depth > MAX_DEPTH:
            raise Rejected("FF-LIM-4")
        for member in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_strings_and_depth(member, depth + 1)


def _manifest(texts: dict[str, bytes]) -> Json:
    """The root's manifest, after version, checksum and required features in the order of section 3."""
    attributes = _parsed(texts["zarr.json"]).get("attributes")
    manifest = attributes.get("flashfmt") if isinstance(attributes, dict) else None
    if not isinstance(manifest, dict):
        raise Rejected("FF-MAN-1")
    version = manifest.get("version")
    if not isinstance(version, str) or not re.fullmatch(r"(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})", version):
        raise Rejected("FF-VER-3")
    if version.split(".")[0] != "1":
        raise Rejected("FF-VER-1")
    crc = 0
    for key in sorted(texts.keys() - {"zarr.json"}):
        crc = google_crc32c.extend(crc, texts[key])
    head, *tails = texts["zarr.json"].split(b'"metadata_crc32c":"')
    if len(tails) != 1:
        raise Rejected("FF-SUM-2")
    crc = google_crc32c.extend(crc, head + b'"metadata_crc32c":"' + b"0" * 8 + tails[0][8:])
    if f"{crc:08x}" != manifest.get("metadata_crc32c"):
        raise Rejected("FF-SUM-1")
    if manifest.get("required_features"):
        raise Rejected("FF-VER-2")
    return manifest


def _chosen(model: Model, layer: int, neuron: int) -> Json:
    name = f"layers/{layer}/ffn/bundles"
    attributes, (_, extent) = model.attributes(name), model.extent(name)
    start, nbytes = neuron * attributes["stride"], attributes["row_nbytes"]
    digest = hashlib.sha256(extent.read(start, nbytes)).hexdigest()
    return {"nbytes": nbytes, "offset": extent.offset + start, "sha256": digest}


if __name__ == "__main__":
    sys.exit(main())
