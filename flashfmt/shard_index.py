"""The index at the end of a bundles payload (SPEC.md section "Shard index"): building it and checking it.

Zarr's sharding codec finds a bundle by its index entry; we find it by arithmetic. The index must therefore say
exactly what the arithmetic says, which is checked once for an array.
"""

from __future__ import annotations

from pathlib import Path

import google_crc32c
import numpy as np

from flashfmt.errors import FlashFormatError
from flashfmt.layout import SHARD_INDEX_CHECKSUM_BYTES, BundleGeometry


def build_shard_index(geometry: BundleGeometry) -> bytes:
    """Index bytes of a payload: (offset, nbytes) of each bundle as little-endian uint64, then the CRC-32C of them."""
    entries = np.empty((geometry.n_neurons, 2), "<u8")
    entries[:, 0] = np.arange(geometry.n_neurons, dtype=np.uint64) * np.uint64(geometry.stride)
    entries[:, 1] = geometry.row_nbytes
    raw = entries.tobytes()
    return raw + int(google_crc32c.value(raw)).to_bytes(SHARD_INDEX_CHECKSUM_BYTES, "little")


def check_shard_index(raw: bytes, geometry: BundleGeometry, *, path: Path, where: str) -> None:
    """Check that an index places every bundle where the geometry does.

    Parameters
    ----------
    raw : the last `geometry.index_nbytes` bytes of a payload.
    path, where : the file and the array, for errors.

    Raises
    ------
    FlashFormatError
        FF-IDX-1 for its size, FF-IDX-2 for its checksum, FF-IDX-3 for an entry.
    """
    if len(raw) != geometry.index_nbytes:
        raise FlashFormatError(
            "the shard index has the wrong size",
            path=path,
            where=where,
            rule="FF-IDX-1",
            expected=f"{geometry.index_nbytes} bytes",
            actual=f"{len(raw)}",
        )
    body, stored = raw[:-SHARD_INDEX_CHECKSUM_BYTES], raw[-SHARD_INDEX_CHECKSUM_BYTES:]
    actual = int(google_crc32c.value(body))
    if actual != int.from_bytes(stored, "little"):
        raise FlashFormatError(
            "the shard index does not match its checksum",
            path=path,
            where=where,
            rule="FF-IDX-2",
            expected=f"{int.from_bytes(stored, 'little'):08x}",
            actual=f"{actual:08x}",
        )
    entries = np.frombuffer(body, "<u8").reshape(-1, 2)
    expected = np.frombuffer(build_shard_index(geometry), "<u8", 2 * geometry.n_neurons).reshape(-1, 2)
    wrong = np.flatnonzero((entries != expected).any(axis=1))
    if len(wrong):
        i = int(wrong[0])
        raise FlashFormatError(
            f"the shard index places bundle {i} elsewhere",
            path=path,
            where=where,
            rule="FF-IDX-3",
            expected=tuple(expected[i].tolist()),
            actual=tuple(entries[i].tolist()),
        )
