"""Compiling the kernels ahead of use, in a process of its own: ``python -m reference_engine.backends.warm_up``.

A compiler takes hundreds of megabytes that the process which runs the model must not hold; kernels read from the
disk cache take little.

Loading them takes the compiler's library all the same, some 65 MiB of it; running them does not.

Knows: how to start the child, and the library. Does not know: kernels.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

from reference_engine.machine import release_library

_TIMEOUT_SECONDS = 900
_COMPILER_LIBRARY = "libllvmlite"
_READING = "reference_engine.flash_io.numba_queue"  # compiles its functions, or loads them, when it is imported


def warm_up() -> bool:
    """Have a child process compile all kernels unless they are in the disk cache; load flash reading's functions.

    These are loaded here so that a memory plan, which is made next, finds them in the process.

    Returns
    -------
    Whether they are in the cache now. If not (the child failed, or processes cannot be started), numba compiles each
    kernel in this process when it is first called.
    """
    from reference_engine.backends.numba_runtime import are_kernels_cached

    are_cached = are_kernels_cached() or _compile_in_child()
    importlib.import_module(_READING)
    return are_cached


def release_compiler() -> None:
    """Let go of the compiler's library, once the kernels are loaded. It is read again if it is needed after all."""
    release_library(_COMPILER_LIBRARY)


def _compile_in_child() -> bool:
    """Whether it succeeded."""
    from reference_engine.backends.numba_runtime import are_kernels_cached, kernel_directory

    root = str(Path(__file__).parents[2])
    inherited = os.environ.get("PYTHONPATH")
    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(kernel_directory().parents[1]),
        "PYTHONPATH": os.pathsep.join([root, inherited] if inherited else [root]),
    }
    command = [sys.executable, "-m", "reference_engine.backends.warm_up"]
    try:
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=_TIMEOUT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return False
    return are_kernels_cached()


def main() -> None:
    """Compile all kernels in this process, flash reading's too, and record that they are cached."""
    from reference_engine.backends.numba_backend import compile_kernels
    from reference_engine.backends.numba_runtime import note_kernels_cached

    compile_kernels()
    importlib.import_module(_READING)
    note_kernels_cached()


if __name__ == "__main__":
    main()
