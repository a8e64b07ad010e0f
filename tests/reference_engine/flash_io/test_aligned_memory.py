"""Buffers are aligned, zeroed and private: shared memory would not get huge pages."""

import sys
from pathlib import Path

import numpy as np
import pytest

from reference_engine.flash_io.aligned_memory import HUGE_PAGE_BYTES, IO_ALIGNMENT, aligned_empty
from reference_engine.machine import resident_nbytes


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 5000, HUGE_PAGE_BYTES - 1, HUGE_PAGE_BYTES, HUGE_PAGE_BYTES + 4097])
def test_alignment_and_contents(nbytes):
    buffer = aligned_empty(nbytes)
    assert buffer.shape == (nbytes,)
    assert buffer.dtype == np.uint8
    assert buffer.flags.writeable
    assert buffer.ctypes.data % (HUGE_PAGE_BYTES if nbytes >= HUGE_PAGE_BYTES else IO_ALIGNMENT) == 0
    assert not buffer.any()
    buffer[:] = 255
    assert not aligned_empty(nbytes).any()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("nbytes", [100, 3 * HUGE_PAGE_BYTES])
def test_private(nbytes):
    buffer = aligned_empty(nbytes)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [(*(int(end, 16) for end in line[0].split("-")), line[1]) for line in lines]
    assert [mode for first, last, mode in spans if first <= buffer.ctypes.data < last] == ["rw-p"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="huge pages are Linux's")
def test_holds_no_more_than_was_asked_for():
    nbytes, n = HUGE_PAGE_BYTES + HUGE_PAGE_BYTES // 4, 16
    before = resident_nbytes()
    buffers = [aligned_empty(nbytes) for _ in range(n)]
    for buffer in buffers:
        buffer[:] = 1
    assert resident_nbytes() - before <= n * nbytes + HUGE_PAGE_BYTES
