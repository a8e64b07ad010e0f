"""One hostile input, examined within limits of processor time and memory, and the files that findings become.

Knows: the operating system's limits, reproducer files. Does not know: where inputs come from.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import resource
import shutil
import signal
import traceback
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from entries import KEY, unpack
from oracle import Finding, examine

MAX_CPU_SECONDS = 2.0
BASE_MEMORY_BYTES = 32 << 20
MEMORY_PER_INPUT_BYTE = 8
MAX_ADDRESS_BYTES = 1 << 30
_STATUS = Path("/proc/self/status")
_RESET_PEAK = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Report:
    """A finding on its way to a person."""

    signature: str
    message: str
    details: str
    raw: bytes

    def write(self, folder: Path) -> Path:
        """Store the input and the evidence, named after the signature; the first of a signature stays."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"finding-{hashlib.sha256(self.signature.encode()).hexdigest()[:10]}.flash"
        if not path.exists():
            path.write_bytes(self.raw)
            path.with_suffix(".txt").write_text(f"{self.message}\n\n{self.details}", "utf-8", "backslashreplace")
        return path


class Probe:
    """Examines inputs one after the other in a scratch folder, best one in memory.

    Limits the address space of this process for good; run it in a process of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        signal.signal(signal.SIGPROF, _too_slow)
        address_space = _kib("VmSize") * 1024 + MAX_ADDRESS_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (address_space, resource.RLIM_INFINITY))

    def outcomes(self, raw: bytes, *, as_directory: bool = False) -> set[str] | Report:
        """What `examine` says of the bytes of a `.flash` file, or of the directory with the same keys."""
        path = self.folder / "input.flash"
        if as_directory:
            path = self.folder / "input"
            write_directory(raw, path, random.Random(zlib.crc32(raw)))
        else:
            path.write_bytes(raw)
        return self.outcomes_of(path, raw)

    def outcomes_of(self, path: Path, raw: bytes) -> set[str] | Report:
        """What `examine` says of a path; `raw` is what is kept if that is a finding."""
        try:
            with _measured(len(raw)):
                return examine(path)
        except Finding as finding:
            message = f"{finding} (as a directory: replay with --directory)" if path.is_dir() else str(finding)
            return Report(finding.signature, message, traceback.format_exc(), raw)


def write_directory(raw: bytes, path: Path, rng: random.Random) -> None:
    """Write the keys of a file as a model directory, and sometimes what must not be in one.

    Entries that are no keys, or collide, are left out.
    """
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for entry in unpack(raw):
        if KEY.fullmatch(entry.key) and len(entry.key) < 1024:
            with contextlib.suppress(OSError):
                (path / entry.key).parent.mkdir(parents=True, exist_ok=True)
                (path / entry.key).write_bytes(entry.payload)
    if rng.random() < 0.2:
        _add_intruder(path, rng)


def _add_intruder(path: Path, rng: random.Random) -> None:
    """Add or change one thing that only a directory can have; whether that works does not matter."""
    folder = rng.choice([path, *(child for child in sorted(path.rglob("*")) if child.is_dir())])
    victim = rng.choice(sorted(path.rglob("*")) or [path / "x"])
    with contextlib.suppress(OSError):
        match rng.randrange(6):
            case 0:
                (folder / "link").symlink_to(rng.choice(("/etc/passwd", ".", "nowhere", "link", "..")))
            case 1:
                (folder / "empty").mkdir()
            case 2:
                os.mkfifo(folder / "fifo")
            case 3:
                (folder / os.fsdecode(rng.choice((b"A", b"\xff\xfe", b".hidden", b"a b", b"\x1b[2J", b"-x")))).touch()
            case 4:
                target = victim.rename(victim.with_name("moved"))
                victim.symlink_to(target.name)
            case _:
                victim.unlink()
                victim.mkdir()


@contextlib.contextmanager
def _measured(n_input: int) -> Iterator[None]:
    """Finding where the body takes too much processor time or memory. Memory is measured on Linux only."""
    measurable = _STATUS.exists()
    if measurable:
        _RESET_PEAK.write_text("5")
        before = _kib("VmHWM")
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    grown = (_kib("VmHWM") - before) * 1024 if measurable else 0
    if grown > BASE_MEMORY_BYTES + MEMORY_PER_INPUT_BYTE * n_input:
        raise Finding(f"{grown >> 20} MiB of memory for an input of {n_input} bytes", "memory")


def _kib(field: str) -> int:
    if not _STATUS.exists():
        return 1 << 20
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1])


def _too_slow(_number: int, frame: FrameType | None) -> None:
    place = f"{frame.f_code.co_filename}:{frame.f_code.co_name}" if frame else "unknown"
    raise Finding(f"more than {MAX_CPU_SECONDS} s of processor time, in {place}", f"slow {Path(place).name}")
