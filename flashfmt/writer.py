"""Writing a flash model (SPEC.md section "Writing"): everything is declared first, then the values follow.

    with FlashWriter("m.flash", manifest, tensors=[...], bundles=[...], files=[...], fingerprint="...") as writer:
        writer.write_file("tokenizer", content)
        writer.write_tensor("embedding/tokens", rows)
        with writer.bundles(0) as sink:
            sink.append(block)

Knows: specs, and the payload that each of them calls for. Does not know: containers, where values come from.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from flashfmt.background import Background
from flashfmt.bundles_sink import BundleRows, BundlesSink
from flashfmt.compression import compress
from flashfmt.container import Bytes, ContainerKind
from flashfmt.declaration import check_declaration
from flashfmt.encodings import Array, Encoding
from flashfmt.errors import FlashError
from flashfmt.layout import PAYLOAD_ALIGNMENT
from flashfmt.manifest import Manifest, bundle_checksums_name, bundles_name
from flashfmt.reader import open_model
from flashfmt.specs import FILES_PREFIX, BundlesSpec, FileSpec, TensorSpec
from flashfmt.staging import BLOCK_NBYTES, Payload, Staging, container_kind
from flashfmt.zarr_documents import Spec, render_documents
from flashfmt.zarr_metadata import chunk_key

_N_AHEAD: Final = 3


class FlashWriter:
    """Writes one model, atomically: nothing stands under the final name before everything is stored.

    A context manager. Leaving it without an error completes the model; leaving it with an error keeps
    ``<name>.partial`` and its journal, and the same declaration continues there. Values are given in any order, each
    array once; an array that an interrupted run has stored already may be given again and is then skipped, see
    `is_done`. Equal declarations, and equal values in equal order, give equal bytes. Used from one thread.

    Parameters
    ----------
    path : the target.
    manifest : its `metadata_crc32c` is ignored.
    tensors, bundles, files : every array, but for the `bundle_crc32c` arrays, which the writer makes itself.
    fingerprint : says where the values come from; an interrupted run is continued only under the same one.
    container : ``file`` or ``directory``; by default a file if `path` ends in ``.flash``.
    overwrite : whether an existing model is replaced; it stays intact until the last step.

    Raises
    ------
    FlashError
        If what is declared is no valid model; names the rule and the array.
    FlashWriteError
        If the target exists and `overwrite` is false.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        manifest: Manifest,
        *,
        tensors: Iterable[TensorSpec],
        bundles: Iterable[BundlesSpec],
        files: Iterable[FileSpec] = (),
        fingerprint: str,
        container: ContainerKind | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self._manifest = manifest
        layers = list(bundles)
        sums = [TensorSpec(bundle_checksums_name(b.layer), Encoding.U32, (b.n_neurons,)) for b in layers]
        declared: list[Spec] = [*files, *tensors, *layers, *sums]
        self._specs = {spec.name: spec for spec in declared}
        for name, n_times in Counter(spec.name for spec in declared).items():
            if n_times > 1:
                raise FlashError("declared twice", path=self.path, where=name)
        documents = render_documents(manifest, declared, {})
        check_declaration(self.path, documents, {_key(spec): _least_nbytes(spec) for spec in declared})
        self._staging = Staging(
            self.path,
            container_kind(self.path, container),
            documents={key: len(raw) for key, raw in documents.items()},
            alignments={_key(spec): _alignment(spec) for spec in declared},
            declaration=hashlib.sha256(b"".join(documents.values())).hexdigest(),
            fingerprint=fingerprint,
            overwrite=overwrite,
        )
        self._staging.refuse_existing()
        self._background: Background | None = None
        self._given: set[str] = set()
        self._incomplete: str | None = None

    def __enter__(self) -> Self:
        self._staging.open(sum(_least_nbytes(spec) for spec in self._specs.values()))
        self._background = Background(_N_AHEAD)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            if self._background is not None:
                self._background.close()
                self._background = None
            self._staging.suspend()

    def is_done(self, name: str) -> bool:
        """Whether an interrupted run has stored this array already, so that its values need not be made.

        Raises
        ------
        FlashError
            If no such array is declared.
        """
        spec = self._specs.get(name)
        if spec is None:
            raise FlashError("not declared", path=self.path, where=name)
        return _key(spec) in self._staging.resumed

    def write_tensor(self, name: str, data: npt.NDArray[Any]) -> None:
        """Write the values of a declared tensor.

        Parameters
        ----------
        data : storage form: the declared shape of the encoding's storage dtype, or uint8 [rows, part_nbytes] when
            quantised. Not copied if C-contiguous: it must not change until the writer is left.

        Raises
        ------
        FlashError
            If the array is not declared or given twice, or dtype or shape are not those declared.
        FlashWriteError
            If something written earlier could not be stored.
        """
        spec = self._specs.get(name)
        if not isinstance(spec, TensorSpec):
            raise FlashError("no such tensor is declared", path=self.path, where=name)
        dtype = spec.encoding.storage_dtype
        if data.dtype != dtype or data.shape != spec.storage_shape:
            raise FlashError(
                "values of another form than declared",
                path=self.path,
                where=name,
                expected=f"{dtype} {list(spec.storage_shape)}",
                actual=f"{data.dtype} {list(data.shape)}",
            )
        if self._claim(name):
            values: Array = np.ascontiguousarray(data)
            raw = spec.codec == "raw"
            self._write(spec, values.reshape(-1).view(np.uint8) if raw else compress(values, spec.codec, name))

    def write_file(self, role: str, content: bytes) -> None:
        """Write the content of a declared file.

        Raises
        ------
        FlashError
            If the file is not declared or given twice, or the content is not the one declared.
        FlashWriteError
            If something written earlier could not be stored.
        """
        name = f"{FILES_PREFIX}/{role}"
        spec = self._specs.get(name)
        if not isinstance(spec, FileSpec):
            raise FlashError("no such file is declared", path=self.path, where=name)
        found = FileSpec.of(role, spec.filename, content)
        if found != spec:
            raise FlashError(
                "not the content declared", path=self.path, where=name, expected=spec.sha256, actual=found.sha256
            )
        if self._claim(name):
            self._write(spec, np.frombuffer(content, np.uint8))

    def bundles(self, layer: int) -> BundlesSink:
        """A sink for the bundles of a declared layer, to be used as a context manager and filled in neuron order.

        Raises
        ------
        FlashError
            If the layer is not declared or given twice; on leaving the sink, if neurons are missing.
        """
        name = bundles_name(layer)
        spec = self._specs.get(name)
        if not isinstance(spec, BundlesSpec):
            raise FlashError("no such bundles are declared", path=self.path, where=name)
        if not self._claim(name):
            return BundlesSink(spec, None, self._submit, lambda: None)
        self._incomplete = name
        sums = self._specs[bundle_checksums_name(layer)]
        rows = BundleRows(
            spec.geometry,
            self._staging.begin_payload(_key(spec), _least_nbytes(spec)),
            self._staging.begin_payload(_key(sums), _least_nbytes(sums)),
        )
        return BundlesSink(spec, rows, self._submit, partial(self._complete_bundles, rows))

    def discard(self) -> None:
        """Remove what an interrupted run has left; the target is not touched.

        Raises
        ------
        FlashError
            If this writer is still in use.
        FlashWriteError
            If another process is writing the target, or the system refuses.
        """
        if self._background is not None:
            raise FlashError("the writer is in use", path=self.path)
        self._staging.discard()

    def _write(self, spec: Spec, stored: Bytes) -> None:
        payload = self._staging.begin_payload(_key(spec), stored.nbytes)
        for first in range(0, stored.nbytes, BLOCK_NBYTES):
            self._submit(partial(payload.append, stored[first : first + BLOCK_NBYTES]))
        self._submit(partial(self._commit, payload))

    def _commit(self, payload: Payload) -> None:
        self._staging.commit((payload.seal(),))

    def _complete_bundles(self, rows: BundleRows) -> None:
        self._incomplete = None
        self._submit(lambda: self._staging.commit(rows.seal()))

    def _submit(self, step: Callable[[], None]) -> None:
        if self._background is None:
            raise FlashError("the writer is not open: use it as a context manager", path=self.path)
        self._background.submit(step)

    def _claim(self, name: str) -> bool:
        """Note that an array is given; False if an interrupted run has stored it."""
        if self._background is None:
            raise FlashError("the writer is not open: use it as a context manager", path=self.path)
        if self._incomplete is not None:
            raise FlashError(f"given before {self._incomplete} is complete", path=self.path, where=name)
        if name in self._given:
            raise FlashError("given twice", path=self.path, where=name)
        self._given.add(name)
        return not self.is_done(name)

    def _finish(self) -> None:
        if self._background is not None:
            self._background.finish()
        done = self._staging.done
        missing = next((name for name, spec in self._specs.items() if _key(spec) not in done), None)
        if missing is not None:
            raise FlashError("declared, but not written", path=self.path, where=missing)
        checksums = {name: done[_key(spec)].crc32c for name, spec in self._specs.items()}
        self._staging.publish(render_documents(self._manifest, self._specs.values(), checksums), _open_once)


def _open_once(path: Path) -> None:
    """Open a model with all checks of metadata that a reader makes."""
    open_model(path).close()


def _key(spec: Spec) -> str:
    """Key of an array's payload."""
    return chunk_key(spec.name, 1 if isinstance(spec, FileSpec) else len(spec.storage_shape))


def _alignment(spec: Spec) -> int:
    return spec.file_alignment if isinstance(spec, BundlesSpec) else PAYLOAD_ALIGNMENT


def _least_nbytes(spec: Spec) -> int:
    """Size of an array's payload; 1 where compression decides."""
    if isinstance(spec, BundlesSpec):
        return spec.geometry.payload_nbytes
    if isinstance(spec, TensorSpec) and spec.codec != "raw":
        return 1
    return spec.nbytes
