"""What this machine and the limits around this process leave us: free memory, resident size, its peak."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

_CGROUP_V2: Final = Path("/sys/fs/cgroup")
_CGROUP_V1: Final = Path("/sys/fs/cgroup/memory")
_PEAK: Final = re.compile(r"^VmHWM:\s*(\d+) kB$", re.MULTILINE)
_CLEAR_REFS: Final = Path("/proc/self/clear_refs")
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


def available_nbytes() -> int:
    """Bytes this process may still take: what the system calls available, or less inside a memory cgroup."""
    room = [int(psutil.virtual_memory().available)]
    for limit, used in _cgroup_limits():
        room.append(max(limit - used, 0))
    return min(room)


def automatic_ceiling() -> int:
    """A sensible ceiling for this process: what it has, and four fifths of what is available to it."""
    return resident_nbytes() + int(available_nbytes() * _AUTO_SHARE)


def _cgroup_limits() -> list[tuple[int, int]]:
    """(limit, used) of each memory cgroup this process is in, up to the root."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = _CGROUP_V2, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = _CGROUP_V1, ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = root / path.lstrip("/")
        for place in (group, *group.parents):
            if not place.is_relative_to(root):
                break
            pair = _read_limit(place / names[0], place / names[1])
            if pair is not None:
                limits.append(pair)
    return limits


def _read_limit(limit: Path, used: Path) -> tuple[int, int] | None:
    try:
        return int(limit.read_text()), int(used.read_text())
    except (OSError, ValueError):  # no such controller here, or "max"
        return None
