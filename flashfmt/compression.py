"""Compressing the stored bytes of a tensor with the codecs of the profile (SPEC.md section "Tensors").

Knows: numcodecs and the settings that documents state. Does not know: files.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from flashfmt.container import Bytes
from flashfmt.encodings import Array
from flashfmt.errors import FlashError
from flashfmt.tensor import Compression, most_decompressed_nbytes

ZSTD_LEVEL: Final = 3
BLOSC_NAME: Final = "zstd"
BLOSC_LEVEL: Final = 5
_BLOSC_MAX_NBYTES: Final = (1 << 31) - 17


def compress(values: Array, codec: Compression, name: str) -> Bytes:
    """Compressed bytes of a C-contiguous array, uint8; equal values give equal bytes.

    Parameters
    ----------
    name : of the array, for errors.

    Raises
    ------
    FlashError
        If the array is larger than Blosc allows, or shrinks so far that readers would take it for a bomb.
    """
    stored = _zstd(values) if codec == "zstd" else _blosc(values, name)
    most = most_decompressed_nbytes(stored.nbytes)
    if values.nbytes > most:
        message = "compresses so far that readers refuse to expand it; store it raw"
        raise FlashError(message, where=name, expected=f"at most {most} bytes", actual=values.nbytes)
    return stored


def _zstd(values: Array) -> Bytes:
    from numcodecs import zstd

    return np.frombuffer(zstd.compress(values, ZSTD_LEVEL), np.uint8)


def _blosc(values: Array, name: str) -> Bytes:
    if values.nbytes > _BLOSC_MAX_NBYTES:
        raise FlashError("too large for blosc; use zstd", where=name, expected=_BLOSC_MAX_NBYTES, actual=values.nbytes)
    from numcodecs import blosc

    return np.frombuffer(blosc.compress(values, BLOSC_NAME.encode(), BLOSC_LEVEL, blosc.SHUFFLE), np.uint8)
