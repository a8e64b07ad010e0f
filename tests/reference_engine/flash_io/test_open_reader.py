import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from flashfmt.errors import FlashReadError
from reference_engine.flash_io import IoTuning, aligned_empty, linux_syscalls, open_reader
from reference_engine.flash_io.open_file import open_file

UNIT = 4096


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(range(16)) * UNIT)
    return path


@pytest.fixture
def _no_direct(monkeypatch):
    whole = os.open

    def refusing(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return whole(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)


def reads(reader):
    buffer = aligned_empty(2 * UNIT)
    reader.submit(np.array([UNIT, 4 * UNIT]), UNIT, buffer, np.array([UNIT, 0])).wait()
    reader.close()
    return buffer.tobytes() == bytes(range(16)) * (2 * UNIT // 16)


def needs_direct(path):
    file = open_file(path)
    file.close()
    if not file.is_direct:
        pytest.skip("the temporary directory's file system allows no direct reads")


def test_kernel_queues_are_found_by_trying(path, monkeypatch):
    needs_direct(path)
    monkeypatch.setattr(linux_syscalls, "io_uring_setup", lambda *_: -errno.EPERM)
    reader = open_reader(path)
    assert reader.name == "aio"
    assert reads(reader)
    monkeypatch.setattr(linux_syscalls, "io_setup", lambda *_: -errno.EAGAIN)
    reader = open_reader(path)
    assert reader.name == "pread"
    assert reads(reader)
    with pytest.raises(FlashReadError, match="io_uring_setup: Operation not permitted"):
        open_reader(path, backend="uring")


def test_an_older_ring_setup_is_tried(path, monkeypatch):
    needs_direct(path)
    setup, flags_seen = linux_syscalls.io_uring_setup, []

    def older(n_entries, params_address):
        import ctypes

        flags = ctypes.c_uint32.from_address(params_address + 8).value
        flags_seen.append(flags)
        return -errno.EINVAL if flags else setup(n_entries, params_address)

    monkeypatch.setattr(linux_syscalls, "io_uring_setup", older)
    if linux_syscalls.MACHINE != "x86_64":
        with pytest.raises(FlashReadError):
            open_reader(path, backend="uring")
        return
    try:
        reader = open_reader(path, backend="uring")
    except FlashReadError as error:
        pytest.skip(f"no io_uring here: {error}")
    assert flags_seen == [1 << 8, 0]
    assert reads(reader)


@pytest.mark.usefixtures("_no_direct")
def test_without_direct_reads_threads_read_through_the_page_cache_and_drop_it(path, monkeypatch):
    dropped = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: dropped.append(arguments[1:3]))
    reader = open_reader(path, tuning=IoTuning(gap_bytes=0))
    assert (reader.name, reader.file.is_direct, reader.file.alignment) == ("pread", False, 1)
    assert reads(reader)
    assert sorted(dropped) == [(UNIT, UNIT), (4 * UNIT, UNIT)]
    with pytest.raises(FlashReadError, match="allows no direct reads"):
        open_reader(path, backend="uring")


def test_ranges_finer_than_the_device_allows_are_read_buffered(path):
    reader = open_reader(path, range_alignment=64)
    assert not reader.file.is_direct
    buffer = np.zeros(100, np.uint8)
    reader.submit(np.array([3, 64]), np.array([5, 20]), buffer, np.array([1, 50])).wait()
    reader.close()
    assert buffer[1:6].tolist() == [3, 4, 5, 6, 7]
    assert buffer[50:54].tolist() == [0, 1, 2, 3]


def test_alignment_is_4096_where_the_kernel_does_not_tell(path, monkeypatch):
    needs_direct(path)
    with_statx = open_file(path)
    with_statx.close()
    assert with_statx.alignment % 512 == 0
    monkeypatch.setattr(linux_syscalls, "statx", lambda *_: -errno.ENOSYS)
    file = open_file(path)
    file.close()
    assert file.alignment == 4096


def test_alignment_is_the_larger_of_memory_and_offset(path, monkeypatch):
    needs_direct(path)

    def telling(fd, flags, mask, address):
        import ctypes

        words = (ctypes.c_uint32 * 64).from_address(address)
        words[0], words[38], words[39] = 0x2000, 4, 2048
        return 0

    monkeypatch.setattr(linux_syscalls, "statx", telling)
    file = open_file(path)
    file.close()
    assert file.alignment == 2048


def test_tuning_that_does_not_suit_the_file_is_refused(path):
    needs_direct(path)
    for tuning in (IoTuning(max_request_bytes=1000), IoTuning(gap_bytes=100), IoTuning(depth=0)):
        with pytest.raises(ValueError, match="does not suit"):
            open_reader(path, backend="pread", tuning=tuning)


def test_no_descriptor_is_left_open_by_a_failure(path):
    needs_direct(path)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="does not suit"):
        open_reader(path, tuning=IoTuning(depth=0))
    empty = path.with_name("empty.bin")
    empty.touch()
    with pytest.raises(FlashReadError, match="cannot map"):
        open_reader(empty, backend="mmap")
    reader = open_reader(path)
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("loaded", [False, True])
def test_compiled_functions_are_taken_where_numba_is_loaded(path, loaded):
    code = (
        f"import sys, pathlib; {'import numba;' if loaded else ''} from reference_engine.flash_io import open_reader;"
        f"open_reader(pathlib.Path({str(path)!r}), backend='uring').close();"
        "print('reference_engine.flash_io.numba_queue' in sys.modules, 'numba' in sys.modules)"
    )
    needs_direct(path)
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "FlashReadError" in shown.stderr:
        pytest.skip("io_uring does not work here")
    assert shown.stdout.split() == [str(loaded)] * 2, shown.stderr
