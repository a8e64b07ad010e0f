"""One container into the other: a `.flash` file from a directory, a directory from a `.flash` file.

Documents and stored payloads are copied as they are, and each payload is compared with its checksum on the way; only
alignment and order are those of the new container. The order is fixed (`canonical_order`), so packing what was
unpacked gives the same bytes again if the file was written in that order, as converted files are.

Knows: keys, payloads and their checksums. Does not know: values.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from flashfmt.background import Background
from flashfmt.checksum import require_crc32c
from flashfmt.container import Container, ContainerKind, is_document, read_bytes
from flashfmt.layout import BUNDLES_FILE_ALIGNMENT, PAYLOAD_ALIGNMENT
from flashfmt.manifest import bundle_checksums_name, required_arrays
from flashfmt.reader import open_container, open_model
from flashfmt.specs import FILES_PREFIX
from flashfmt.staging import BLOCK_NBYTES, Payload, Staging
from flashfmt.validate import Contents, read_contents
from flashfmt.verify import BUNDLES_RANK
from flashfmt.zarr_metadata import chunk_key

_N_AHEAD = 3


@dataclass(frozen=True, slots=True)
class _Source:
    """One payload to copy: its key, its array, what its offset is a multiple of, and the checksum it must have."""

    key: str
    name: str
    alignment: int
    crc32c: int
    rule: str


def pack(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Copy a model, usually a directory, into a `.flash` file.

    Parameters
    ----------
    source : a model in either container.
    target : the file to write; it takes this name when it is complete. An interrupted call is continued by the next.
    overwrite : whether an existing target is replaced.
    progress : called with the payload bytes just copied.

    Raises
    ------
    ChecksumError, FlashFormatError, FlashReadError
        If the source is damaged or cannot be read.
    FlashWriteError
        If the target exists and `overwrite` is false, or cannot be written.
    """
    _copy(Path(source), Path(target), "file", overwrite, progress or _ignore)


def unpack(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Copy a model, usually a `.flash` file, into a directory; arguments and errors are those of `pack`."""
    _copy(Path(source), Path(target), "directory", overwrite, progress or _ignore)


def canonical_order(contents: Contents) -> list[str]:
    """Names of all arrays in the order of their payloads.

    Embedded files by role; tensors in the order of a forward pass, then those of extensions by name; then each
    layer's bundles followed by their checksums.
    """
    layers = [name for info in contents.layers for name in (info.name, bundle_checksums_name(info.layer))]
    tensors = [name for name in required_arrays(contents.manifest) if name not in layers]
    extensions = sorted(contents.tensors.keys() - {*tensors, *layers})
    files = [f"{FILES_PREFIX}/{role}" for role in sorted(contents.files)]
    return [*files, *tensors, *extensions, *layers]


def _copy(source: Path, target: Path, kind: ContainerKind, overwrite: bool, progress: Callable[[int], None]) -> None:
    with closing(open_container(source)) as container:
        contents = read_contents(container)
        documents = {key: read_bytes(container, key) for key in container.extents if is_document(key)}
        payloads = _sources(contents)
        staging = Staging(
            target,
            kind,
            documents={key: len(raw) for key, raw in documents.items()},
            alignments={payload.key: payload.alignment for payload in payloads},
            declaration=hashlib.sha256(b"".join(documents.values())).hexdigest(),
            fingerprint="copy",
            overwrite=overwrite,
        )
        staging.open(sum(container.extents[payload.key].nbytes for payload in payloads))
        background = Background(_N_AHEAD)
        try:
            for payload in payloads:
                if payload.key in staging.done:
                    progress(container.extents[payload.key].nbytes)
                else:
                    _copy_payload(container, payload, staging, background, progress)
            background.finish()
            staging.publish(documents, _open_once)
        finally:
            background.close()
            staging.suspend()


def _copy_payload(
    container: Container, source: _Source, staging: Staging, background: Background, progress: Callable[[int], None]
) -> None:
    nbytes = container.extents[source.key].nbytes
    payload = staging.begin_payload(source.key, nbytes)
    for start in range(0, nbytes, BLOCK_NBYTES):
        block = np.empty(min(BLOCK_NBYTES, nbytes - start), np.uint8)
        container.read_into(source.key, start, block)
        background.submit(partial(payload.append, block))
        progress(block.nbytes)
    background.submit(partial(_complete, payload, source, staging, container.extents[source.key].path))


def _complete(payload: Payload, source: _Source, staging: Staging, path: Path) -> None:
    """Compare what was copied with its checksum, and take note of it."""
    stored = payload.seal()
    message = "the array is damaged"
    require_crc32c(stored.crc32c, source.crc32c, path=path, where=source.name, rule=source.rule, message=message)
    staging.commit((stored,))


def _sources(contents: Contents) -> list[_Source]:
    """Every payload, in the order in which it is copied."""
    found: dict[str, _Source] = {}
    for file in contents.files.values():
        name = f"{FILES_PREFIX}/{file.role}"
        found[name] = _Source(chunk_key(name, 1), name, PAYLOAD_ALIGNMENT, file.crc32c, "FF-SUM-6")
    for tensor in contents.tensors.values():
        key = chunk_key(tensor.name, len(tensor.storage_shape))
        found[tensor.name] = _Source(key, tensor.name, PAYLOAD_ALIGNMENT, tensor.crc32c, "FF-SUM-3")
    for bundles in contents.layers:
        key = chunk_key(bundles.name, BUNDLES_RANK)
        alignment = max(BUNDLES_FILE_ALIGNMENT, bundles.geometry.alignment)
        found[bundles.name] = _Source(key, bundles.name, alignment, bundles.crc32c, "FF-SUM-4")
    return [found[name] for name in canonical_order(contents)]


def _open_once(path: Path) -> None:
    open_model(path).close()


def _ignore(_: int) -> None:
    pass
