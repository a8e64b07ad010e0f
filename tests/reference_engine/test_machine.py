import subprocess
import sys

import numpy as np
import pytest

from reference_engine import machine


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """Makes this process seem to be in a cgroup: gets the listing of /proc and the files' contents by path."""

    def place(listing, files):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        path = tmp_path / "listing"
        path.write_text(listing)
        real = machine.Path
        monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
        monkeypatch.setattr(machine, "Path", lambda p: path if p == "/proc/self/cgroup" else real(p))

    return place


def test_resident_size_grows_with_what_is_touched():
    before = machine.resident_nbytes()
    block = np.ones(64 << 20, np.uint8)
    assert machine.resident_nbytes() - before > 48 << 20
    assert machine.peak_resident_nbytes() >= machine.resident_nbytes() - (1 << 20)
    del block


def test_the_peak_is_not_that_of_the_process_that_started_us():
    block = np.ones(256 << 20, np.uint8)
    code = "from reference_engine.machine import peak_resident_nbytes; print(peak_resident_nbytes())"
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert peak < 128 << 20 < block.nbytes


def test_available_memory_is_the_least_of_system_and_cgroups(monkeypatch):
    monkeypatch.setattr(machine, "_cgroup_limits", list)
    system = machine.available_nbytes()
    assert system > 0
    monkeypatch.setattr(machine, "_cgroup_limits", lambda: [(500 << 20, 100 << 20), (1 << 60, 0)])
    assert machine.available_nbytes() == 400 << 20
    monkeypatch.setattr(machine, "_cgroup_limits", lambda: [(100, 200)])
    assert machine.available_nbytes() == 0


def test_cgroup_files_are_read_up_to_the_root(cgroups):
    files = {
        "a/b/memory.max": "max\n",
        "a/b/memory.current": "5\n",
        "a/memory.max": "1000\n",
        "a/memory.current": "10\n",
    }
    cgroups("0::/a/b\n", files)
    assert machine._cgroup_limits() == [(1000, 10)]


@pytest.mark.parametrize(
    ("listing", "files", "cores"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}, 64),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "250000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "10000 100000\n"}, 1),
        ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 64),
        ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "400000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 4),
        ("4:memory:/a\n", {"memory/a/cpu.cfs_quota_us": "100000\n", "memory/a/cpu.cfs_period_us": "100000\n"}, 64),
    ],
)
def test_a_limit_on_processor_time_limits_the_cores(cgroups, monkeypatch, listing, files, cores):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(64), raising=False)
    cgroups(listing, files)
    assert machine.usable_cores() == cores


def test_automatic_ceiling_leaves_room_for_others(monkeypatch):
    monkeypatch.setattr(machine, "available_nbytes", lambda: 1000 << 20)
    ceiling = machine.automatic_ceiling()
    assert machine.resident_nbytes() < ceiling < machine.resident_nbytes() + (1000 << 20)


LIBRARY = """
import ctypes, sys
import numpy as np
from reference_engine.machine import _unwritten_mappings, release_library, resident_nbytes
import llvmlite.binding as llvm
text = "define i32 @add(i32 %a, i32 %b) { %c = add i32 %a, %b ret i32 %c }"
def compute():
    module = llvm.parse_assembly(text)
    machine = llvm.Target.from_default_triple().create_target_machine()
    with llvm.create_mcjit_compiler(module, machine) as compiler:
        compiler.finalize_object()
        return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int)(compiler.get_function_address("add"))(2, 3)
llvm.initialize_native_target(); llvm.initialize_native_asmprinter()
assert compute() == 5
before = resident_nbytes()
release_library("libllvmlite")
after = resident_nbytes()
assert compute() == 5
print(len(_unwritten_mappings("libllvmlite")), before - after)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_released_library_still_works():
    result = subprocess.run([sys.executable, "-c", LIBRARY], capture_output=True, text=True, check=True)
    n_mappings, n_released = map(int, result.stdout.split())
    assert n_mappings >= 2
    assert n_released > 16 << 20


def test_a_library_that_is_not_loaded_is_left_alone():
    machine.release_library("libnothing")
