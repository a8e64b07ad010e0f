"""The tensors that stay in DRAM: everything the decoder needs except the bundles.

A token embedding that the logits do not share is not among them: a token needs one row of it, read from flash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from flashfmt import FlashModel, TensorInfo
from flashfmt.encodings import Encoding
from flashfmt.errors import ChecksumError
from flashfmt.layout import round_up
from flashfmt.manifest import required_arrays
from reference_engine.backends import Backend, Matrix
from reference_engine.flash_io import IO_ALIGNMENT, DirectFile, IoCounters, aligned_empty
from reference_engine.loading import run_side_by_side

F32 = npt.NDArray[np.float32]
EMBEDDING = "embedding/tokens"
POSITIONS = "embedding/positions"
_NOT_IN_A_STEP = ("predictor", "statistics", "bundle_crc32c")


def multiplied_encodings(model: FlashModel) -> set[Encoding]:
    """Encodings of the bundles and of the matrices that are multiplied; tables that are looked up need no kernel."""
    looked_up = {POSITIONS} if model.decoder.logits.tied else {POSITIONS, EMBEDDING}
    stored = {info.encoding for info in model.layers}
    for name, info in model.tensors.items():
        if len(info.shape) == 2 and info.encoding.is_weight and name not in looked_up and "/statistics/" not in name:
            stored.add(info.encoding)
    return stored


class ResidentTable:
    """A table held in DRAM."""

    def __init__(self, matrix: Matrix, backend: Backend) -> None:
        self._matrix = matrix
        self._backend = backend

    def rows(self, ids: npt.NDArray[np.int64]) -> F32:
        """float32 [len(ids), width], decoded."""
        return self._backend.rows(self._matrix, ids)


class FlashTable:
    """A table left on flash: each lookup reads the rows it needs.

    Rows are not checked: the tensor has one checksum for all of them, which `flashfmt verify` compares.
    """

    def __init__(self, info: TensorInfo, backend: Backend) -> None:
        self._info = info
        self._backend = backend
        self._file = DirectFile(info.extent.path)
        self._row_nbytes = info.extent.nbytes // info.storage_shape[0]

    def rows(self, ids: npt.NDArray[np.int64]) -> F32:
        """float32 [len(ids), width], read and decoded."""
        unique, inverse = np.unique(ids, return_inverse=True)
        raw = np.empty((len(unique), self._row_nbytes), np.uint8)
        for row, i in zip(raw, unique.tolist(), strict=True):
            row[:] = self._file.read(self._info.extent.offset + i * self._row_nbytes, self._row_nbytes)
        data = raw.view(self._info.encoding.storage_dtype)
        matrix = Matrix(self._info.encoding, len(unique), self._info.shape[1], data)
        return self._backend.rows(matrix, inverse)

    @property
    def counters(self) -> IoCounters:
        """What looking up has read from flash."""
        return self._file.counters

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def flash_table(model: FlashModel, backend: Backend) -> FlashTable | None:
    """The token embedding as a table on flash, or None where it is resident."""
    return FlashTable(model.tensors[EMBEDDING], backend) if stays_on_flash(model) else None


def stays_on_flash(model: FlashModel) -> bool:
    """Whether token embedding rows are read from flash as they are needed."""
    return not model.decoder.logits.tied and model.tensors[EMBEDDING].codec == "raw"


def resident_tensors(model: FlashModel) -> Iterator[TensorInfo]:
    """Tensors that a decode step needs in DRAM."""
    on_flash = {EMBEDDING} if stays_on_flash(model) else set()
    for name in required_arrays(model.manifest):
        if name not in on_flash and not any(part in name.split("/") for part in _NOT_IN_A_STEP):
            yield model.tensors[name]


def residents_nbytes(model: FlashModel) -> int:
    """DRAM that `load_residents` takes."""
    return sum(_room(info) for info in resident_tensors(model))


def load_residents(
    model: FlashModel, *, verify: bool = True, progress: Callable[[int], None] | None = None
) -> dict[str, npt.NDArray[np.uint8]]:
    """Read the stored bytes of all resident tensors, decompressed, into one arena; by name.

    Raises
    ------
    FlashReadError, ChecksumError
    """
    names = [info.name for info in resident_tensors(model)]
    return load_tensors(model, names, verify=verify, progress=progress)


def tensors_nbytes(model: FlashModel, names: Sequence[str]) -> int:
    """DRAM that `load_tensors` takes."""
    return sum(_room(model.tensors[name]) for name in names)


def load_tensors(
    model: FlashModel, names: Sequence[str], *, verify: bool = True, progress: Callable[[int], None] | None = None
) -> dict[str, npt.NDArray[np.uint8]]:
    """Read the stored bytes of some tensors, decompressed, into one arena; by name.

    Raises
    ------
    FlashReadError, ChecksumError
    """
    arena = aligned_empty(tensors_nbytes(model, names))
    infos = [model.tensors[name] for name in names]
    ends = np.cumsum([_room(info) for info in infos], dtype=np.int64)
    places = [arena[end - _room(info) : end] for info, end in zip(infos, ends.tolist(), strict=True)]
    files: dict[Path, DirectFile] = {}
    loaded: dict[str, npt.NDArray[np.uint8]] = {}
    jobs: list[Callable[[], int]] = []
    try:
        for info, place in zip(infos, places, strict=True):
            if info.codec == "raw":
                path = info.extent.path
                if path not in files:
                    files[path] = DirectFile(path)
                head = info.extent.offset % IO_ALIGNMENT
                loaded[info.name] = place[head : head + info.extent.nbytes]
                jobs.append(partial(_read_raw, info, files[path], place, verify=verify))
        run_side_by_side(jobs, progress)
        for info, place in zip(infos, places, strict=True):  # one at a time: each takes its size once more
            if info.codec != "raw":
                stored = model.tensor(info.name, verify=verify).data
                loaded[info.name] = place[: stored.nbytes]
                loaded[info.name][:] = stored.reshape(-1).view(np.uint8)
                if progress is not None:
                    progress(info.extent.nbytes)
    finally:
        for file in files.values():
            file.close()
    return loaded


class Residents:
    """Resident tensors by name, as the backend takes them."""

    def __init__(self, model: FlashModel, loaded: dict[str, npt.NDArray[np.uint8]]) -> None:
        self._model = model
        self._loaded = loaded

    def matrix(self, name: str) -> Matrix:
        """A weight matrix in storage form."""
        info = self._model.tensors[name]
        data = self._loaded[name].view(info.encoding.storage_dtype).reshape(info.storage_shape)
        return Matrix(info.encoding, info.shape[0], info.shape[1], data)

    def vector(self, name: str) -> F32 | None:
        """A float32 vector, or None where the model has none of that name."""
        raw = self._loaded.get(name)
        return None if raw is None else raw.view(np.float32)


def _stored_nbytes(info: TensorInfo) -> int:
    return int(np.prod(info.storage_shape, dtype=np.int64)) * Encoding(info.encoding).storage_dtype.itemsize


def _room(info: TensorInfo) -> int:
    head = info.extent.offset % IO_ALIGNMENT if info.codec == "raw" else 0
    return round_up(head + _stored_nbytes(info), IO_ALIGNMENT)


def _read_raw(info: TensorInfo, file: DirectFile, place: npt.NDArray[np.uint8], *, verify: bool) -> int:
    """Read a tensor into its place; returns its bytes."""
    head = info.extent.offset % IO_ALIGNMENT
    file.read_into(place, info.extent.offset - head, head + info.extent.nbytes)
    data = place[head : head + info.extent.nbytes]
    if verify and (actual := google_crc32c.value(data)) != info.crc32c:
        raise ChecksumError(
            f"tensor {info.name} does not match its checksum",
            path=info.extent.path,
            where=info.extent.offset,
            rule="FF-SUM-3",
            expected=f"{info.crc32c:08x}",
            actual=f"{actual:08x}",
        )
    return info.extent.nbytes
