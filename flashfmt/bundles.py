"""The bundles of one layer as arrays: address by arithmetic, nothing else on the way (SPEC.md section "Bundles").

Knows: one payload whose index has been checked. Does not know: containers, the manifest.
"""

from __future__ import annotations

import google_crc32c
import numpy as np
import numpy.typing as npt

from flashfmt.checksum import require_crc32c
from flashfmt.container import Bytes
from flashfmt.encodings import Array, F32Array, decode
from flashfmt.tensor import BundlesInfo


class Bundles:
    """Zero-copy access to the bundles of a layer.

    Parameters
    ----------
    info : what the metadata says.
    payload : uint8, the whole payload; its shard index is known to follow the geometry.
    checksums : uint32 [n_neurons], CRC-32C of each bundle.
    """

    def __init__(self, info: BundlesInfo, payload: Bytes, checksums: npt.NDArray[np.uint32]) -> None:
        geometry = info.geometry
        self.info = info
        self.checksums = checksums
        strides = payload[: geometry.index_offset].reshape(geometry.n_neurons, geometry.stride)
        self.rows: Bytes = strides[:, : geometry.row_nbytes]
        """uint8 [n_neurons, row_nbytes], read-only view of the file with row stride ``geometry.stride``."""

    def bundle(self, neuron: int) -> Array:
        """One bundle in storage form, a view: [parts, d_model], or uint8 [parts, part_nbytes] for q8 and q4.

        Raises
        ------
        IndexError
            If there is no such neuron.
        """
        start, stop = self.info.geometry.bundle_range(neuron)
        row = self.rows[neuron, : stop - start]
        return row.view(self.info.encoding.storage_dtype).reshape(len(self.info.parts), -1)

    def decode(self, ids: npt.ArrayLike) -> F32Array:
        """Weights of some neurons as a new float32 array [len(ids), parts, d_model].

        Raises
        ------
        IndexError
            If an id is not a neuron of the layer.
        """
        info = self.info
        rows = np.ascontiguousarray(self.rows[self._checked(ids)])
        stored = rows.view(info.encoding.storage_dtype).reshape(len(rows), len(info.parts), info.part.storage_length)
        return decode(stored, info.encoding, info.d_model)

    def verify(self, ids: npt.ArrayLike) -> None:
        """Compare bundles with their checksums.

        Raises
        ------
        ChecksumError
            FF-SUM-5, naming the layer, the neuron and the byte where its bundle begins.
        IndexError
            If an id is not a neuron of the layer.
        """
        for neuron in self._checked(ids).tolist():
            check_bundle(self.info, neuron, self.rows[neuron], int(self.checksums[neuron]))

    def _checked(self, ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        indices = np.asarray(ids, dtype=np.int64).reshape(-1)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.info.geometry.n_neurons:
            raise IndexError(f"neurons outside [0, {self.info.geometry.n_neurons})")
        return indices


def check_bundle(info: BundlesInfo, neuron: int, row: Bytes, expected: int) -> None:
    """Compare the contiguous bytes of one bundle with its CRC-32C; ChecksumError (FF-SUM-5) where they differ."""
    at = info.extent.offset + neuron * info.geometry.stride
    require_crc32c(
        google_crc32c.value(row),
        expected,
        path=info.extent.path,
        where=f"{info.name}[{neuron}] byte {at}",
        rule="FF-SUM-5",
        message=f"neuron {neuron} of layer {info.layer} is damaged",
    )
