"""Compressing the stored bytes of a tensor with the codecs of the profile (SPEC.md section "Tensors").

Knows: numcodecs and the settings that documents state. Does not know: files.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from flashfmt.container import Bytes
from flashfmt.encodings import Array
from flashfmt.errors import FlashError
from flashfmt.tensor import Compression

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
        If the array is larger than Blosc allows.
    """
    if codec == "zstd":
        from numcodecs import zstd

        return np.frombuffer(zstd.compress(values, ZSTD_LEVEL), np.uint8)
    if values.nbytes > _BLOSC_MAX_NBYTES:
        raise FlashError("too large for blosc; use zstd", where=name, expected=_BLOSC_MAX_NBYTES, actual=values.nbytes)
    from numcodecs import blosc

    return np.frombuffer(blosc.compress(values, BLOSC_NAME.encode(), BLOSC_LEVEL, blosc.SHUFFLE), np.uint8)
