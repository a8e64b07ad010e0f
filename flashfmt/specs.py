"""What a writer is told before the first byte: one spec an array, complete but for the values.

Everything about an array that its document states, except its checksum, follows from its spec; so the size of every
document is known before any payload is written.

Knows: names, shapes, encodings. Does not know: containers, files.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import prod
from typing import Self

from flashfmt.encodings import Encoding, PartLayout, part_layout
from flashfmt.errors import FlashError
from flashfmt.layout import BUNDLES_FILE_ALIGNMENT, BundleGeometry
from flashfmt.manifest import bundles_name
from flashfmt.tensor import Compression

FILES_PREFIX = "files"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor: `shape` is the logical one, in weights; `codec` compresses the stored bytes."""

    name: str
    encoding: Encoding
    shape: tuple[int, ...]
    codec: Compression = "raw"

    @property
    def storage_shape(self) -> tuple[int, ...]:
        """Shape of the stored array: `shape` when plain, [rows, part_nbytes] when quantised.

        Raises
        ------
        FlashError
            FF-TEN-1, if the encoding is quantised and the rows are not a multiple of 64 weights.
        """
        if not self.encoding.is_quantised:
            return self.shape
        return (*self.shape[:-1], _part(self.encoding, self.shape[-1], self.name, "FF-TEN-1").nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes in storage form, uncompressed."""
        return prod(self.storage_shape) * self.encoding.storage_dtype.itemsize


@dataclass(frozen=True, slots=True)
class BundlesSpec:
    """The bundles of one layer; `alignment` None lets the size of a bundle decide (4096 or 512)."""

    layer: int
    encoding: Encoding
    parts: tuple[str, ...]
    n_neurons: int
    d_model: int
    alignment: int | None = None

    @property
    def name(self) -> str:
        """Name of the array."""
        return bundles_name(self.layer)

    @property
    def part(self) -> PartLayout:
        """Layout of one encoded row.

        Raises
        ------
        FlashError
            FF-BND-2, if the encoding is quantised and `d_model` is not a multiple of 64.
        """
        return _part(self.encoding, self.d_model, self.name, "FF-BND-2")

    @property
    def geometry(self) -> BundleGeometry:
        """Placement of the bundles in their payload."""
        return BundleGeometry.for_rows(self.n_neurons, len(self.parts) * self.part.nbytes, self.alignment)

    @property
    def storage_shape(self) -> tuple[int, int, int]:
        """Shape of the stored array: [n_neurons, parts, d_model], or [n_neurons, parts, part_nbytes] when quantised."""
        return self.n_neurons, len(self.parts), self.part.storage_length

    @property
    def file_alignment(self) -> int:
        """What the offset of the payload in a `.flash` file is a multiple of."""
        return max(BUNDLES_FILE_ALIGNMENT, self.geometry.alignment)


@dataclass(frozen=True, slots=True)
class FileSpec:
    """A file to embed: `filename` is its name in the source, `sha256` 64 hex digits."""

    role: str
    filename: str
    nbytes: int
    sha256: str

    @classmethod
    def of(cls, role: str, filename: str, content: bytes) -> Self:
        """Spec of a file whose content is at hand."""
        return cls(role, filename, len(content), hashlib.sha256(content).hexdigest())

    @property
    def name(self) -> str:
        """Name of the array."""
        return f"{FILES_PREFIX}/{self.role}"


def _part(encoding: Encoding, n_values: int, name: str, rule: str) -> PartLayout:
    try:
        return part_layout(encoding, n_values)
    except ValueError as error:
        raise FlashError(str(error), where=name, rule=rule) from None
