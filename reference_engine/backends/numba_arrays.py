"""Addresses of arrays, for kernels that take those.

Knows: numpy's arrays. Does not know: what lies in them.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from reference_engine.backends.protocol import F32Array

_F32: Final = np.dtype(np.float32)


def base_address(array: npt.NDArray[Any]) -> int:
    """Address of the first element; `ctypes.data` would take twice as long."""
    address: int = array.__array_interface__["data"][0]
    return address


def float_address(array: F32Array, shape: tuple[int, ...]) -> int:
    """Address of a float32 C-contiguous array of a certain shape.

    Raises
    ------
    ValueError
        If it is another one.
    """
    if array.shape != shape or array.dtype != _F32 or not array.flags.c_contiguous:
        raise ValueError(f"expected a C-contiguous float32 array {shape}, got {array.dtype} {array.shape}")
    return base_address(array)


def optional_address(array: F32Array | None, shape: tuple[int, ...]) -> int:
    """`float_address`, or 0 for None."""
    return 0 if array is None else float_address(array, shape)


def output_address(array: F32Array, shape: tuple[int, ...]) -> int:
    """`float_address` of an array to be written.

    Raises
    ------
    ValueError
        If it is read-only.
    """
    if not array.flags.writeable:
        raise ValueError("the output is read-only")
    return float_address(array, shape)
