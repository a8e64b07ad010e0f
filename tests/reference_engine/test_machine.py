import subprocess
import sys

import numpy as np

from reference_engine import machine


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


def test_cgroup_files_are_read_up_to_the_root(tmp_path, monkeypatch):
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("5\n")
    (tmp_path / "a" / "memory.max").write_text("1000\n")
    (tmp_path / "a" / "memory.current").write_text("10\n")
    listing = tmp_path / "cgroup"
    listing.write_text("0::/a/b\n")
    real = machine.Path
    monkeypatch.setattr(machine, "_CGROUP_V2", tmp_path)
    monkeypatch.setattr(machine, "Path", lambda p: listing if p == "/proc/self/cgroup" else real(p))
    assert machine._cgroup_limits() == [(1000, 10)]


def test_automatic_ceiling_leaves_room_for_others(monkeypatch):
    monkeypatch.setattr(machine, "available_nbytes", lambda: 1000 << 20)
    ceiling = machine.automatic_ceiling()
    assert machine.resident_nbytes() < ceiling < machine.resident_nbytes() + (1000 << 20)
