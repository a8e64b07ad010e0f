"""Reading every byte of a model and checking what only bytes can show (SPEC.md, rules marked *verify*).

Knows: all payloads, in blocks of bounded size. Does not know: how models are run.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

import google_crc32c
import numpy as np

from flashfmt.bundles import check_bundle
from flashfmt.checksum import require_crc32c
from flashfmt.container import Bytes, Container
from flashfmt.encodings import Array, Encoding, PartLayout, part_layout, scales
from flashfmt.errors import ChecksumError, FlashFormatError
from flashfmt.manifest import bundle_checksums_name
from flashfmt.shard_index import check_shard_index
from flashfmt.tensor import BundlesInfo, FileInfo, TensorInfo, decompress, stored_tensor
from flashfmt.validate import Contents
from flashfmt.zarr_metadata import chunk_key

BLOCK_NBYTES: Final = 8 << 20
BUNDLES_RANK: Final = 3

_UNSIGNED: Final = {Encoding.F32: "<u4", Encoding.F16: "<u2", Encoding.BF16: "<u2"}
_EXPONENT_BITS: Final = {Encoding.F32: 0x7F80_0000, Encoding.F16: 0x7C00, Encoding.BF16: 0x7F80}


def verify_contents(container: Container, contents: Contents, progress: Callable[[int], None]) -> None:
    """Check every payload of a model in the order in which they lie; see `FlashModel.verify`."""
    _Verification(container, contents, progress).run()


def check_file(info: FileInfo, crc32c: int, sha256: str) -> None:
    """Compare the checksums of an embedded file's bytes with those stated; ChecksumError (FF-SUM-6)."""
    where, message = f"files/{info.role}", "the embedded file is damaged"
    path = info.extent.path
    require_crc32c(crc32c, info.crc32c, path=path, where=where, rule="FF-SUM-6", message=message)
    if sha256 != info.sha256:
        raise ChecksumError(message, path=path, where=where, rule="FF-SUM-6", expected=info.sha256, actual=sha256)


class _Verification:
    """One pass over a container."""

    def __init__(self, container: Container, contents: Contents, progress: Callable[[int], None]) -> None:
        self.container = container
        self.contents = contents
        self.progress = progress
        self.checks: dict[str, Callable[[str], None]] = {}
        for tensor in contents.tensors.values():
            self.checks[chunk_key(tensor.name, len(tensor.storage_shape))] = partial(self._tensor, tensor)
        for bundles in contents.layers:
            self.checks[chunk_key(bundles.name, BUNDLES_RANK)] = partial(self._bundles, bundles)
        for file in contents.files.values():
            self.checks[chunk_key(f"files/{file.role}", 1)] = partial(self._file, file)

    def run(self) -> None:
        """Check every key; documents have been checked when the model was opened, but for their CRC-32."""
        for key in self.container.extents:
            check = self.checks.get(key)
            if check is not None:
                check(key)
            else:
                _exhaust(self._blocks(key, BLOCK_NBYTES))
        for layer in range(self.contents.manifest.decoder.n_layers if self.contents.manifest.statistics else 0):
            self._statistics(f"layers/{layer}/statistics")

    def _file(self, info: FileInfo, key: str) -> None:
        crc, sha256 = 0, hashlib.sha256()
        for block in self._blocks(key, BLOCK_NBYTES):
            crc = google_crc32c.extend(crc, block)
            sha256.update(block.data)
        check_file(info, crc, sha256.hexdigest())

    def _tensor(self, info: TensorInfo, key: str) -> None:
        part = part_layout(info.encoding, info.shape[-1])
        unit = part.nbytes if info.encoding.is_quantised else info.encoding.storage_dtype.itemsize
        step = _step(unit)
        crc = first = 0
        problem: Problem | None = None
        for block in self._blocks(key, step):
            crc = google_crc32c.extend(crc, block)
            if info.codec == "raw" and problem is None:
                problem = _problem(block.reshape(-1, unit), part, first)
                first += block.nbytes // unit
        where = info.name
        message = "the tensor is damaged"
        require_crc32c(crc, info.crc32c, path=info.extent.path, where=where, rule="FF-SUM-3", message=message)
        if info.codec != "raw":
            values = decompress(info, self.container.view(key))
            blocks = (values[start : start + step] for start in range(0, values.nbytes, step))
            for index, block in enumerate(blocks):
                problem = problem or _problem(block.reshape(-1, unit), part, index * (step // unit))
        if problem is not None:
            problem.fail(info.extent.path, where)

    def _bundles(self, info: BundlesInfo, key: str) -> None:
        geometry, path = info.geometry, info.extent.path
        checksums = self._values(self.contents.tensors[bundle_checksums_name(info.layer)])
        crc = first = 0
        for block in self._blocks(key, _step(geometry.stride), geometry.index_offset):
            crc = google_crc32c.extend(crc, block)
            if first == geometry.n_neurons:
                check_shard_index(block.tobytes(), geometry, path=path, where=info.name)
            else:
                strides = block.reshape(-1, geometry.stride)
                self._check_strides(info, strides, first, checksums)
                first += len(strides)
        message = "the bundles are damaged"
        require_crc32c(crc, info.crc32c, path=path, where=info.name, rule="FF-SUM-4", message=message)

    def _check_strides(self, info: BundlesInfo, strides: Bytes, first: int, checksums: Array) -> None:
        """Check consecutive bundles, uint8 [n, stride], from neuron `first` on."""
        rows, gaps = np.split(strides, [info.geometry.row_nbytes], axis=1)
        for neuron, row in enumerate(rows, first):
            check_bundle(info, neuron, row, int(checksums[neuron]))
        if gaps.any():
            neuron = first + int(gaps.any(axis=1).argmax())
            Problem("FF-BND-8", "the gap after a bundle is not zero", neuron).fail(info.extent.path, info.name)
        parts = rows.reshape(len(rows) * len(info.parts), info.part.nbytes)
        problem = _problem(parts, info.part, 0)
        if problem is not None:
            neuron = first + problem.index // len(info.parts)
            Problem(problem.rule, problem.message, neuron).fail(info.extent.path, info.name)

    def _statistics(self, prefix: str) -> None:
        frequency = self.contents.tensors[f"{prefix}/firing_frequency"]
        values = self._values(frequency)
        outside = (values < 0) | (values > 1)
        if outside.any():
            problem = Problem("FF-STAT-1", "a firing frequency is outside [0, 1]", int(outside.argmax()))
            problem.fail(frequency.extent.path, frequency.name)
        window = self.contents.tensors[f"{prefix}/aggregated_window"]
        shares = self._values(window)
        decreases = shares < np.concatenate((np.zeros(1, shares.dtype), shares[:-1]))
        if decreases.any():
            problem = Problem("FF-STAT-2", "the aggregated window decreases", int(decreases.argmax()))
            problem.fail(window.extent.path, window.name)

    def _values(self, info: TensorInfo) -> Array:
        return stored_tensor(info, self.container.view(chunk_key(info.name, len(info.storage_shape)))).data

    def _blocks(self, key: str, step: int, split: int | None = None) -> Iterator[Bytes]:
        """Bytes of a key in blocks of `step`, what follows `split` as one block; then checks the container's CRC-32.

        The blocks share one buffer: each is valid until the next.
        """
        nbytes = self.container.extents[key].nbytes
        split = nbytes if split is None else split
        ranges = [(start, min(start + step, split)) for start in range(0, split, step)]
        if split < nbytes:
            ranges.append((split, nbytes))
        buffer = np.empty(max((stop - start for start, stop in ranges), default=0), np.uint8)
        crc = 0
        for start, stop in ranges:
            block = buffer[: stop - start]
            self.container.read_into(key, start, block)
            crc = zlib.crc32(block.data, crc)
            yield block
            self.progress(block.nbytes)
        stated = self.container.checksums.get(key, crc)
        if crc != stated:
            raise ChecksumError(
                "the entry does not match its CRC-32",
                path=self.container.path,
                where=key,
                rule="FF-ZIP-13",
                expected=f"{stated:08x}",
                actual=f"{crc:08x}",
            )


@dataclass(frozen=True, slots=True)
class Problem:
    """A value that breaks a rule: `index` is its row, neuron or position."""

    rule: str
    message: str
    index: int

    def fail(self, path: Path, name: str) -> NoReturn:
        """Raise it for the array `name`."""
        raise FlashFormatError(self.message, path=path, where=f"{name}[{self.index}]", rule=self.rule)


def _problem(rows: Bytes, part: PartLayout, first: int) -> Problem | None:
    """First bad value of encoded rows, uint8 [n, nbytes], the first of which has the index `first`."""
    encoding = part.encoding
    if encoding.is_quantised:
        padding = rows[:, part.scales_nbytes : part.values_offset].any(axis=1)
        padding |= rows[:, part.values_offset + _values_nbytes(part) :].any(axis=1)
        if padding.any():
            return Problem("FF-TEN-5", "the padding of an encoded row is not zero", first + int(padding.argmax()))
        bad = ~np.isfinite(scales(rows, part)).all(axis=1)
        message = "a scale is not finite"
    elif encoding.is_weight:
        values = np.ascontiguousarray(rows).view(_UNSIGNED[encoding])
        mask = values.dtype.type(_EXPONENT_BITS[encoding])
        bad = ((values & mask) == mask).any(axis=1)
        message = "a weight is not finite"
    else:
        return None
    return Problem("FF-TEN-4", message, first + int(bad.argmax())) if bad.any() else None


def _values_nbytes(part: PartLayout) -> int:
    return part.n_values if part.encoding is Encoding.Q8 else part.n_values // 2


def _step(unit: int) -> int:
    """Size of the blocks in which records of `unit` bytes are read."""
    return max(1, BLOCK_NBYTES // unit) * unit


def _exhaust(blocks: Iterator[Bytes]) -> None:
    for _ in blocks:
        pass
