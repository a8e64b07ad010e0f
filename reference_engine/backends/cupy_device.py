"""The GPU by way of CuPy: the one place that imports it, and the only one that may fail for the lack of a GPU.

Knows: CuPy. Does not know: weights, layers.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from flashfmt.errors import BudgetError, FlashError, MissingExtraError
from reference_engine.backends.cupy_protocol import Bytes, DeviceArray, Event, Graph, Queue
from reference_engine.backends.cupy_sources import COMPILER_OPTIONS, kernel_source

_EXTRAS: Final = "flashfmt[gpu] for CUDA 12, flashfmt[gpu-cuda13] for CUDA 13"
_PINNED_ALIGNMENT: Final = 4096
_NULL: Final = np.uintp(0)
_MOST_CONTEXT_NBYTES: Final = 1 << 30  # what is beyond this belongs to others
_LAZY_NBYTES: Final = 32 << 20  # the driver loads a kernel's code when it first runs


def open_cuda_device(index: int = 0) -> CupyDevice:
    """The CUDA device of that number, with all kernels compiled; the compiled kernels are cached on disk by CuPy.

    Compiling takes about half a minute, once for each processor.

    Raises
    ------
    MissingExtraError
        If CuPy is not installed; names the extras that bring it.
    FlashError
        If CuPy finds no such device, lacks the compiler (NVRTC), or cannot compile for it.
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
    except (RuntimeError, ImportError, cupy.cuda.compiler.CompileException) as error:  # CuPy's own are RuntimeErrors
        message = f"no CUDA device can be used: {error}; CuPy must fit the driver: {_EXTRAS}"
        raise FlashError(message) from error


class CupyDevice:
    """`Device` by CuPy. The compute queue is CuPy's default stream, the copy queue a stream of its own.

    What CuPy's operators make is taken from the memory of the device that was opened last.
    """

    def __init__(self, cupy: Any, index: int) -> None:
        self._cupy = cupy
        cupy.cuda.Device(index).use()
        properties = cupy.cuda.runtime.getDeviceProperties(index)
        self._name = str(properties["name"].decode())
        self._pool = cupy.cuda.MemoryPool()
        cupy.cuda.set_allocator(self._pool.malloc)
        self._streams = {
            "compute": cupy.cuda.get_current_stream(),
            "copy": cupy.cuda.Stream(non_blocking=True),
        }
        self._module = cupy.RawModule(code=kernel_source(), options=COMPILER_OPTIONS)
        self._module.compile()
        self._kernels: dict[str, Any] = {}
        self._context_nbytes = _measured_context(index)

    @property
    def name(self) -> str:
        """See `Device.name`."""
        return self._name

    @property
    def context_nbytes(self) -> int | None:
        """See `Device.context_nbytes`."""
        return self._context_nbytes

    def memory(self) -> tuple[int, int]:
        """See `Device.memory`."""
        free, total = self._cupy.cuda.runtime.memGetInfo()
        return int(free), int(total)

    def limit(self, nbytes: int) -> None:
        """See `Device.limit`."""
        self._pool.set_limit(size=nbytes)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """See `Device.empty`."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            return self._cupy.ndarray(shape, dtype, self._pool.malloc(nbytes))
        except self._cupy.cuda.memory.OutOfMemoryError as error:
            raise BudgetError(f"the device has no more room under this ceiling: {error}") from error

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """See `Device.zeros`."""
        array = self.empty(shape, dtype)
        array.data.memset_async(0, array.nbytes)
        return array

    def upload(self, host: npt.NDArray[Any]) -> DeviceArray:
        """See `Device.upload`."""
        array = self.empty(host.shape, host.dtype)
        self.write(array, host)
        return array

    def write(self, target: DeviceArray, host: npt.NDArray[Any]) -> None:
        """See `Device.write`. CUDA takes pageable memory over before it returns; CuPy's buffers would double it."""
        host = np.ascontiguousarray(host)
        target.data.copy_from_host_async(host.ctypes.data, host.nbytes)

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        """See `Device.copy`."""
        target.data.copy_from_device_async(source.data, source.nbytes)

    def download(self, array: DeviceArray) -> npt.NDArray[Any]:
        """See `Device.download`."""
        host: npt.NDArray[Any] = self._cupy.asnumpy(array)
        return host

    def pinned(self, nbytes: int) -> Bytes:
        """See `Device.pinned`. Not from CuPy's pool, which would round up to a power of two."""
        runtime = self._cupy.cuda.runtime
        try:
            memory = self._cupy.cuda.PinnedMemory(max(nbytes, 1) + _PINNED_ALIGNMENT, runtime.hostAllocPortable)
        except runtime.CUDARuntimeError as error:
            raise BudgetError(f"{nbytes} bytes of memory cannot be page-locked: {error}") from error
        whole = np.frombuffer(self._cupy.cuda.PinnedMemoryPointer(memory, 0), np.uint8)
        start = -whole.ctypes.data % _PINNED_ALIGNMENT
        return whole[start : start + nbytes]

    def copy_in(self, target: DeviceArray, source: Bytes) -> None:
        """See `Device.copy_in`."""
        target.data.copy_from_host_async(source.ctypes.data, source.nbytes, self._streams["copy"])

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

    def capture(self, work: Callable[[], None]) -> Graph:
        """See `Device.capture`."""
        stream = self._cupy.cuda.Stream(non_blocking=True)  # the default stream cannot be captured
        with stream:
            stream.begin_capture()
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):
                    stream.end_capture()
                raise
            return stream.end_capture()

    def replay(self, graph: Graph) -> None:
        """See `Device.replay`."""
        graph.launch(self._streams["compute"])

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


@functools.cache
def _measured_context(index: int) -> int | None:
    """Bytes that the current device holds for this process before it has allocated any: asked once, as they do not
    change, and what is allocated later cannot be told from them. None where others hold memory there, too."""
    runtime = importlib.import_module("cupy").cuda.runtime
    free, total = runtime.memGetInfo()
    held = int(total) - int(free)
    return held + _LAZY_NBYTES if held <= _MOST_CONTEXT_NBYTES else None


def _argument(value: Any) -> Any:
    if value is None:
        return _NULL
    return np.uintp(value.ctypes.data) if isinstance(value, np.ndarray) else value
