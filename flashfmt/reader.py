"""Opening a flash model, and the names under which programs read it (SPEC.md section "Reading").

Opening reads and checks all metadata; values are mapped, and touched only when they are used.

Knows: the whole of a model. Does not know: how it is run.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import google_crc32c

from flashfmt.bundles import Bundles
from flashfmt.checksum import require_crc32c
from flashfmt.container import Container, ContainerKind, read_bytes
from flashfmt.directory_container import DirectoryContainer
from flashfmt.encodings import Array
from flashfmt.errors import FlashError, FlashFormatError, FlashReadError
from flashfmt.manifest import Decoder, Manifest, Predictor, bundle_checksums_name
from flashfmt.shard_index import check_shard_index
from flashfmt.tensor import BundlesInfo, FileInfo, StoredTensor, TensorInfo, stored_tensor
from flashfmt.validate import read_contents
from flashfmt.verify import BUNDLES_RANK, check_file, verify_contents
from flashfmt.zarr_metadata import chunk_key
from flashfmt.zip_container import ZipContainer

PREDICTOR_ARRAYS: Final = ("down", "up", "bias", "gate")
STATISTICS_ARRAYS: Final = ("firing_frequency", "aggregated_window")


def open_container(path: str | os.PathLike[str]) -> Container:
    """Open a `.flash` file or a model directory as a mapping from keys to bytes.

    Raises
    ------
    FlashError
        If the path does not exist.
    FlashFormatError
        If it is something else, or breaks a rule of its container; says what it looks like.
    FlashReadError
        If the operating system refuses.
    """
    location = Path(path)
    try:
        mode = os.stat(location).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FlashError("no such file or directory", path=location) from error
    except (OSError, ValueError) as error:
        raise FlashReadError(f"cannot open: {error}", path=location) from error
    if stat.S_ISDIR(mode):
        return DirectoryContainer(location)
    if stat.S_ISREG(mode):
        return ZipContainer(location)
    raise FlashFormatError("neither a regular file nor a directory", path=location, rule="FF-ZIP-1")


def open_model(path: str | os.PathLike[str]) -> FlashModel:
    """Open a flash model for reading; also a context manager. Available as ``flashfmt.open``.

    Parameters
    ----------
    path : a `.flash` file or a model directory.

    Raises
    ------
    FlashError
        If the path does not exist.
    FlashFormatError
        If it is no flash model or breaks a rule of SPEC.md that metadata can break.
    UnsupportedError
        If its version or a required feature is unknown to this reader.
    FlashReadError
        If the operating system fails to deliver the metadata.
    """
    return FlashModel(open_container(path))


class FlashModel:
    """A model opened for reading. All methods may be called from several threads at once; `close` must be the last.

    Attributes
    ----------
    tensors : every tensor by name.
    layers : bundles by layer.
    files : embedded files by role.
    """

    def __init__(self, container: Container) -> None:
        self._container = container
        try:
            contents = read_contents(container)
        except BaseException:
            container.close()
            raise
        self._contents = contents
        self.path: Path = container.path
        self.container: ContainerKind = container.kind
        self.manifest: Manifest = contents.manifest
        self.decoder: Decoder = contents.manifest.decoder
        self.tensors: Mapping[str, TensorInfo] = contents.tensors
        self.layers: tuple[BundlesInfo, ...] = contents.layers
        self.files: Mapping[str, FileInfo] = contents.files
        self._predictors = {predictor.layer: predictor for predictor in contents.manifest.predictors}
        self._bundles: dict[int, Bundles] = {}

    @property
    def nbytes(self) -> int:
        """Size of the file, or of all files of the directory."""
        return self._container.nbytes

    @property
    def verify_nbytes(self) -> int:
        """Bytes that `verify` reads: the sum of what it reports as progress."""
        return sum(extent.nbytes for extent in self._container.extents.values())

    def tensor(self, name: str, *, verify: bool = False) -> StoredTensor:
        """Values of a tensor in storage form: a view of the mapped file, or a new array where it is compressed.

        Parameters
        ----------
        verify : compare the stored bytes with their checksum first; compressed ones always are.

        Raises
        ------
        KeyError
            If there is no such tensor.
        ChecksumError
            FF-SUM-3.
        FlashFormatError
            FF-TEN-3, if a compressed payload does not decompress to the size of the array.
        """
        info = self.tensors[name]
        payload = self._container.view(chunk_key(name, len(info.storage_shape)))
        if verify or info.codec != "raw":
            message = "the tensor is damaged"
            path = info.extent.path
            actual = google_crc32c.value(payload)
            require_crc32c(actual, info.crc32c, path=path, where=name, rule="FF-SUM-3", message=message)
        return stored_tensor(info, payload)

    def bundles(self, layer: int) -> Bundles:
        """Bundles of a layer. The first call checks the shard index; later calls return the same object.

        Raises
        ------
        IndexError
            If there is no such layer.
        FlashFormatError
            FF-IDX-n, if the index does not say what the geometry does.
        """
        if not 0 <= layer < len(self.layers):
            raise IndexError(f"layer {layer} outside [0, {len(self.layers)})")
        if layer not in self._bundles:
            info = self.layers[layer]
            key = chunk_key(info.name, BUNDLES_RANK)
            raw = read_bytes(self._container, key, info.geometry.index_offset)
            check_shard_index(raw, info.geometry, path=info.extent.path, where=info.name)
            checksums = self.tensor(bundle_checksums_name(layer), verify=True).data
            self._bundles.setdefault(layer, Bundles(info, self._container.view(key), checksums))
        return self._bundles[layer]

    def file(self, role: str) -> bytes | None:
        """Content of an embedded file, verified; None where the model has none of this role.

        Raises
        ------
        ChecksumError
            FF-SUM-6.
        """
        info = self.files.get(role)
        if info is None:
            return None
        content = read_bytes(self._container, chunk_key(f"files/{role}", 1))
        check_file(info, google_crc32c.value(content), hashlib.sha256(content).hexdigest())
        return content

    def predictor(self, layer: int) -> tuple[Predictor, Mapping[str, StoredTensor]] | None:
        """Predictor of a layer with its arrays by short name (`down`, `up`, `bias` or `gate`); None where absent."""
        predictor = self._predictors.get(layer)
        if predictor is None:
            return None
        return predictor, self._tensors_in(f"layers/{layer}/predictor", PREDICTOR_ARRAYS)

    def statistics(self, layer: int) -> Mapping[str, Array] | None:
        """Recorded activity of a layer, or None where the model has none.

        Returns
        -------
        `firing_frequency` float32 [d_ff] and `aggregated_window` float32 [window_tokens].
        """
        if self.manifest.statistics is None or not 0 <= layer < len(self.layers):
            return None
        tensors = self._tensors_in(f"layers/{layer}/statistics", STATISTICS_ARRAYS)
        return {name: tensor.data for name, tensor in tensors.items()}

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Read everything and check every rule marked *verify*: checksums, padding, finite weights, indexes.

        Reads by pread in blocks of at most 16 MiB; only a compressed tensor and a shard index are held whole.

        Parameters
        ----------
        progress : called with the bytes just read; the sum is `verify_nbytes`.

        Raises
        ------
        ChecksumError, FlashFormatError
            At the first rule that is broken.
        FlashReadError
            If the operating system fails to deliver bytes.
        """
        verify_contents(self._container, self._contents, progress or (lambda _: None))

    def close(self) -> None:
        """Release the file. Arrays that were handed out stay valid."""
        self._bundles.clear()
        self._container.close()

    def _tensors_in(self, group: str, names: tuple[str, ...]) -> dict[str, StoredTensor]:
        return {name: self.tensor(f"{group}/{name}") for name in names if f"{group}/{name}" in self.tensors}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
