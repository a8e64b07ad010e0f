"""How a storage device likes to be read: measured once by ``flashfmt doctor``, kept in the user's cache directory.

Knows which device a file lies on and where its profile is kept. Does not know how it is measured or chosen.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import msgspec

from reference_engine.flash_io.range_reader import IoTuning

FORMAT_VERSION: Final = 1
DEFAULT_BACKENDS: Final = ("uring", "aio", "pread")
_SYS_BLOCK: Final = Path("/sys/dev/block")
_IDENTITY_FILES: Final = ("wwid", "device/wwid", "serial", "device/serial", "device/model", "size")


@dataclass(frozen=True, slots=True)
class Measurement:
    """Speed of one way to read: bytes a second, and processor seconds per GiB."""

    backend: str
    pattern: Literal["random", "sequential"]
    block_bytes: int
    depth: int
    bytes_per_second: float
    cpu_seconds_per_gib: float


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What to read a device with, and why; the default is right in order of magnitude on any flash drive."""

    backend: str = DEFAULT_BACKENDS[0]
    tuning: IoTuning = field(default_factory=IoTuning)
    is_measured: bool = False
    reasons: tuple[str, ...] = ("not measured: defaults",)
    measurements: tuple[Measurement, ...] = field(default=(), repr=False)
    version: int = FORMAT_VERSION


def load_profile(path: Path) -> DeviceProfile:
    """Profile of the device that `path`, or the nearest directory above it, lies on; the default where there is none.

    A profile that cannot be read, or is of another version, counts as none: measuring again replaces it.
    """
    try:
        profile = msgspec.json.decode(profile_path(path).read_bytes(), type=DeviceProfile)
    except (OSError, msgspec.DecodeError):
        return DeviceProfile()
    tuning = profile.tuning
    is_usable = (
        profile.version == FORMAT_VERSION
        and profile.backend in DEFAULT_BACKENDS
        and 0 <= tuning.gap_bytes < tuning.max_request_bytes
        and tuning.depth >= 1
        and not (tuning.gap_bytes | tuning.max_request_bytes) % 4096
    )
    return profile if is_usable else DeviceProfile()


def save_profile(path: Path, profile: DeviceProfile) -> Path:
    """Keep `profile` for the device that `path` lies on; returns the file it is in.

    Raises
    ------
    OSError
        If the cache directory cannot be written to.
    """
    target = profile_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1))
    partial.replace(target)
    return target


def profile_path(path: Path) -> Path:
    """Where the profile of the device that `path` lies on is kept."""
    return cache_directory() / "flashfmt" / "devices" / f"{device_name(path)}.json"


def device_name(path: Path) -> str:
    """Name of the device that `path`, or the nearest existing directory above it, lies on, in this machine.

    From the drive's own identification where the system tells it, else from the device's number.
    """
    number = _device_number(path)
    device = _block_device(number)
    parts = [f"{os.major(number)}-{os.minor(number)}"] if device is None else [device.name, *_identity(device)]
    return re.sub(r"[^A-Za-z0-9.-]+", "_", "-".join((platform.node(), *parts)))[:200]


def request_limit(path: Path) -> int | None:
    """Requests that the system takes at a time for the device that `path` lies on; None where it does not tell.

    Who makes more stands still in the system call that should begin them.
    """
    device = _block_device(_device_number(path))
    try:
        return None if device is None else int((device / "queue/nr_requests").read_text())
    except (OSError, ValueError):
        return None


def _device_number(path: Path) -> int:
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place.stat().st_dev


def _block_device(number: int) -> Path | None:
    """The system's directory on the whole drive with this device number."""
    block = _SYS_BLOCK / f"{os.major(number)}:{os.minor(number)}"
    if not block.exists():
        return None
    device = block.resolve()
    return device.parent if (device / "partition").exists() else device


def _identity(device: Path) -> list[str]:
    texts = []
    for name in _IDENTITY_FILES:
        try:
            texts.append((device / name).read_text().strip())
        except OSError:  # a device that does not tell
            continue
    return [text for text in texts if text]


def cache_directory() -> Path:
    """Where this user's caches are."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(configured):
        return Path(configured)
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
