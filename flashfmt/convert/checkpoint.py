"""What a source checkpoint offers: a config, tensors by name, and files by role.

Knows: names, shapes and float types as the source has them. Does not know: families, the flash format's names, how a
source stores its bytes. Tensor names are those of the Hugging Face checkpoints, whatever the container.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from flashfmt.encodings import Encoding
from flashfmt.errors import CheckpointError, FlashReadError

Array = npt.NDArray[Any]
F32Array = npt.NDArray[np.float32]

SourceFormat = Literal["safetensors", "gguf"]

MAX_JSON_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """Shape and float type of a source tensor.

    `encoding` is the type that `Checkpoint.read` delivers (f32, f16 or bf16). `quantised` says that the source holds
    fewer bits than that, which makes float16 enough.
    """

    shape: tuple[int, ...]
    encoding: Encoding
    quantised: bool = False

    @property
    def lossless_encoding(self) -> Encoding:
        """Smallest plain encoding that keeps what the source knows; float16 for quantised sources."""
        return Encoding.F16 if self.quantised else self.encoding


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """Rows of a tensor in storage form: float32, float16, or the uint16 bits of bfloat16. `data` is never shared."""

    encoding: Encoding
    data: Array


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A text file of the source, stored verbatim under its role."""

    filename: str
    content: bytes


class Checkpoint(Protocol):
    """A readable source of weights. `read` may be called from one thread at a time, any thread."""

    path: Path
    source: str
    """Name of the source without its folder: what provenance records."""
    source_format: SourceFormat
    config: Mapping[str, Any]
    tensors: Mapping[str, SourceInfo]
    files: Mapping[str, SourceFile]
    licence: str | None
    sha256: str
    """SHA-256 over the names, sizes, configuration and tensor headers of the source, not over the weights' bytes."""
    fingerprint: str
    """Like `sha256`, with modification times: changes when the source may have changed."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> SourceTensor:
        """Rows [start, stop) of a tensor along its first axis, in a new array. Raises as `read_exactly`."""
        ...

    def close(self) -> None:
        """Close the source's files."""
        ...


def parse_json_object(content: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in `content`; CheckpointError with the place of the fault when there is none."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not valid JSON: {error}", path=path) from error
    if not isinstance(document, dict):
        raise CheckpointError("not a JSON object", path=path, expected="object", actual=type(document).__name__)
    return document


def read_limited(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """Content of a small file; CheckpointError when it is missing, unreadable or larger than `limit` bytes."""
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", path=path) from error
    if len(content) > limit:
        raise CheckpointError("too large", path=path, expected=f"at most {limit} bytes", actual="more")
    return content


def read_exactly(fd: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill `buffer` with the bytes of a file from `offset` on.

    Raises
    ------
    CheckpointError
        If the file ends before.
    FlashReadError
        If the system fails to read.
    """
    done = 0
    while done < len(buffer):
        try:
            n_read = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError as error:
            raise FlashReadError(f"reading failed: {error.strerror}", path=path, where=offset + done) from error
        if n_read == 0:
            raise CheckpointError(
                "truncated while being read",
                path=path,
                where=offset + done,
                expected=f"{len(buffer)} bytes from byte {offset}",
                actual=done,
            )
        done += n_read


def identity(parts: Mapping[str, object]) -> str:
    """SHA-256 (hex) of a mapping of names to JSON values, independent of their order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
