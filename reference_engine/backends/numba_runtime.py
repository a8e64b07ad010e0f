"""Where compiled kernels are kept, and which threads run them.

Kernels live in a per-user cache directory of their own for each combination of interpreter, numba, processor and
kernel source, so that a stale or foreign kernel is never loaded. A file in it says that all kernels are there.

numba's threads: OpenMP where its library can be loaded (a parallel region costs about 2 us), else numba's own queue
(80 us, and only one thread may call). Either way a process must not fork after its first parallel region: start
children with `subprocess` or multiprocessing's ``spawn``.

Knows: directories and thread layers. Does not know: kernels.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba

config: Any = numba.config  # its settings are made at run time

_COMPLETE = "complete"
_DAYS_KEPT = 30
_SPIN_COUNT = "5000"


@cache
def kernel_directory() -> Path:
    """Directory for this process's kernels, created: ``flashfmt/kernels-*`` below a base directory.

    The base is `NUMBA_CACHE_DIR` or the user's cache directory; where neither can be written, a new temporary
    directory, which serves this process and its children.
    """
    below = Path("flashfmt") / f"kernels-{_fingerprint()}"
    for base in _cache_bases():
        if _is_private_and_writable(base / below):
            return base / below
    directory = Path(tempfile.mkdtemp(prefix="flashfmt-")) / below
    directory.mkdir(parents=True)
    return directory


def are_kernels_cached() -> bool:
    """Whether all kernels are in `kernel_directory`; marks it as in use."""
    directory = kernel_directory()
    os.utime(directory)
    return (directory / _COMPLETE).is_file()


def note_kernels_cached() -> None:
    """Record that all kernels are in `kernel_directory`, and remove those that nobody has loaded for a month."""
    directory = kernel_directory()
    (directory / _COMPLETE).touch()
    oldest = time.time() - _DAYS_KEPT * 86400
    for other in directory.parent.glob("kernels-*"):
        with suppress(OSError):  # another process removes it as well
            if other != directory and other.stat().st_mtime < oldest:
                shutil.rmtree(other)


@contextmanager
def kernels_kept() -> Iterator[None]:
    """Functions that numba wraps inside are cached in `kernel_directory`; those of others stay where they were."""
    before = config.CACHE_DIR
    config.CACHE_DIR = str(kernel_directory())
    try:
        yield
    finally:
        config.CACHE_DIR = before


def choose_threading_layer() -> None:
    """Have numba use OpenMP if it can be loaded, else its own queue; `NUMBA_THREADING_LAYER` has precedence.

    GNU's OpenMP threads spin for milliseconds before they sleep. Where other threads want the cores, those that read
    from flash among them, that makes calls several times slower; a fraction of a millisecond still bridges the gap
    between two calls. So `GOMP_SPINCOUNT` is set for this process, unless the environment already says how to wait.
    Without effect once numba's threads have started.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPIN_COUNT
    if config.THREADING_LAYER != "default":
        return
    try:
        importlib.import_module("numba.np.ufunc.omppool")
    except ImportError:
        config.THREADING_LAYER = "workqueue"
    else:
        config.THREADING_LAYER = "omp"


def _fingerprint() -> str:
    """Digest of everything that compiled code, or numba's finding it again, depends on."""
    digest = hashlib.sha256()
    versions = (sys.version, numba.__version__, llvmlite.__version__, llvm.get_process_triple())
    features = llvm.get_host_cpu_features().flatten()
    target = (str(config.CPU_NAME), str(config.CPU_FEATURES))
    for text in (*versions, llvm.get_host_cpu_name(), features, *target):
        digest.update(text.encode() + b"\0")
    here = Path(__file__).parent
    for source in sorted((*here.glob("*.py"), *here.parent.glob("flash_io/numba_*.py"))):
        digest.update(f"{source}\0{source.stat().st_mtime_ns}\0".encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _cache_bases() -> Iterator[Path]:
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        yield Path(chosen)
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if Path(xdg).is_absolute():
        yield Path(xdg)
    elif sys.platform == "darwin":
        yield Path(os.path.expanduser("~/Library/Caches"))
    elif sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        yield Path(os.environ["LOCALAPPDATA"])
    else:
        yield Path(os.path.expanduser("~/.cache"))


def _is_private_and_writable(directory: Path) -> bool:
    """Create a directory if need be; whether it is ours, closed to writers other than us, and takes files.

    Cached kernels are code: nobody else may be able to plant them.
    """
    try:
        if not directory.is_absolute():
            return False
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
        if not stat.S_ISDIR(status.st_mode):
            return False
        if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
            return False
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False
