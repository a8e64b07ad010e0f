"""Comparing bundles that arrived in memory with the checksums of the file (SPEC.md, FF-SUM-5)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import google_crc32c
import numpy as np
import numpy.typing as npt

from flashfmt import BundlesInfo
from flashfmt.errors import ChecksumError

Verify = Literal["never", "first", "always"]
"""Check the checksums of bundles never, the first time each is read, or always."""


def bundle_mismatch(
    info: BundlesInfo, neuron: int, row: npt.NDArray[np.uint8], checksums: npt.NDArray[np.uint32]
) -> ChecksumError | None:
    """What is wrong with a bundle: an error that names layer, neuron and byte offset, or None.

    Parameters
    ----------
    row : uint8 [at least row_nbytes], contiguous; the bundle is at its start.
    checksums : uint32 [n_neurons], of the layer.
    """
    actual = google_crc32c.value(row[: info.geometry.row_nbytes])
    expected = int(checksums[neuron])
    if actual == expected:
        return None
    return ChecksumError(
        f"bundle of layer {info.layer}, neuron {neuron} does not match its checksum",
        path=info.extent.path,
        where=info.extent.offset + neuron * info.geometry.stride,
        rule="FF-SUM-5",
        expected=f"{expected:08x}",
        actual=f"{actual:08x}",
    )


def require_checksums(
    info: BundlesInfo, neurons: Iterable[int], rows: Iterable[npt.NDArray[np.uint8]], checksums: npt.NDArray[np.uint32]
) -> None:
    """Compare several bundles of a layer.

    Raises
    ------
    ChecksumError
        For the first that does not match.
    """
    for neuron, row in zip(neurons, rows, strict=True):
        if (error := bundle_mismatch(info, neuron, row, checksums)) is not None:
            raise error
