"""What must hold when a hostile model is opened and everything in it is read; `examine` raises Finding where not.

Knows: the reader's promises, and a second, independent reading of what it accepts. Does not know: mutations, engines.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc, zstd

import flashfmt
from flashfmt.errors import FlashError, FlashFormatError, UnsupportedError

MAX_ERROR_CHARACTERS = 4096


class Finding(Exception):  # noqa: N818 - it is not an error of the program that raises it
    """The reader broke a promise; `signature` is equal for findings of one cause."""

    def __init__(self, message: str, signature: str | None = None) -> None:
        self.signature = signature or message
        super().__init__(message)


def examine(path: Path) -> set[str]:
    """Open a model, read everything in it by every way there is, verify it.

    Returns
    -------
    The outcomes: rule ids of the errors met, and `accepted` where the model passed verification.

    Raises
    ------
    Finding
        For anything but success or an orderly refusal.
    """
    outcomes: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = _attempt(lambda: flashfmt.open(path), outcomes)
        if model is not None:
            try:
                _read_everything(model, outcomes)
            finally:
                model.close()
    return outcomes


def _attempt(action: Callable[[], Any], outcomes: set[str]) -> Any:
    """Result of an action, or None where it refuses in order; anything else is a finding."""
    try:
        return action()
    except FlashError as error:
        outcomes.add(_outcome(error))
        return None
    except Finding:
        raise
    except Exception as error:
        raise Finding(f"{type(error).__name__}: {error}"[:500], _signature(error)) from error


def _outcome(error: FlashError) -> str:
    """Rule id of an orderly refusal; a refusal that is not in order is a finding."""
    text = str(error)
    name = type(error).__name__
    if len(text) > MAX_ERROR_CHARACTERS or not text.isprintable():
        raise Finding(f"{name} whose text is long or not printable: {text[:200]!a}", f"text of {error.rule}")
    if isinstance(error, FlashFormatError):
        if error.rule not in flashfmt.RULES:
            raise Finding(f"{name} without a rule: {text}", _signature(error))
        return error.rule
    if isinstance(error, UnsupportedError):
        return error.rule or "unsupported"
    raise Finding(f"{name}, though the operating system did nothing wrong: {text}", _signature(error))


def _signature(error: BaseException) -> str:
    """Kind of an exception and where in the package it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{Path(f.filename).name}:{f.name}" for f in frames if "flashfmt" in f.filename]
    kind = type(error).__name__
    return f"{kind} {re.sub(r'[0-9]+', 'N', str(error))[:60] if kind.endswith('Warning') else ''} {places[-1:]}"


def _read_everything(model: flashfmt.FlashModel, outcomes: set[str]) -> None:
    for name, info in model.tensors.items():
        _attempt(lambda name=name: model.tensor(name, verify=True), outcomes)
        tensor = _attempt(lambda name=name: model.tensor(name), outcomes)
        if tensor is not None:
            if tensor.data.nbytes != info.nbytes or tensor.data.shape != info.storage_shape:
                raise Finding(f"{name} has {tensor.data.shape}, not {info.storage_shape}", "shape of a tensor")
            if info.encoding.is_weight:
                values = _attempt(tensor.decode, outcomes)
                if values.shape != info.shape or values.dtype != np.float32:
                    raise Finding(f"{name} decodes to {values.shape}, not {info.shape}", "shape of decoded values")
    for layer, bundles_info in enumerate(model.layers):
        bundles = _attempt(lambda layer=layer: model.bundles(layer), outcomes)
        if bundles is not None:
            neurons = np.arange(bundles_info.geometry.n_neurons)
            _attempt(lambda b=bundles, n=neurons: b.verify(n), outcomes)
            _attempt(lambda b=bundles, n=neurons: b.decode(n), outcomes)
            for neuron in neurons:
                _attempt(lambda b=bundles, n=neuron: b.bundle(n), outcomes)
        _attempt(lambda layer=layer: model.predictor(layer), outcomes)
        _attempt(lambda layer=layer: model.statistics(layer), outcomes)
    for role in model.files:
        _attempt(lambda role=role: model.file(role), outcomes)
    before = len(outcomes)
    n_read: list[int] = []
    verified = _attempt(lambda: model.verify(n_read.append) or True, outcomes)
    if verified:
        if sum(n_read) != model.verify_nbytes:
            raise Finding(f"verification reported {sum(n_read)} of {model.verify_nbytes} bytes", "progress")
        if before:
            raise Finding(f"verified, yet refused in use: {sorted(outcomes)}", "verified but refused")
        _compare(model)
        outcomes.add("accepted")


def _compare(model: flashfmt.FlashModel) -> None:
    """Read a verified model a second time without the package, and compare every value and checksum."""
    stored = _stored(model)
    documents = {key: json.loads(raw) for key, raw in stored.items() if key.rpartition("/")[2] == "zarr.json"}
    _compare_metadata(stored, documents)
    for key, document in documents.items():
        if document["node_type"] != "array":
            continue
        name = key.removesuffix("/zarr.json")
        ours = document["attributes"]["flashfmt"]
        payload = stored[f"{name}/c" + "/0" * len(document["shape"])]
        _expect(ours["crc32c"] == f"{google_crc32c.value(payload):08x}", f"{name}: crc32c")
        if ours["kind"] == "file":
            content = model.file(name.removeprefix("files/"))
            _expect(content == payload, f"{name}: content")
            _expect(ours["sha256"] == hashlib.sha256(payload).hexdigest(), f"{name}: sha256")
        elif ours["kind"] == "bundles":
            _compare_bundles(model, name, payload)
        else:
            _expect(model.tensor(name).data.tobytes() == _values(document, payload), f"{name}: values")


def _stored(model: flashfmt.FlashModel) -> dict[str, bytes]:
    """Keys and bytes, by Python's own ZIP reader or from the directory."""
    if model.container == "directory":
        files = (path for path in model.path.rglob("*") if path.is_file())
        return {path.relative_to(model.path).as_posix(): path.read_bytes() for path in files}
    with zipfile.ZipFile(model.path) as archive:
        names = archive.namelist()
        _expect(len(set(names)) == len(names), "names are unique")
        return {name: archive.read(name) for name in names}


def _compare_metadata(stored: dict[str, bytes], documents: dict[str, Any]) -> None:
    stated = documents["zarr.json"]["attributes"]["flashfmt"]["metadata_crc32c"]
    head, field, tail = stored["zarr.json"].partition(b'"metadata_crc32c":"')
    _expect(tail[:8].decode() == stated, "metadata_crc32c stands where it is computed")
    others = b"".join(stored[key] for key in sorted(documents.keys() - {"zarr.json"}))
    crc = google_crc32c.value(others + head + field + b"0" * 8 + tail[8:])
    _expect(f"{crc:08x}" == stated, "metadata_crc32c")


def _compare_bundles(model: flashfmt.FlashModel, name: str, payload: bytes) -> None:
    """Find every bundle by the shard index, as Zarr does, and by address, as engines do."""
    layer = int(name.split("/")[1])
    bundles = model.bundles(layer)
    n = bundles.info.geometry.n_neurons
    sums = model.tensor(f"layers/{layer}/ffn/bundle_crc32c").data
    for neuron in range(n):
        offset, nbytes = struct.unpack_from("<QQ", payload, len(payload) - 4 - 16 * (n - neuron))
        row = payload[offset : offset + nbytes]
        _expect(bundles.bundle(neuron).tobytes() == row, f"{name}: bundle")
        _expect(int(sums[neuron]) == google_crc32c.value(row), f"{name}: bundle_crc32c")
    _expect(
        bool(np.isfinite(bundles.decode(range(n))).all()) or _may_overflow(bundles.info.encoding), f"{name}: finite"
    )


def _may_overflow(encoding: flashfmt.Encoding) -> bool:
    """Whether a finite scale can still make a weight that is not."""
    return encoding is flashfmt.Encoding.Q8


def _values(document: dict[str, Any], payload: bytes) -> bytes:
    """Values of a tensor; a compressed one twice, into memory of zeros and of ones, to find bytes never written."""
    codecs = [codec["name"] for codec in document["codecs"]]
    if len(codecs) == 1:
        return payload
    itemsize = np.dtype(document["data_type"]).itemsize
    outs = [np.full(math.prod(document["shape"]) * itemsize, fill, np.uint8) for fill in (0, 255)]
    for out in outs:
        (zstd if codecs[1] == "zstd" else blosc).decompress(payload, out)
    _expect(outs[0].tobytes() == outs[1].tobytes(), "every decompressed byte is written")
    return outs[0].tobytes()


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise Finding(f"accepted, but wrong: {what}", f"accepted, but wrong: {what.rpartition(': ')[2]}")
