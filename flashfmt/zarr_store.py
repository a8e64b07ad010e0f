"""A read-only zarr-python store over a flash model, so that Zarr programs can read `.flash` files.

zarr's own ZipStore reads through an entry to reach a byte range; this one reads the range. Needs zarr; nothing on
the load path imports this module.

Knows: keys and byte ranges. Does not know: arrays.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any, NoReturn

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from flashfmt.container import read_bytes
from flashfmt.reader import open_container


class FlashStore(Store):
    """Keys of a `.flash` file or a model directory: ``zarr.open_group(FlashStore(path), mode="r")``.

    Checks the container, not the model; `flashfmt.open` does that.

    Raises
    ------
    FlashError
        If the path is no flash container.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(read_only=True)
        self.path = Path(path)
        self._container = open_container(self.path)
        self._is_open = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlashStore) and other.path == self.path

    def __hash__(self) -> int:
        return hash(self.path)

    def __str__(self) -> str:
        return f"flash://{self.path}"

    def __repr__(self) -> str:
        return f"FlashStore({str(self.path)!r})"

    def __reduce__(self) -> tuple[type[FlashStore], tuple[Path]]:
        return FlashStore, (self.path,)

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Bytes of a key or of a range of it, by pread; None where there is no such key."""
        extent = self._container.extents.get(key)
        if extent is None:
            return None
        start, stop = _range(byte_range, extent.nbytes)
        buffer = (prototype or default_buffer_prototype()).buffer
        return buffer.from_bytes(read_bytes(self._container, key, start, stop))

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """As `get_sync`."""
        return self.get_sync(key, prototype=prototype, byte_range=byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """As `get_sync`, for several ranges."""
        return [self.get_sync(key, prototype=prototype, byte_range=wanted) for key, wanted in key_ranges]

    async def exists(self, key: str) -> bool:
        """Whether there is such a key."""
        return key in self._container.extents

    async def set(self, key: str, value: Buffer) -> NoReturn:
        """Refuse: a flash model is written by FlashWriter only."""
        raise NotImplementedError("a flash model is read-only here")

    async def delete(self, key: str) -> NoReturn:
        """Refuse: a flash model is written by FlashWriter only."""
        raise NotImplementedError("a flash model is read-only here")

    async def list(self) -> AsyncIterator[str]:
        """Every key."""
        for key in self._container.extents:
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Every key that begins with `prefix`."""
        for key in self._container.extents:
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Names directly below `prefix`, each once."""
        below = prefix.rstrip("/") + "/" if prefix.rstrip("/") else ""
        names = {key[len(below) :].split("/", 1)[0] for key in self._container.extents if key.startswith(below)}
        for name in sorted(names):
            yield name

    def close(self) -> None:
        """Release the file."""
        super().close()
        self._container.close()


def _range(request: Any, nbytes: int) -> tuple[int, int]:
    """Half-open range of a request inside `nbytes` bytes; like a slice it ends where the bytes end."""
    if isinstance(request, RangeByteRequest):
        start, stop = request.start, request.end
    elif isinstance(request, OffsetByteRequest):
        start, stop = request.offset, nbytes
    elif isinstance(request, SuffixByteRequest):
        start, stop = nbytes - request.suffix, nbytes
    else:
        start, stop = 0, nbytes
    start = min(max(start, 0), nbytes)
    return start, max(start, min(stop, nbytes))
