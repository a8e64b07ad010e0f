"""What this machine and the limits around this process leave us: cores, free memory, resident size, its peak."""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

_CGROUPS: Final = Path("/sys/fs/cgroup")
_PEAK: Final = re.compile(r"^VmHWM:\s*(\d+) kB$", re.MULTILINE)
_CLEAR_REFS: Final = Path("/proc/self/clear_refs")
_SMAPS: Final = Path("/proc/self/smaps")
_MAPPING: Final = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+ +(/.*)$")
_MADV_DONTNEED: Final = 4
_AUTO_SHARE: Final = 0.8  # of what is free: the rest is for the page cache and the other programs


def resident_nbytes() -> int:
    """Bytes of this process in DRAM now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_nbytes() -> int:
    """Most bytes this process ever had in DRAM."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    match = _PEAK.search(status)
    if match is not None:  # getrusage would count what the parent held when it started us
        return int(match[1]) * 1024
    import resource  # POSIX only, so not at import time

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> None:
    """Let the peak begin anew from what the process holds now; Linux only, and nothing elsewhere."""
    with suppress(OSError):
        _CLEAR_REFS.write_text("5")


def trim_heap() -> None:
    """Give memory that was freed, but is still held by the C library, back to the system; glibc only."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def release_library(name: str) -> None:
    """Let go of the pages of a shared library's code and constants; what is needed again is read again. Linux only.

    Pages of its own that this process has written to, relocations among them, stay.

    Parameters
    ----------
    name : the file's name begins with it.
    """
    if not sys.platform.startswith("linux"):
        return
    c_library = ctypes.CDLL(None)
    c_library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for first, last in _unwritten_mappings(name):
        c_library.madvise(first, last - first, _MADV_DONTNEED)


def available_nbytes() -> int:
    """Bytes this process may still take: what the system calls available, or less inside a memory cgroup."""
    room = [int(psutil.virtual_memory().available)]
    for limit, used in _cgroup_limits():
        room.append(max(limit - used, 0))
    return min(room)


def automatic_ceiling() -> int:
    """A sensible ceiling for this process: what it has, and four fifths of what is available to it."""
    return resident_nbytes() + int(available_nbytes() * _AUTO_SHARE)


def usable_cores() -> int:
    """Processor cores this process may keep busy: those it may run on, or fewer where a cgroup limits its time."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([n, *(math.ceil(share) for share in _cpu_quotas())]))


def _unwritten_mappings(name: str) -> list[tuple[int, int]]:
    """(first, last) address of the read-only mappings of a library that hold nothing but what its file holds."""
    try:
        lines = _SMAPS.read_text().splitlines()
    except OSError:
        return []
    mappings, candidate = [], None
    for line in lines:
        match = _MAPPING.match(line)
        if match is not None:
            is_wanted = Path(match[4]).name.startswith(name) and match[3][1] == "-" and match[3][3] == "p"
            candidate = (int(match[1], 16), int(match[2], 16)) if is_wanted else None
        elif candidate is not None and line.split() == ["Anonymous:", "0", "kB"]:
            mappings.append(candidate)
    return mappings


def _cgroup_limits() -> list[tuple[int, int]]:
    """(limit, used) of each memory cgroup this process is in, up to the root."""
    limits = []
    for group, is_v2 in _cgroups("memory"):
        names = ("memory.max", "memory.current") if is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        pair = _read_numbers(*(group / name for name in names))
        if pair is not None:
            limits.append((pair[0], pair[1]))
    return limits


def _cpu_quotas() -> list[float]:
    """Cores' worth of time that each cgroup this process is in allows, where it sets a limit."""
    quotas = []
    for group, is_v2 in _cgroups("cpu"):
        files = [group / "cpu.max"] if is_v2 else [group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us"]
        pair = _read_numbers(*files)
        if pair is not None and pair[0] > 0 and pair[1] > 0:  # -1 is no limit
            quotas.append(pair[0] / pair[1])
    return quotas


def _cgroups(controller: str) -> Iterator[tuple[Path, bool]]:
    """Directories of the cgroups this process is in, up to the root; whether they are of version 2."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUPS / controller if controllers else _CGROUPS
        group = root / path.lstrip("/")
        for place in (group, *group.parents):
            if not place.is_relative_to(root):
                break
            yield place, not controllers


def _read_numbers(*files: Path) -> list[int] | None:
    """All numbers in some files; None where one is missing, or holds a word such as "max"."""
    try:
        return [int(word) for file in files for word in file.read_text().split()]
    except (OSError, ValueError):
        return None
