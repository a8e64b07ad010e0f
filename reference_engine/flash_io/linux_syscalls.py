"""System calls that Python has no function for: statx, io_uring and native AIO, by number through ctypes.

Knows numbers and calling conventions; the meaning of what is passed lies with the callers. Every call releases the
interpreter lock, and none is retried here: a result below zero is an errno with its sign changed.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import sys
from typing import Final

MACHINE: Final = platform.machine()
IS_SUPPORTED: Final = (
    sys.platform == "linux" and sys.maxsize > 2**32 and sys.byteorder == "little" and MACHINE in ("x86_64", "aarch64")
)

_IO_URING_SETUP: Final = 425
_IO_URING_ENTER: Final = 426
_STATX: Final = {"x86_64": 332, "aarch64": 291}.get(MACHINE, 0)
_IO_SETUP, _IO_DESTROY, _IO_GETEVENTS, _IO_SUBMIT = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}.get(
    MACHINE, (0, 0, 0, 0)
)

_ZEROS: Final = (0,) * 6

_libc: Final = ctypes.CDLL(None, use_errno=True) if IS_SUPPORTED else None


if _libc is not None:  # every argument is widened to 64 bits, as the variadic function needs
    _libc.syscall.argtypes = [ctypes.c_long] * 7
    _libc.syscall.restype = ctypes.c_long


def _call(number: int, *arguments: int) -> int:
    if _libc is None:
        raise OSError(errno.ENOSYS, f"no raw system calls on {sys.platform} {MACHINE}")
    result: int = _libc.syscall(number, *arguments, *_ZEROS[len(arguments) :])
    return result if result >= 0 else -ctypes.get_errno()


def statx(fd: int, flags: int, mask: int, result_address: int) -> int:
    """Fill ``struct statx`` (256 bytes) at `result_address` about the open file `fd`."""
    empty = ctypes.create_string_buffer(1)
    return _call(_STATX, fd, ctypes.addressof(empty), flags, mask, result_address)


def io_uring_setup(n_entries: int, params_address: int) -> int:
    """A ring's file descriptor; fills ``struct io_uring_params`` (120 bytes)."""
    return _call(_IO_URING_SETUP, n_entries, params_address)


def io_uring_enter(ring_fd: int, n_submit: int, min_complete: int, flags: int) -> int:
    """Number of entries that the kernel took from the submission ring."""
    if _libc is None:
        return -errno.ENOSYS
    result: int = _libc.syscall(_IO_URING_ENTER, ring_fd, n_submit, min_complete, flags, 0, 0)
    return result if result >= 0 else -ctypes.get_errno()


def io_setup(n_events: int, context_address: int) -> int:
    """Make an AIO context; its handle is stored at `context_address`, which must hold 0."""
    return _call(_IO_SETUP, n_events, context_address)


def io_destroy(context: int) -> int:
    """End an AIO context; returns when nothing of it is in flight."""
    return _call(_IO_DESTROY, context)


def io_submit(context: int, n: int, pointers_address: int) -> int:
    """Number of control blocks accepted, of `n` pointers at `pointers_address`; the blocks are copied."""
    return _call(_IO_SUBMIT, context, n, pointers_address)


def io_getevents(context: int, min_events: int, max_events: int, events_address: int) -> int:
    """Number of ``struct io_event`` stored, after waiting for `min_events`."""
    return _call(_IO_GETEVENTS, context, min_events, max_events, events_address)
