"""The GPU by way of CuPy: the one place that imports it, and the only one that may fail for the lack of a GPU.

Knows: CuPy. Does not know: weights, layers.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from flashfmt.errors import BudgetError, FlashError, MissingExtraError
from flashfmt.layout import round_up
from reference_engine.backends.cupy_protocol import Bytes, DeviceArray, Event, Queue
from reference_engine.backends.cupy_sources import COMPILER_OPTIONS, kernel_source

_EXTRAS: Final = "flashfmt[gpu] for CUDA 12, flashfmt[gpu-cuda13] for CUDA 13"
_PINNED_ALIGNMENT: Final = 4096
_NULL: Final = np.uintp(0)


def open_cuda_device(index: int = 0) -> CupyDevice:
    """The CUDA device of that number, with all kernels compiled; the compiled kernels are cached on disk by CuPy.

    Raises
    ------
    MissingExtraError
        If CuPy is not installed; names the extras that bring it.
    FlashError
        If CuPy finds no such device, or cannot compile for it.
    """
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise MissingExtraError(f"a CUDA device needs CuPy; install {_EXTRAS}") from error
    try:
        n_devices: int = cupy.cuda.runtime.getDeviceCount()
        if not 0 <= index < n_devices:
            raise FlashError("there is no such CUDA device", expected=f"0 to {n_devices - 1}", actual=index)
        return CupyDevice(cupy, index)
    except (cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.compiler.CompileException) as error:
        message = f"no CUDA device can be used: {error}; CuPy must fit the driver: {_EXTRAS}"
        raise FlashError(message) from error


class CupyDevice:
    """`Device` by CuPy. The compute queue is the legacy default stream, the copy queue a stream of its own."""

    def __init__(self, cupy: Any, index: int) -> None:
        self._cupy = cupy
        cupy.cuda.Device(index).use()
        properties = cupy.cuda.runtime.getDeviceProperties(index)
        self._name = str(properties["name"].decode())
        self._pool = cupy.cuda.MemoryPool()
        cupy.cuda.set_allocator(self._pool.malloc)
        self._streams = {
            "compute": cupy.cuda.Stream.null,
            "copy": cupy.cuda.Stream(non_blocking=True),
        }
        self._module = cupy.RawModule(code=kernel_source(), options=COMPILER_OPTIONS)
        self._module.compile()
        self._kernels: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """See `Device.name`."""
        return self._name

    def memory(self) -> tuple[int, int]:
        """See `Device.memory`."""
        free, total = self._cupy.cuda.runtime.memGetInfo()
        return int(free), int(total)

    def limit(self, nbytes: int) -> None:
        """See `Device.limit`."""
        self._pool.set_limit(size=nbytes)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """See `Device.empty`."""
        return self._allocated(lambda: self._cupy.empty(shape, dtype))

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """See `Device.zeros`."""
        return self._allocated(lambda: self._cupy.zeros(shape, dtype))

    def upload(self, host: npt.NDArray[Any]) -> DeviceArray:
        """See `Device.upload`."""
        return self._allocated(lambda: self._cupy.array(host))

    def download(self, array: DeviceArray) -> npt.NDArray[Any]:
        """See `Device.download`."""
        host: npt.NDArray[Any] = self._cupy.asnumpy(array)
        return host

    def pinned(self, nbytes: int) -> Bytes:
        """See `Device.pinned`."""
        memory = self._cupy.cuda.alloc_pinned_memory(round_up(max(nbytes, 1), _PINNED_ALIGNMENT) + _PINNED_ALIGNMENT)
        whole = np.frombuffer(memory, np.uint8)
        start = -whole.ctypes.data % _PINNED_ALIGNMENT
        return whole[start : start + nbytes]

    def copy_in(self, target: DeviceArray, source: Bytes) -> None:
        """See `Device.copy_in`."""
        target.data.copy_from_host_async(ctypes.c_void_p(source.ctypes.data), source.nbytes, self._streams["copy"])

    def address(self, array: Any) -> int:
        """See `Device.address`."""
        return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)

    def launch(self, kernel: str, grid: tuple[int, int, int], n_threads: int, *arguments: Any, queue: Queue) -> None:
        """See `Device.launch`."""
        function = self._kernels.get(kernel)
        if function is None:
            function = self._kernels[kernel] = self._module.get_function(kernel)
        values = tuple(map(_argument, arguments))
        if queue == "compute":  # the current stream, unless told otherwise
            function(grid, (n_threads, 1, 1), values)
            return
        with self._streams[queue]:
            function(grid, (n_threads, 1, 1), values)

    def record(self, queue: Queue) -> Event:
        """See `Device.record`."""
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(self._streams[queue])
        return event

    def wait(self, queue: Queue, event: Event) -> None:
        """See `Device.wait`."""
        self._streams[queue].wait_event(event)

    def synchronize(self, event: Event) -> None:
        """See `Device.synchronize`."""
        event.synchronize()

    def _allocated(self, make: Callable[[], DeviceArray]) -> DeviceArray:
        try:
            return make()
        except self._cupy.cuda.memory.OutOfMemoryError as error:
            raise BudgetError(f"the device has no more room under this ceiling: {error}") from error


def _argument(value: Any) -> Any:
    if value is None:
        return _NULL
    return np.uintp(value.ctypes.data) if isinstance(value, np.ndarray) else value
