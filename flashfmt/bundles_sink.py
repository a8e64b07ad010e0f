"""The bundles of one layer on their way into the file (SPEC.md section "Bundles").

Blocks become rows at the declared stride, with zeros between them; each row gets its checksum; the shard index and
the array of checksums follow the last one.

Knows: one layer's geometry and its two payloads. Does not know: containers, other arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

import google_crc32c
import numpy as np
import numpy.typing as npt

from flashfmt.container import Bytes
from flashfmt.errors import FlashError
from flashfmt.journal import Unit
from flashfmt.layout import BundleGeometry
from flashfmt.shard_index import build_shard_index
from flashfmt.specs import BundlesSpec
from flashfmt.staging import BLOCK_NBYTES, Payload


class BundlesSink:
    """Takes the bundles of one layer; a context manager, made by `FlashWriter.bundles`.

    Parameters
    ----------
    rows : where they go; None where an interrupted run has stored them, and what is given is skipped.
    submit : has a step carried out in the background.
    complete : called when the layer is complete.
    """

    def __init__(
        self,
        spec: BundlesSpec,
        rows: BundleRows | None,
        submit: Callable[[Callable[[], None]], None],
        complete: Callable[[], None],
    ) -> None:
        self._spec = spec
        self._rows = rows
        self._submit = submit
        self._complete = complete
        self._n_given = 0

    def append(self, block: npt.NDArray[Any]) -> None:
        """Add the next neurons.

        Parameters
        ----------
        block : storage form, [n, parts, d_model], or uint8 [n, parts, part_nbytes] when quantised; in neuron order.
            Not copied if C-contiguous: it must not change until the writer is left.

        Raises
        ------
        FlashError
            If dtype or shape are not those declared, or there are more neurons than declared.
        FlashWriteError
            If something written earlier could not be stored.
        """
        spec = self._spec
        n_neurons, *inner = spec.storage_shape
        dtype = spec.encoding.storage_dtype
        if block.dtype != dtype or block.ndim != 3 or block.shape[1:] != tuple(inner):
            raise FlashError(
                "bundles of another form than declared",
                where=spec.name,
                expected=f"{dtype} [n, {inner[0]}, {inner[1]}]",
                actual=f"{block.dtype} {list(block.shape)}",
            )
        if self._n_given + len(block) > n_neurons:
            raise FlashError(
                "more bundles than declared", where=spec.name, expected=n_neurons, actual=self._n_given + len(block)
            )
        self._n_given += len(block)
        if self._rows is not None:
            geometry = spec.geometry
            rows = np.ascontiguousarray(block).reshape(-1).view(np.uint8).reshape(len(block), geometry.row_nbytes)
            n_step = max(1, BLOCK_NBYTES // geometry.stride)
            for first in range(0, len(rows), n_step):
                self._submit(partial(self._rows.append, rows[first : first + n_step]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            return
        if self._n_given != self._spec.n_neurons:
            raise FlashError(
                "bundles are missing", where=self._spec.name, expected=self._spec.n_neurons, actual=self._n_given
            )
        self._complete()


class BundleRows:
    """Two payloads under construction: the bundles with their index, and the checksum of each."""

    def __init__(self, geometry: BundleGeometry, payload: Payload, checksums: Payload) -> None:
        self._geometry = geometry
        self._payload = payload
        self._checksums_payload = checksums
        self._checksums = np.zeros(geometry.n_neurons, "<u4")
        self._n_rows = 0
        self._strides: Bytes = np.zeros((0, geometry.stride), np.uint8)

    def append(self, rows: Bytes) -> None:
        """Write rows, uint8 [n, row_nbytes]."""
        end = self._n_rows + len(rows)
        self._checksums[self._n_rows : end] = [google_crc32c.value(row) for row in rows]
        self._n_rows = end
        self._payload.append(self._strided(rows).reshape(-1))

    def seal(self) -> Unit:
        """Write index and checksums, and complete both payloads."""
        self._payload.append(np.frombuffer(build_shard_index(self._geometry), np.uint8))
        bundles = self._payload.seal()
        self._checksums_payload.append(self._checksums.view(np.uint8))
        return bundles, self._checksums_payload.seal()

    def _strided(self, rows: Bytes) -> Bytes:
        """The rows with zeros up to the stride after each; valid until the next call."""
        if self._geometry.stride == self._geometry.row_nbytes:
            return rows
        if len(self._strides) < len(rows):
            self._strides = np.zeros((len(rows), self._geometry.stride), np.uint8)
        self._strides[: len(rows), : self._geometry.row_nbytes] = rows
        return self._strides[: len(rows)]
