"""A small model written byte by byte from SPEC.md, without any of flashfmt's own code, and ways to damage it."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

D_MODEL, D_FF, N_LAYERS, VOCAB, N_HEADS, N_KV_HEADS, HEAD_DIM, RANK, WINDOW = 64, 6, 2, 32, 4, 2, 16, 4, 5
DTYPES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "uint16",
    "q8": "uint8",
    "q4": "uint8",
    "u8": "uint8",
    "u32": "uint32",
}
ITEMSIZE = {"float32": 4, "float16": 2, "uint16": 2, "uint8": 1, "uint32": 4}
PART_NBYTES = {"f32": 256, "f16": 128, "bf16": 128, "q8": 128, "q4": 128}  # of 64 weights


def crc32c(raw: bytes) -> str:
    return f"{google_crc32c.value(raw):08x}"


def plain(weights: np.ndarray, encoding: str) -> bytes:
    if encoding == "bf16":
        return (weights.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return weights.astype({"f32": "<f4", "f16": "<f2", "u32": "<u4", "u8": "u1"}[encoding]).tobytes()


def quantised(rng: np.random.Generator, n_rows: int, encoding: str) -> bytes:
    """Rows of 64 weights: scales, zeros up to byte 64, values, zeros up to byte 128."""
    rows = np.zeros((n_rows, 128), np.uint8)
    if encoding == "q8":
        rows[:, :4] = rng.uniform(0.01, 0.1, (n_rows, 1)).astype("<f4").view(np.uint8)
        rows[:, 64:] = rng.integers(-127, 128, (n_rows, 64)).astype(np.int8).view(np.uint8)
    else:
        rows[:, :4] = rng.uniform(-0.1, 0.1, (n_rows, 2)).astype("<f2").view(np.uint8)
        rows[:, 64:96] = rng.integers(0, 256, (n_rows, 32))
    return rows.tobytes()


@dataclass
class TinyArray:
    """One array: its document, its payload, and where the payload must be aligned to."""

    document: dict[str, Any]
    payload: bytes
    alignment: int = 64

    @property
    def ours(self) -> dict[str, Any]:
        return self.document["attributes"]["flashfmt"]

    def replace(self, payload: bytes, **attributes: Any) -> None:
        """New payload with a checksum that matches it."""
        self.payload = payload
        self.ours.update(attributes, crc32c=crc32c(payload))


@dataclass
class TinyZip:
    """A `.flash` file in memory; offsets by key."""

    data: bytearray = field(default_factory=bytearray)
    local: dict[str, int] = field(default_factory=dict)
    payload: dict[str, int] = field(default_factory=dict)
    central: dict[str, int] = field(default_factory=dict)
    end64: int = 0

    def patch(self, offset: int, form: str, value: int) -> None:
        struct.pack_into("<" + form, self.data, offset, value)


def zip_model(entries: list[tuple[str, bytes, int]]) -> TinyZip:
    """The single-file container, as SPEC.md describes it."""
    z = TinyZip()
    for key, payload, alignment in entries:
        name = key.encode()
        z.local[key] = len(z.data)
        fixed = len(z.data) + 30 + len(name) + 20 + 6
        n_padding = -fixed % alignment
        z.data += struct.pack(
            "<IHHHHHIIIHH", 0x04034B50, 45, 0x0800, 0, 0, 0x21, zlib.crc32(payload), 0xFFFFFFFF, 0xFFFFFFFF,
            len(name), 26 + n_padding,
        )  # fmt: skip
        z.data += name + struct.pack("<HHQQ", 1, 16, len(payload), len(payload))
        z.data += struct.pack("<HHH", 0xD935, 2 + n_padding, alignment) + bytes(n_padding)
        z.payload[key] = len(z.data)
        z.data += payload
    start = len(z.data)
    for key, payload, _ in entries:
        name = key.encode()
        z.central[key] = len(z.data)
        z.data += struct.pack(
            "<IHHHHHHIIIHHHHHII", 0x02014B50, 0x032D, 45, 0x0800, 0, 0, 0x21, zlib.crc32(payload), 0xFFFFFFFF,
            0xFFFFFFFF, len(name), 28, 0, 0, 0, 0o100644 << 16, 0xFFFFFFFF,
        )  # fmt: skip
        z.data += name + struct.pack("<HHQQQ", 1, 24, len(payload), len(payload), z.local[key])
    z.end64, n = len(z.data), len(entries)
    z.data += struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 0x032D, 45, 0, 0, n, n, z.end64 - start, start)
    z.data += struct.pack("<IIQI", 0x07064B50, 0, z.end64, 1)
    z.data += struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return z


class TinyModel:
    """A complete model of two layers. Change `manifest`, `arrays`, `groups` and `extra`, then write it."""

    def __init__(self, encoding: str = "f16", *, residents: str = "f16", seed: int = 7) -> None:
        self.rng = np.random.default_rng(seed)
        self.encoding = encoding
        self.residents = residents
        self.arrays: dict[str, TinyArray] = {}
        self.extra: dict[str, bytes] = {}
        self.groups: dict[str, dict[str, Any]] = {}
        self.manifest = self._manifest()
        self.root_attributes: dict[str, Any] = {"flashfmt": self.manifest, "zarr_conventions": [{"name": "flashfmt"}]}
        self._residents()
        for layer in range(N_LAYERS):
            self._layer(layer)
        self.add_file("tokenizer", "tokenizer.json", b'{"model": "tiny"}')
        self.add_file("chat_template", "chat_template.jinja", "{{ 'grüße' }}".encode())

    def _manifest(self) -> dict[str, Any]:
        return {
            "version": "1.0",
            "metadata_crc32c": "00000000",
            "name": "tiny",
            "decoder": {
                "vocab_size": VOCAB,
                "d_model": D_MODEL,
                "context_tokens": 128,
                "embedding": {"d_embed": D_MODEL},
                "rotary": [{"name": "main", "n_dims": HEAD_DIM}],
                "norm": {"kind": "rms_norm", "eps": 1e-5},
                "attention": {"n_heads": N_HEADS, "n_kv_heads": N_KV_HEADS, "head_dim": HEAD_DIM, "scale": 0.25},
                "ffn": {"kind": "gated", "d_ff": D_FF, "activation": {"kind": "silu"}, "up_bias": True},
                "logits": {"tied": False},
                "layers": [{"rotary": "main"}, {}],
            },
            "provenance": {"writer": "tests", "source": "random", "source_format": "synthetic"},
            "tokens": {"bos": 1, "eos": [2]},
            "predictors": [
                {"layer": 1, "kind": "low_rank", "tap": {"layer": 0}, "threshold": 0.5, "rank": RANK, "bias": True}
            ],
            "statistics": {"n_tokens": 100, "text": "none", "window_tokens": WINDOW},
        }

    def add(
        self, name: str, encoding: str, shape: list[int], payload: bytes, codec: dict[str, Any] | None = None
    ) -> None:
        """A tensor; `payload` as stored."""
        storage = [shape[0], PART_NBYTES[encoding]] if encoding in ("q8", "q4") else shape
        ours = {"kind": "tensor", "encoding": encoding, "shape": shape, "crc32c": crc32c(payload)}
        document = array_document(storage, DTYPES[encoding], ours)
        if codec is not None:
            document["codecs"].append(codec)
        self.arrays[name] = TinyArray(document, payload)

    def vector(self, name: str, n: int) -> None:
        self.add(name, "f32", [n], plain(self.rng.normal(size=n), "f32"))

    def matrix(self, name: str, n_rows: int, n_cols: int) -> None:
        encoding = self.residents if n_cols % 64 == 0 else "f32"
        if encoding in ("q8", "q4"):
            self.add(name, encoding, [n_rows, n_cols], quantised(self.rng, n_rows, encoding))
        else:
            self.add(name, encoding, [n_rows, n_cols], plain(self.rng.normal(size=(n_rows, n_cols)), encoding))

    def add_file(self, role: str, filename: str, content: bytes) -> None:
        digest = hashlib.sha256(content).hexdigest()
        ours = {"kind": "file", "filename": filename, "sha256": digest, "crc32c": crc32c(content)}
        self.arrays[f"files/{role}"] = TinyArray(array_document([len(content)], "uint8", ours), content)

    def _residents(self) -> None:
        self.matrix("embedding/tokens", VOCAB, D_MODEL)
        self.matrix("logits/weight", VOCAB, D_MODEL)
        self.vector("final_norm/weight", D_MODEL)
        self.vector("rotary/main", HEAD_DIM // 2)

    def _layer(self, layer: int) -> None:
        prefix = f"layers/{layer}"
        self.vector(f"{prefix}/attention/norm/weight", D_MODEL)
        self.matrix(f"{prefix}/attention/q/weight", N_HEADS * HEAD_DIM, D_MODEL)
        self.matrix(f"{prefix}/attention/k/weight", N_KV_HEADS * HEAD_DIM, D_MODEL)
        self.matrix(f"{prefix}/attention/v/weight", N_KV_HEADS * HEAD_DIM, D_MODEL)
        self.matrix(f"{prefix}/attention/output/weight", D_MODEL, N_HEADS * HEAD_DIM)
        self.vector(f"{prefix}/ffn/norm/weight", D_MODEL)
        self.vector(f"{prefix}/ffn/up_bias", D_FF)
        frequency = np.linspace(0, 1, D_FF)
        self.add(f"{prefix}/statistics/firing_frequency", "f32", [D_FF], plain(frequency, "f32"))
        self.add(f"{prefix}/statistics/aggregated_window", "f32", [WINDOW], plain(np.linspace(0.1, 1, WINDOW), "f32"))
        if layer == 1:
            self.matrix(f"{prefix}/predictor/down", RANK, D_MODEL)
            self.matrix(f"{prefix}/predictor/up", D_FF, RANK)
            self.vector(f"{prefix}/predictor/bias", D_FF)
        n_rows = D_FF * 3
        if self.encoding in ("q8", "q4"):
            raw = quantised(self.rng, n_rows, self.encoding)
        else:
            raw = plain(self.rng.normal(size=(n_rows, D_MODEL)), self.encoding)
        row_nbytes = len(raw) // D_FF
        self.set_bundles(layer, [raw[i * row_nbytes : (i + 1) * row_nbytes] for i in range(D_FF)])

    def set_bundles(self, layer: int, rows: list[bytes], stride: int | None = None, alignment: int = 512) -> None:
        """Bundles with their index and checksums."""
        row_nbytes = len(rows[0])
        stride = stride or -(-row_nbytes // alignment) * alignment
        index = b"".join(struct.pack("<QQ", i * stride, row_nbytes) for i in range(len(rows)))
        payload = b"".join(row.ljust(stride, b"\0") for row in rows) + index + bytes.fromhex(crc32c(index))[::-1]
        length = row_nbytes // 3 // ITEMSIZE[DTYPES[self.encoding]]
        ours = {
            "kind": "bundles", "encoding": self.encoding, "parts": ["gate", "up", "down"], "n_neurons": len(rows),
            "d_model": D_MODEL, "part_nbytes": row_nbytes // 3, "row_nbytes": row_nbytes, "stride": stride,
            "alignment": alignment, "crc32c": crc32c(payload),
        }  # fmt: skip
        document = array_document([len(rows), 3, length], DTYPES[self.encoding], ours)
        sharding = {
            "chunk_shape": [1, 3, length],
            "codecs": document["codecs"],
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "index_location": "end",
        }
        document["codecs"] = [{"name": "sharding_indexed", "configuration": sharding}]
        self.arrays[f"layers/{layer}/ffn/bundles"] = TinyArray(document, payload, 16384)
        sums = np.array([int(crc32c(row), 16) for row in rows])
        self.add(f"layers/{layer}/ffn/bundle_crc32c", "u32", [len(rows)], plain(sums, "u32"))

    def rows(self, layer: int) -> list[bytes]:
        """The bytes of each bundle of a layer."""
        array = self.arrays[f"layers/{layer}/ffn/bundles"]
        stride, row_nbytes = array.ours["stride"], array.ours["row_nbytes"]
        return [array.payload[i * stride : i * stride + row_nbytes] for i in range(array.ours["n_neurons"])]

    def edit_payload(self, name: str, offset: int, raw: bytes) -> None:
        """Overwrite bytes of a payload and give it a matching checksum."""
        array = self.arrays[name]
        array.replace(array.payload[:offset] + raw + array.payload[offset + len(raw) :])

    def documents(self) -> dict[str, bytes]:
        groups = dict(self.groups)
        for name in self.arrays:
            segments = name.split("/")
            for depth in range(1, len(segments)):
                groups.setdefault("/".join(segments[:depth]), group_document({}))
        documents = {f"{name}/zarr.json": dump(group) for name, group in groups.items() if group}
        documents |= {f"{name}/zarr.json": dump(array.document) for name, array in self.arrays.items()}
        documents |= {key: raw for key, raw in self.extra.items() if key.endswith("/zarr.json")}
        return documents | {"zarr.json": seal(dump(group_document(self.root_attributes)), documents)}

    def entries(self) -> list[tuple[str, bytes, int]]:
        """Key, bytes and alignment of everything, in file order."""
        documents = self.documents()
        ordered = sorted(documents, key=lambda key: (key.count("/"), key))
        entries = [(key, documents[key], 64) for key in ordered]
        for name, array in self.arrays.items():
            shape = array.document["shape"]
            rank = len(shape) if isinstance(shape, list) else 1  # a test may have put anything there
            entries.append((f"{name}/c" + "/0" * rank, array.payload, array.alignment))
        return entries + [(key, raw, 64) for key, raw in self.extra.items() if not key.endswith("zarr.json")]

    def zip(self) -> TinyZip:
        return zip_model(self.entries())

    def write_file(self, path: Path) -> Path:
        path.write_bytes(self.zip().data)
        return path

    def write_directory(self, path: Path) -> Path:
        for key, payload, _ in self.entries():
            (path / key).parent.mkdir(parents=True, exist_ok=True)
            (path / key).write_bytes(payload)
        return path

    def write(self, path: Path, container: str) -> Path:
        return self.write_file(path) if container == "file" else self.write_directory(path)


def group_document(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def array_document(shape: list[int], data_type: str, ours: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {"name": "bytes"}
    if data_type != "uint8":
        values["configuration"] = {"endian": "little"}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [values],
        "attributes": {"flashfmt": ours},
    }


def dump(document: Any) -> bytes:
    return document if isinstance(document, bytes) else json.dumps(document, separators=(",", ":")).encode()


def seal(root: bytes, others: dict[str, bytes]) -> bytes:
    """The root document with the checksum of all documents in its place."""
    field = b'"metadata_crc32c":"00000000"'
    text = b"".join(others[key] for key in sorted(others)) + root
    return root.replace(field, b'"metadata_crc32c":"%s"' % crc32c(text).encode())


@pytest.fixture
def tiny() -> type[TinyModel]:
    """The class of small models; call it to get one."""
    return TinyModel


@pytest.fixture
def model() -> TinyModel:
    """A small valid model, to be changed by the test."""
    return TinyModel()


@pytest.fixture(params=["file", "directory"])
def container(request: pytest.FixtureRequest) -> str:
    """Both containers in turn."""
    return request.param


@pytest.fixture
def pack_zip() -> Any:
    """The function that writes entries as a single file."""
    return zip_model


class Writing:
    """Writes again, through FlashWriter, what an open model holds."""

    @staticmethod
    def declaration(source: Any, codec: str = "raw") -> dict[str, Any]:
        """What FlashWriter is told of the arrays of a model."""
        from flashfmt import BundlesSpec, FileSpec, TensorSpec

        tensors = [t for name, t in source.tensors.items() if not name.endswith("bundle_crc32c")]
        return {
            "manifest": source.manifest,
            "tensors": [TensorSpec(t.name, t.encoding, t.shape, codec) for t in tensors],
            "bundles": [
                BundlesSpec(b.layer, b.encoding, b.parts, b.geometry.n_neurons, b.d_model) for b in source.layers
            ],
            "files": [FileSpec.of(role, file.filename, source.file(role)) for role, file in source.files.items()],
        }

    @classmethod
    def fill(cls, writer: Any, source: Any) -> None:
        """Give a writer every array that it does not have: files, tensors, bundles."""
        for role in source.files:
            writer.write_file(role, source.file(role))
        for name in source.tensors:
            if not name.endswith("bundle_crc32c") and not writer.is_done(name):
                writer.write_tensor(name, source.tensor(name).data)
        for info in source.layers:
            if not writer.is_done(info.name):
                cls.fill_bundles(writer, source, info.layer)

    @staticmethod
    def fill_bundles(writer: Any, source: Any, layer: int, n_block: int = 4) -> None:
        """Give a writer the bundles of a layer, in blocks."""
        bundles = source.bundles(layer)
        rows = np.stack([bundles.bundle(i) for i in range(source.layers[layer].geometry.n_neurons)])
        with writer.bundles(layer) as sink:
            for start in range(0, len(rows), n_block):
                sink.append(rows[start : start + n_block])

    @classmethod
    def copy(cls, source: Any, path: Path, *, codec: str = "raw", **options: Any) -> Path:
        """Write all of a model to `path`."""
        from flashfmt import FlashWriter

        with FlashWriter(path, **cls.declaration(source, codec), **{"fingerprint": "test"} | options) as writer:
            cls.fill(writer, source)
        return path


@pytest.fixture
def writing() -> type[Writing]:
    """Writing models through FlashWriter."""
    return Writing


@pytest.fixture
def source(model: TinyModel, tmp_path: Path) -> Any:
    """The small model, open; a source of values."""
    import flashfmt

    with flashfmt.open(model.write_file(tmp_path / "source.flash")) as opened:
        yield opened


@pytest.fixture
def content() -> Any:
    """A function: all bytes of a file, or of every file of a directory by key."""

    def read(path: Path) -> Any:
        if path.is_file():
            return path.read_bytes()
        return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}

    return read
