"""The CUDA kernels on two devices: on this processor, by a host compiler, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import weakref
from pathlib import Path

import numpy as np
import pytest

from flashfmt.errors import FlashError
from reference_engine.backends.cupy_backend import CupyBackend
from reference_engine.backends.cupy_device import open_cuda_device
from reference_engine.backends.cupy_sources import kernel_source

HEADER = Path(__file__).parent / "host_cuda.h"
POISON = 0xA5


class EmulatedDevice:
    """`Device` whose memory is the host's and whose queues run at once. New arrays hold poison.

    Arrays beyond the limit are refused, though what numpy allocates for its own results is not counted.
    """

    name = "emulated"
    context_nbytes = None

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.n_launches = 0
        self.captured = None
        self.in_use = 0
        self.most = 1 << 40

    def memory(self):
        return 1 << 40, 1 << 40

    def limit(self, nbytes):
        self.most = nbytes

    def empty(self, shape, dtype):
        count = int(np.prod(shape, dtype=np.int64))
        whole = np.full(count * np.dtype(dtype).itemsize + 64, POISON, np.uint8)
        self.in_use += whole.nbytes
        weakref.finalize(whole, self._freed, whole.nbytes)
        if self.in_use > self.most:
            raise MemoryError(f"{self.in_use} bytes in use, of {self.most}")
        start = -whole.ctypes.data % 64
        return whole[start : start + whole.nbytes - 64].view(dtype).reshape(shape)

    def _freed(self, nbytes):
        self.in_use -= nbytes

    def zeros(self, shape, dtype):
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def upload(self, host):
        array = self.empty(host.shape, host.dtype)
        array[...] = host
        return array

    def write(self, target, host):
        assert self.captured is None
        assert (target.shape, target.dtype) == (host.shape, host.dtype)
        target[...] = host

    def copy(self, target, source):
        assert target.nbytes == source.nbytes
        assert target.flags.c_contiguous
        assert source.flags.c_contiguous
        if self.captured is not None:
            self.captured.append(lambda: self.copy(target, source))
        else:
            target.reshape(-1)[:] = source.reshape(-1).view(target.dtype)

    def download(self, array):
        assert self.captured is None
        return array.copy()

    def pinned(self, nbytes):
        whole = np.full(nbytes + 4096, POISON, np.uint8)
        start = -whole.ctypes.data % 4096
        return whole[start : start + nbytes]

    def copy_in(self, target, source):
        assert target.nbytes == source.nbytes
        target[...] = source

    def address(self, array):
        return array.ctypes.data

    def launch(self, kernel, grid, n_threads, *arguments, queue):
        if self.captured is not None:
            assert queue == "compute"
            self.captured.append(lambda: self.launch(kernel, grid, n_threads, *arguments, queue=queue))
            return
        values = []
        for value in arguments:
            if value is None or isinstance(value, np.ndarray):
                values.append(np.array([0 if value is None else value.ctypes.data], np.uint64))
            else:
                values.append(np.array([value]))
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        getattr(self.library, f"launch_{kernel}")((ctypes.c_uint * 3)(*grid), n_threads, pointers)
        self.n_launches += 1

    def capture(self, work):
        """As on a GPU, a graph keeps addresses only: the arrays that it names may be gone when it is replayed."""
        self.captured = []
        try:
            work()
            return self.captured
        finally:
            self.captured = None

    def replay(self, graph):
        for step in graph:
            step()

    def record(self, queue):
        return (queue, self.n_launches)

    def wait(self, queue, event):
        pass

    def synchronize(self, event):
        pass


@pytest.fixture(scope="session")
def kernel_library(tmp_path_factory):
    """All kernels compiled for this processor."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the kernels for this processor")
    folder = tmp_path_factory.mktemp("cuda")
    source = folder / "kernels.cpp"
    source.write_text(f'#include "{HEADER}"\n{kernel_source()}')
    flags = ["-std=c++17", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
    expanded = subprocess.run([compiler, *flags, "-E", source], check=True, capture_output=True, text=True).stdout
    names = re.findall(r'extern "C"\s+void\s+(\w+)\(', expanded)
    with source.open("a") as file:
        file.writelines(f"EXPORT({name})\n" for name in names)
    library = folder / "kernels.so"
    subprocess.run([compiler, *flags, "-O1", "-shared", "-fPIC", source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="session", params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "emulated":
        return EmulatedDevice(request.getfixturevalue("kernel_library"))
    try:
        return open_cuda_device()
    except FlashError as error:
        pytest.skip(f"no GPU: {error}")


@pytest.fixture(scope="session")
def backend(device):
    return CupyBackend(device)


@pytest.fixture(scope="session")
def on_device(device):
    """Copies host arrays, matrices' data included, to the device."""

    def upload(array):
        return None if array is None else device.upload(np.ascontiguousarray(array))

    return upload
