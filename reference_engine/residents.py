"""The tensors that stay in DRAM: everything the decoder needs except the bundles.

A token embedding that the logits do not share is not among them: a token needs one row of it, read from flash.

Matrices are held as they are stored, or narrower (`resident_encoding`): then they are read and re-encoded in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from flashfmt import FlashModel, TensorInfo
from flashfmt.encodings import Encoding, decode, encode
from flashfmt.errors import ChecksumError, FlashError
from flashfmt.layout import round_up
from flashfmt.manifest import required_arrays
from reference_engine.backends import Backend, Matrix
from reference_engine.flash_io import IO_ALIGNMENT, DirectFile, IoCounters, aligned_empty
from reference_engine.loading import run_side_by_side
from reference_engine.resident_encoding import POSITIONS, resident_encoding, stored_nbytes

F32 = npt.NDArray[np.float32]
EMBEDDING = "embedding/tokens"
_NOT_IN_A_STEP = ("predictor", "statistics", "bundle_crc32c")
_PIECE_WEIGHTS = 1 << 18  # re-encoded at once by each thread, in some 6 MiB


def multiplied_encodings(model: FlashModel, residents: Encoding | None = None) -> set[Encoding]:
    """Encodings of the bundles and of the matrices that are multiplied; tables that are looked up need no kernel.

    Parameters
    ----------
    residents : what the resident matrices are re-encoded in; see `resident_encoding`.
    """
    looked_up = {POSITIONS} if model.decoder.logits.tied else {POSITIONS, EMBEDDING}
    resident = {info.name for info in resident_tensors(model)}
    multiplied = {info.encoding for info in model.layers}
    for name, info in model.tensors.items():
        if len(info.shape) == 2 and info.encoding.is_weight and name not in looked_up and "/statistics/" not in name:
            multiplied.add(resident_encoding(info, residents if name in resident else None))
    return multiplied


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


def resident_matrices(model: FlashModel) -> Iterator[TensorInfo]:
    """Those that may be held narrower than they are stored."""
    return (info for info in resident_tensors(model) if len(info.shape) == 2 and info.name != POSITIONS)


def residents_nbytes(model: FlashModel, encoding: Encoding | None = None) -> int:
    """DRAM that `load_residents` takes."""
    return sum(_room(info, encoding) for info in resident_tensors(model))


def residents_file_nbytes(model: FlashModel) -> int:
    """Bytes that `load_residents` reports to its progress callback."""
    return sum(info.extent.nbytes for info in resident_tensors(model))


def load_residents(
    model: FlashModel,
    *,
    encoding: Encoding | None = None,
    verify: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Residents:
    """Read all resident tensors into one arena; see `load_tensors`."""
    names = [info.name for info in resident_tensors(model)]
    return Residents(model, load_tensors(model, names, encoding=encoding, verify=verify, progress=progress), encoding)


def tensors_nbytes(model: FlashModel, names: Sequence[str], encoding: Encoding | None = None) -> int:
    """DRAM that `load_tensors` takes."""
    return sum(_room(model.tensors[name], encoding) for name in names)


def load_tensors(
    model: FlashModel,
    names: Sequence[str],
    *,
    encoding: Encoding | None = None,
    verify: bool = True,
    progress: Callable[[int], None] | None = None,
) -> dict[str, npt.NDArray[np.uint8]]:
    """Bytes of some tensors, decompressed, in one arena; by name.

    Parameters
    ----------
    encoding : what to hold matrices in, see `resident_encoding`; None leaves all as stored.
    progress : called with bytes of the file as they are read.

    Raises
    ------
    FlashReadError, ChecksumError
    FlashError
        If a matrix has values that `encoding` cannot hold.
    """
    arena = aligned_empty(tensors_nbytes(model, names, encoding))
    infos = [model.tensors[name] for name in names]
    rooms = [_room(info, encoding) for info in infos]
    ends = np.cumsum(rooms, dtype=np.int64).tolist()
    places = [arena[end - room : end] for room, end in zip(rooms, ends, strict=True)]
    files: dict[Path, DirectFile] = {}
    loaded: dict[str, npt.NDArray[np.uint8]] = {}
    jobs: list[Callable[[], int]] = []
    try:
        for info, place in zip(infos, places, strict=True):
            held_in = resident_encoding(info, encoding)
            head = _head(info) if held_in == info.encoding else 0
            loaded[info.name] = place[head : head + stored_nbytes(info, held_in)]
            if info.codec == "raw":
                path = info.extent.path
                if path not in files:
                    files[path] = DirectFile(path)
                if held_in == info.encoding:
                    jobs.append(partial(_read_raw, info, files[path], place, verify=verify))
                else:
                    out = loaded[info.name]
                    jobs.append(partial(_read_and_encode, info, files[path], held_in, out, verify=verify))
        run_side_by_side(jobs, progress)
        for info in infos:  # one at a time: each takes its size once more
            if info.codec != "raw":
                stored = model.tensor(info.name, verify=verify).data
                held_in = resident_encoding(info, encoding)
                if held_in == info.encoding:
                    loaded[info.name][:] = stored.reshape(-1).view(np.uint8)
                else:
                    for rows in _pieces(info):
                        _encode_rows(info, stored[rows], held_in, _rows_of(info, loaded[info.name])[rows])
                if progress is not None:
                    progress(info.extent.nbytes)
    finally:
        for file in files.values():
            file.close()
    return loaded


class Residents:
    """Resident tensors by name, as the backend takes them."""

    def __init__(
        self, model: FlashModel, loaded: dict[str, npt.NDArray[np.uint8]], encoding: Encoding | None = None
    ) -> None:
        self._model = model
        self._loaded = loaded
        self._encoding = encoding

    def matrix(self, name: str) -> Matrix:
        """A weight matrix in the encoding that it is held in."""
        info = self._model.tensors[name]
        held_in = resident_encoding(info, self._encoding)
        data = self._loaded[name].view(held_in.storage_dtype).reshape(info.shape[0], -1)
        return Matrix(held_in, info.shape[0], info.shape[1], data)

    def vector(self, name: str) -> F32 | None:
        """A float32 vector, or None where the model has none of that name."""
        raw = self._loaded.get(name)
        return None if raw is None else raw.view(np.float32)


def _head(info: TensorInfo) -> int:
    """Bytes before a raw tensor in the block that it begins in."""
    return info.extent.offset % IO_ALIGNMENT if info.codec == "raw" else 0


def _room(info: TensorInfo, encoding: Encoding | None) -> int:
    held_in = resident_encoding(info, encoding)
    head = _head(info) if held_in == info.encoding else 0
    return round_up(head + stored_nbytes(info, held_in), IO_ALIGNMENT)


def _pieces(info: TensorInfo) -> Iterator[slice]:
    """Rows of a matrix that are re-encoded at once."""
    step = max(1, _PIECE_WEIGHTS // info.shape[1])
    for first in range(0, info.shape[0], step):
        yield slice(first, min(first + step, info.shape[0]))


def _rows_of(info: TensorInfo, out: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return out.reshape(info.shape[0], -1)


def _encode_rows(info: TensorInfo, stored: npt.NDArray[Any], encoding: Encoding, out: npt.NDArray[np.uint8]) -> None:
    """Re-encode stored rows of a matrix."""
    try:
        out[:] = encode(decode(stored, info.encoding, info.shape[1]), encoding)
    except ValueError as error:
        raise FlashError(
            f"tensor {info.name} cannot be held in {encoding}: {error}; --residents stored takes it as it is",
            path=info.extent.path,
            where=info.extent.offset,
        ) from error


def _read_and_encode(
    info: TensorInfo, file: DirectFile, encoding: Encoding, out: npt.NDArray[np.uint8], *, verify: bool
) -> int:
    """Read a matrix and re-encode it; returns its bytes in the file."""
    nbytes = info.extent.nbytes // info.shape[0]  # of a row
    rows_out, crc32c = _rows_of(info, out), 0
    for rows in _pieces(info):
        raw = file.read(info.extent.offset + rows.start * nbytes, (rows.stop - rows.start) * nbytes)
        crc32c = google_crc32c.extend(crc32c, raw)
        stored = raw.view(info.encoding.storage_dtype).reshape(rows.stop - rows.start, -1)
        _encode_rows(info, stored, encoding, rows_out[rows])
    if verify:
        _require_checksum(info, crc32c)
    return info.extent.nbytes


def _read_raw(info: TensorInfo, file: DirectFile, place: npt.NDArray[np.uint8], *, verify: bool) -> int:
    """Read a tensor into its place; returns its bytes."""
    head = info.extent.offset % IO_ALIGNMENT
    file.read_into(place, info.extent.offset - head, head + info.extent.nbytes)
    data = place[head : head + info.extent.nbytes]
    if verify:
        _require_checksum(info, google_crc32c.value(data))
    return info.extent.nbytes


def _require_checksum(info: TensorInfo, actual: int) -> None:
    if actual != info.crc32c:
        raise ChecksumError(
            f"tensor {info.name} does not match its checksum",
            path=info.extent.path,
            where=info.extent.offset,
            rule="FF-SUM-3",
            expected=f"{info.crc32c:08x}",
            actual=f"{actual:08x}",
        )
