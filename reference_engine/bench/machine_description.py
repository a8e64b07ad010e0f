"""What a benchmark ran on, without names: processor, cores, memory, class of the disk, kernel."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any, Final

import psutil

_CPU_INFO: Final = Path("/proc/cpuinfo")
_BLOCK_DEVICES: Final = Path("/sys/dev/block")
_VIRTUAL: Final = "virtio block device"
_DISK_KINDS: Final = {"nvme": "NVMe", "vd": _VIRTUAL, "sd": "SCSI or SATA", "mmcblk": "SD or eMMC"}


def describe_machine(path: Path) -> dict[str, Any]:
    """Figures of the machine, and of the disk that `path` lies on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "disk": _disk(path),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def _processor() -> str:
    try:
        for line in _CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _disk(path: Path) -> str:
    number = path.stat().st_dev
    place = _BLOCK_DEVICES / f"{os.major(number)}:{os.minor(number)}"
    if not place.exists():
        return "unknown"
    device = place.resolve()
    if (device / "partition").exists():
        device = device.parent
    kind = next((text for start, text in _DISK_KINDS.items() if device.name.startswith(start)), "block device")
    if kind == _VIRTUAL:  # its flag says nothing of the device behind it
        return kind
    try:
        turns = (device / "queue" / "rotational").read_text().strip() == "1"
    except OSError:
        return kind
    return f"{kind}, {'rotational' if turns else 'not rotational'}"
