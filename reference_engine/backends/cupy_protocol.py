"""What the CUDA backend and the device's bundle sources ask of a device: memory, copies, launches, ordering.

Two queues of work run side by side: ``compute``, in which kernels and array operations run in the order given, and
``copy``, for transfers. `Device.record` and `Device.wait` order one behind the other.

A device array is what the device says it is: CuPy's ndarray on a GPU. Its operators and the numpy functions that it
takes part in run on the device, in the compute queue.

Knows: arrays, bytes, queues. Does not know: weights, layers. Imports nothing of CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

DeviceArray = Any
Event = Any
Graph = Any
Queue = Literal["compute", "copy"]
Bytes = npt.NDArray[np.uint8]


class Device(Protocol):
    """One GPU, as far as inference needs it. May be used from one thread."""

    @property
    def name(self) -> str:
        """What the device calls itself."""
        ...

    @property
    def context_nbytes(self) -> int | None:
        """Bytes of device memory that the driver takes for this process beside arrays; None where unknown."""
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes of device memory that are free, and bytes that there are."""
        ...

    def limit(self, nbytes: int) -> None:
        """Let arrays take at most `nbytes` of device memory in all; what exceeds it fails to be allocated."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """A C-contiguous array at a multiple of 64 bytes, of undefined values."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """The same, of zeros."""
        ...

    def upload(self, host: npt.NDArray[Any]) -> DeviceArray:
        """A new device array with the values of `host`: pageable memory that may change as soon as this returns."""
        ...

    def write(self, target: DeviceArray, host: npt.NDArray[Any]) -> None:
        """Give a C-contiguous array the values of `host`, of its shape and type, in the compute queue; see `upload`."""
        ...

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        """Copy a C-contiguous array to another of its size, in the compute queue."""
        ...

    def download(self, array: DeviceArray) -> npt.NDArray[Any]:
        """A new host array with the values of `array`, after everything in the compute queue so far."""
        ...

    def pinned(self, nbytes: int) -> Bytes:
        """Page-locked host memory at a multiple of 4096, uint8 [nbytes]; kernels may be given its views as well."""
        ...

    def copy_in(self, target: DeviceArray, source: Bytes) -> None:
        """Begin to copy `source`, page-locked, to `target`, uint8 of the same size, in the copy queue."""
        ...

    def address(self, array: Any) -> int:
        """Address of the first element of a device array, or of a view of page-locked memory."""
        ...

    def launch(self, kernel: str, grid: tuple[int, int, int], n_threads: int, *arguments: Any, queue: Queue) -> None:
        """Begin to run a kernel of `kernel_source`.

        Parameters
        ----------
        grid : blocks in each direction, all above 0.
        n_threads : of a block.
        arguments : arrays and views for pointers, None for null, numpy scalars of the C type for the others.
        """
        ...

    def capture(self, work: Callable[[], None]) -> Graph:
        """All that `work` launches, copies and sets to zero in the compute queue, to be done by `replay`.

        Nothing of it is done now. Every array it names must live as long as the graph; `work` must not wait, upload or
        download, and its kernels have run before.
        """
        ...

    def replay(self, graph: Graph) -> None:
        """Do what was captured, in the compute queue, with the same arguments: one launch."""
        ...

    def record(self, queue: Queue) -> Event:
        """A mark behind everything in the queue so far."""
        ...

    def wait(self, queue: Queue, event: Event) -> None:
        """Let what is put into the queue from now on run after `event`; returns at once."""
        ...

    def synchronize(self, event: Event) -> None:
        """Return when `event` has been reached."""
        ...
