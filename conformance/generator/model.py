"""A model made from a manifest: weights, hierarchy, and what a correct reader answers about it.

Knows: everything the suite states about a valid model. Does not know: which models there are.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from generator.checksums import crc32c
from generator.decoder import Decoder
from generator.encodings import F32, F64, STORAGE, decode, encode, stream, uniform
from generator.hierarchy import (
    Geometry,
    Hierarchy,
    bundles_document,
    bundles_payload,
    file_document,
    group,
    tensor_document,
)
from generator.manifest import called_for, completed, parts, with_exact_floats

Json = dict[str, Any]

CONVENTION = {
    "uuid": "5bd0f6f5-2a3c-4f2b-9d7e-6b1f0c8e4a57",
    "name": "flashfmt",
    "description": "A language model laid out to be run from flash: one record per neuron, aligned and checksummed",
}


@dataclass
class Recipe:
    """What a model is made of. `compressed` maps array names to (codec document, values, stored bytes)."""

    name: str
    manifest: Json
    bundles: str = "f32"
    residents: str = "f32"
    alignment: int = 64
    container: str = "file"
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    extensions: dict[str, tuple[str, tuple[int, ...], npt.NDArray[Any]]] = field(default_factory=dict)
    compressed: dict[str, tuple[Json, npt.NDArray[Any], bytes]] = field(default_factory=dict)
    encodings: dict[str, str] = field(default_factory=dict)
    liberties: bool = False


class Model:
    """The model of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.manifest = completed(recipe.manifest)
        self.decoder: Json = self.manifest["decoder"]
        self.decoded: dict[str, npt.NDArray[Any]] = {}
        self.codecs: dict[str, str] = {}
        self.geometry = Geometry(
            recipe.bundles,
            parts(self.decoder),
            self.decoder["ffn"]["d_ff"],
            self.decoder["d_model"],
            recipe.alignment,
        )
        self.hierarchy = self._hierarchy()
        self.offsets: dict[str, int] = {}
        if recipe.container == "file":
            archive = self.hierarchy.zip_file()
            self.file = archive.build()
            self.offsets = {entry.name.decode(): entry.payload_offset for entry in archive.entries}

    def tensor_names(self) -> list[str]:
        """Every tensor, sorted."""
        h = self.hierarchy
        arrays = (name for name, document in h.documents.items() if document["node_type"] == "array")
        return sorted(name for name in arrays if h.attributes(name)["kind"] == "tensor")

    def bundle_names(self) -> list[str]:
        """Bundles by layer."""
        return [f"layers/{layer}/ffn/bundles" for layer in range(len(self.decoder["layers"]))]

    def structure(self, chosen: list[list[int]]) -> Json:
        """Answer at the level structure."""
        h, tensors, files = self.hierarchy, {}, {}
        for name in self.tensor_names():
            attributes = h.attributes(name)
            tensors[name] = {
                "codec": self.codecs.get(name, "raw"),
                "encoding": attributes["encoding"],
                "shape": attributes["shape"],
                "storage_shape": h.documents[name]["shape"],
                **self._extent(name),
            }
        for role, (filename, content) in self.recipe.files.items():
            digest = hashlib.sha256(content).hexdigest()
            files[role] = {"filename": filename, "sha256": digest, **self._extent(f"files/{role}")}
        g = self.geometry
        bundles = [
            {
                "alignment": g.alignment,
                "d_model": g.d_model,
                "encoding": g.encoding,
                "n_neurons": g.n_neurons,
                "part_nbytes": g.part_nbytes,
                "parts": list(g.parts),
                "row_nbytes": g.row_nbytes,
                "stride": g.stride,
                **self._extent(name),
            }
            for name in self.bundle_names()
        ]
        manifest = with_exact_floats(completed(h.manifest))
        manifest["metadata_crc32c"] = self.metadata_crc32c()
        return {
            "container": self.recipe.container,
            "manifest": manifest,
            "tensors": tensors,
            "bundles": bundles,
            "files": files,
            "chosen": [self._chosen(layer, neuron) for layer, neuron in chosen],
        }

    def values(self, tensors: list[str], chosen: list[list[int]]) -> Json:
        """Answer at the level values."""
        bundles = [self.decoded[f"layers/{layer}/ffn/bundles"][neuron] for layer, neuron in chosen]
        return {
            "tensors": {name: summary(self.decoded[name]) for name in tensors},
            "bundles": [summary(bundle) for bundle in bundles],
        }

    def logits(self, tokens: list[int]) -> F32:
        """Expected logits, [n_tokens, vocab_size]."""
        return Decoder(self.manifest, self._weights()).logits(tokens).astype("<f4")

    def scores(self, layer: int, inputs: F32) -> F64:
        """Predictor scores in float64, [n_inputs, d_ff]: the left side of the comparison with the threshold."""
        predictor = next(p for p in self.manifest["predictors"] if p["layer"] == layer)
        prefix = f"layers/{layer}/predictor"
        weights = {name: array.astype(np.float64) for name, array in self.decoded.items()}
        x = inputs.astype(np.float64)
        if predictor["kind"] == "low_bit_gate":
            gate = x @ weights[f"{prefix}/gate"].T
            f = self.decoder["ffn"]
            bias = "gate_bias" if f["kind"] == "gated" else "up_bias"
            if f[bias]:
                gate = gate + weights[f"layers/{layer}/ffn/{bias}"]
            return gate if predictor["signed"] else np.abs(gate)
        z = x @ weights[f"{prefix}/down"].T @ weights[f"{prefix}/up"].T
        if predictor["bias"]:
            z = z + weights[f"{prefix}/bias"]
        return 1 / (1 + np.exp(-z))

    def metadata_crc32c(self) -> str:
        """The sealed checksum of the documents."""
        text = self.hierarchy.texts()["zarr.json"]
        at = text.index(b'"metadata_crc32c":"') + 19
        return text[at : at + 8].decode()

    def _weights(self) -> dict[str, F64]:
        return {name: array.astype(np.float64) for name, array in self.decoded.items()}

    def _extent(self, name: str) -> Json:
        key = self.hierarchy.key(name)
        return {"key": key, "nbytes": len(self.hierarchy.payloads[key]), "offset": self.offsets.get(key, 0)}

    def _chosen(self, layer: int, neuron: int) -> Json:
        name, g = f"layers/{layer}/ffn/bundles", self.geometry
        key = self.hierarchy.key(name)
        start = neuron * g.stride
        row = self.hierarchy.payloads[key][start : start + g.row_nbytes]
        return {
            "nbytes": g.row_nbytes,
            "offset": self.offsets.get(key, 0) + start,
            "sha256": hashlib.sha256(row).hexdigest(),
        }

    def _hierarchy(self) -> Hierarchy:
        h, recipe = Hierarchy(), self.recipe
        attributes = {"flashfmt": recipe.manifest, "zarr_conventions": [CONVENTION]}
        h.documents[""] = {**group(), "attributes": attributes}
        for name, shape in called_for(self.manifest):
            if name not in recipe.compressed:
                encoding = recipe.encodings.get(name, recipe.residents if len(shape) == 2 else "f32")
                self._add_tensor(h, name, encoding, shape, encode(self._initial(name, shape), encoding))
        for layer, name in enumerate(self.bundle_names()):
            self._add_bundles(h, layer, name)
        for name, (encoding, shape, stored) in recipe.extensions.items():
            self._add_tensor(h, name, encoding, shape, stored)
        for name, (codec, values, frame) in recipe.compressed.items():
            h.add(name, tensor_document("f32", values.shape, frame, codec), frame)
            self.decoded[name] = values
            self.codecs[name] = codec["name"]
        for role, (filename, content) in recipe.files.items():
            h.add(f"files/{role}", file_document(filename, content, hashlib.sha256(content).hexdigest()), content)
        if recipe.liberties:
            take_liberties(h)
        return h

    def _add_tensor(
        self, h: Hierarchy, name: str, encoding: str, shape: tuple[int, ...], stored: npt.NDArray[Any]
    ) -> None:
        h.tensor(name, encoding, shape, stored)
        self.decoded[name] = stored if encoding in ("u8", "u32") else decode(stored, encoding, shape[-1])

    def _add_bundles(self, h: Hierarchy, layer: int, name: str) -> None:
        g = self.geometry
        shape = (g.n_neurons, len(g.parts), g.d_model)
        stored = encode(self._initial(name, shape), g.encoding)
        rows = [row.tobytes() for row in stored]
        payload = bundles_payload(rows, g)
        h.add(name, bundles_document(g, payload), payload)
        self.decoded[name] = decode(stored, g.encoding, g.d_model)
        checksums = np.array([crc32c(row) for row in rows], "<u4")
        self._add_tensor(h, f"layers/{layer}/ffn/bundle_crc32c", "u32", (g.n_neurons,), checksums)

    def _initial(self, name: str, shape: tuple[int, ...]) -> F32:
        """Weights of a size that keeps activations near 1."""
        seed = f"{self.recipe.name} {name}"
        if name.startswith("rotary/"):
            return np.array([10000.0 ** (-i / shape[0]) for i in range(shape[0])], np.float32)
        if name.endswith("norm/weight"):
            offset = self.decoder["norm"]["weight_offset"]
            return uniform(seed, shape, 0.25) + np.float32(1 - offset)
        if name.endswith("firing_frequency"):
            return np.abs(uniform(seed, shape))
        if name.endswith("aggregated_window"):
            return np.arange(1, shape[0] + 1, dtype=np.float32) / np.float32(shape[0] + 1)
        if len(shape) == 1:
            return uniform(seed, shape, 0.5)
        return uniform(seed, shape, 1.7 / shape[-1] ** 0.5 if "embedding" not in name else 1.0)


def take_liberties(h: Hierarchy) -> None:
    """Write the documents in every way that SPEC.md allows besides the usual one."""
    for document in h.documents.values():
        if document["node_type"] == "group":
            document["attributes"] |= {"a": {"metadata": [1, None]}}
            continue
        document["storage_transformers"] = []
        document["dimension_names"] = [None] * len(document["shape"])
        document["chunk_key_encoding"] = {"name": "default"}
        document["fill_value"] = -0.0
        document["attributes"] |= {"_ARRAY_DIMENSIONS": ["x"]}
        document["attributes"]["flashfmt"] |= {"of_a_later_version": {"crc32c": 1}}
        document["codecs"][0].get("configuration", {}).pop("index_location", None)
    h.documents["extensions"].pop("attributes")
    for key in h.texts():
        if key != "zarr.json":
            h.edits[key] = _spread_out


def _spread_out(text: bytes) -> bytes:
    """The same document in another order, with white space, and with escapes."""
    spread = json.dumps(json.loads(text), indent="\t", sort_keys=True).replace("/", "\\/")
    return b" \r\n" + spread.replace('"zarr_format"', '"\\u007aarr_format"').encode() + b"\n"


def summary(array: npt.NDArray[Any]) -> Json:
    """SHA-256 of the little-endian values in C order, and the bits of the first, middle and last."""
    flat = np.ascontiguousarray(array).reshape(-1)
    flat = flat.astype(STORAGE["u32"] if flat.dtype.kind == "u" else "<f4")
    words = flat.view("<u4")
    samples = [f"{int(words[i]):08x}" for i in (0, len(words) // 2, len(words) - 1)]
    return {"samples": samples, "sha256": hashlib.sha256(flat.tobytes()).hexdigest()}


def random_inputs(seed: str, n: int, width: int) -> F32:
    """Inputs for a predictor."""
    return uniform(seed, (n, width), 2.0)


def little_endian(array: F32) -> bytes:
    """float32 bytes."""
    return struct.pack(f"<{array.size}f", *array.reshape(-1).tolist())


def random_bytes(seed: str, nbytes: int) -> npt.NDArray[np.uint8]:
    """uint8 array of arbitrary bytes."""
    return np.frombuffer(stream(seed, nbytes), np.uint8)
