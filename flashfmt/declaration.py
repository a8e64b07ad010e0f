"""Checking what a writer is told, before anything is written: the same rules that a reader applies to the result.

Knows: a container that has documents, and payloads that are only sizes. Does not know: files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from flashfmt.container import Bytes, ContainerKind, Extent
from flashfmt.errors import FlashError, FlashFormatError
from flashfmt.validate import read_contents


def check_declaration(path: Path, documents: Mapping[str, bytes], payloads: Mapping[str, int]) -> None:
    """Check documents and payload sizes (bytes by key) of a model that is not written yet.

    Raises
    ------
    FlashError
        With the rule of SPEC.md that the model would break.
    """
    try:
        read_contents(_Declared(path, documents, payloads))
    except FlashFormatError as error:
        raise FlashError(
            f"cannot be written: {error.message}",
            path=error.path,
            where=error.where,
            rule=error.rule,
            expected=error.expected,
            actual=error.actual,
        ) from None


class _Declared:
    """Documents at hand; of payloads the sizes alone."""

    kind: ContainerKind = "directory"
    checksums: Mapping[str, int] = MappingProxyType({})

    def __init__(self, path: Path, documents: Mapping[str, bytes], payloads: Mapping[str, int]) -> None:
        self.path = path
        self._documents = documents
        sizes = {key: len(raw) for key, raw in documents.items()} | dict(payloads)
        self.nbytes = sum(sizes.values())
        self.extents = {key: Extent(path, 0, nbytes) for key, nbytes in sizes.items()}

    def read_into(self, key: str, start: int, buffer: Bytes) -> None:
        """Fill `buffer` with bytes of a document."""
        buffer[:] = self.view(key)[start : start + buffer.nbytes]

    def view(self, key: str) -> Bytes:
        """Bytes of a document."""
        return np.frombuffer(self._documents[key], np.uint8)

    def close(self) -> None:
        """Nothing to release."""
