"""Runs one program in a memory cgroup of its own and says what it took: ``python -m comparison.limited_run SPEC``.

SPEC is JSON: `command`, `limit` (bytes or null), `files` (dropped from the page cache before the start), `timeout`
(seconds). Writes a JSON object: what the program reported (see `token_clock`), or `failure`, and beside it

first_token_seconds    from the start of the process
peak_cgroup_bytes      most that the cgroup was charged, page cache included; null without a cgroup
peak_process_bytes     most that the process had mapped and in memory, file pages included
device_read_bytes      read from the device in all
limited_by             ``cgroup v1``, ``cgroup v2``, ``nothing``, or why there is no cgroup
load_average           before the start
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from comparison.token_clock import report

_ROOT: Final = Path("/sys/fs/cgroup")
_INTO_GROUP: Final = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A memory cgroup; `folder` is None where none can be made."""

    folder: Path | None
    kind: str

    def inside(self, command: list[str]) -> list[str]:
        """A command that runs `command` in the group."""
        return command if self.folder is None else ["sh", "-c", _INTO_GROUP, str(self.folder), *command]

    def figure(self, *names: str) -> int | None:
        """The number in the first of these files of the group that exists."""
        for name in names:
            with suppress(OSError, ValueError, TypeError):
                return int((self.folder / name).read_text())  # type: ignore[operator]
        return None

    @property
    def n_killed(self) -> int:
        """Processes that the kernel killed for want of memory."""
        for name in ("memory.events", "memory.oom_control"):
            with suppress(OSError, TypeError):
                for line in (self.folder / name).read_text().splitlines():  # type: ignore[operator]
                    key, _, value = line.partition(" ")
                    if key == "oom_kill":
                        return int(value)
        return 0


@contextmanager
def memory_group(limit: int | None) -> Iterator[MemoryGroup]:
    """A memory cgroup for the time of the block, version 1 or 2, with no room in swap where that can be said."""
    is_v1 = (_ROOT / "memory").is_dir()
    folder = (_ROOT / "memory" if is_v1 else _ROOT) / f"flashfmt-compare-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        yield MemoryGroup(None, f"no memory cgroup can be made here: {error.strerror}")
        return
    try:
        if limit is not None:
            (folder / ("memory.limit_in_bytes" if is_v1 else "memory.max")).write_text(str(limit))
            with suppress(OSError):
                swap, room = ("memory.memsw.limit_in_bytes", limit) if is_v1 else ("memory.swap.max", 0)
                (folder / swap).write_text(str(room))
        yield MemoryGroup(folder, "cgroup v1" if is_v1 else "cgroup v2")
    except OSError as error:
        yield MemoryGroup(None, f"no memory cgroup can be limited here: {error.strerror}")
    finally:
        for _ in range(50):
            with suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.1)


def drop_cached(files: list[str]) -> None:
    """Make the page cache forget files, so that a run reads them anew and pays for what it keeps."""
    for name in files:
        fd = os.open(name, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def run(command: list[str], *, limit: int | None, files: list[str], timeout: float) -> dict[str, Any]:
    """Run a program; see the module."""
    drop_cached(files)
    load = os.getloadavg()[0]
    with memory_group(limit) as group, tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        started = time.time()
        process = subprocess.Popen(group.inside(command), stdout=output, stderr=errors, start_new_session=True)
        timer = threading.Timer(timeout, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # this program is to end: leave nothing running
            os.killpg(process.pid, signal.SIGKILL)
            os.wait4(process.pid, 0)
            raise
        finally:
            timed_out = not timer.is_alive()
            timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        lines, complaint = output.read().splitlines(), errors.read().strip()
        n_killed = group.n_killed
        peak = group.figure("memory.max_usage_in_bytes", "memory.peak")
    result: dict[str, Any] = {
        "peak_cgroup_bytes": peak,
        "peak_process_bytes": usage.ru_maxrss * 1024,
        "device_read_bytes": usage.ru_inblock * 512,
        "limited_by": "nothing" if limit is None else group.kind,
        "load_average": load,
    }
    if process.returncode != 0 or not lines:
        result["failure"] = _failure(process.returncode, complaint, timeout if timed_out else None, n_killed)
        return result
    figures = json.loads(lines[-1])
    return {**result, **figures, "first_token_seconds": figures.pop("first_token_at") - started}


def _failure(code: int, complaint: str, timeout: float | None, n_killed: int) -> str:
    if n_killed:
        return "killed by the kernel for want of memory"
    if timeout is not None:
        return f"no result after {timeout:.0f} s"
    last = complaint.splitlines()[-1] if complaint else "no message"
    return f"exit code {code}: {last}"


def main() -> int:
    """Run what the argument says."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    spec = json.loads(sys.argv[1])
    report(run(spec["command"], limit=spec["limit"], files=spec["files"], timeout=spec["timeout"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
