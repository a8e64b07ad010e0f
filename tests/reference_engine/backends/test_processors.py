"""The kernels on processors with fewer instructions than this one, and the loading of backends."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import reference_engine
from reference_engine.backends import load_backend
from reference_engine.backends.numba_runtime import are_kernels_cached, kernel_directory
from reference_engine.machine import usable_cores

ROOT = str(Path(next(iter(reference_engine.__path__))).parent)

COMPARE = """
import numba
import numpy as np
from flashfmt.encodings import Encoding, decode, encode, part_layout
from flashfmt.manifest import Activation
from reference_engine.backends import FfnShape, Matrix
from reference_engine.backends.numba_backend import NumbaBackend
from reference_engine.backends.numba_token import store_halves
from reference_engine.backends.numba_vectors import HAS_BYTE_DOTS, HAS_HALF, HAS_WIDE_REGISTERS
from reference_engine.backends.numpy_backend import NumpyBackend

assert not (HAS_BYTE_DOTS or HAS_HALF or HAS_WIDE_REGISTERS)
rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
for encoding, n_tokens in ((Encoding.F16, 1), (Encoding.Q8, 1), (Encoding.Q4, 1), (Encoding.F16, 9)):
    matrix = Matrix(encoding, 21, 448, encode(normal(21, 448), encoding))
    x = normal(n_tokens, 448)
    a, b = (backend.matmul(matrix, x) for backend in (NumbaBackend(1), NumpyBackend()))
    assert np.abs(a - b).max() <= 5e-6 * np.abs(b).max(), (encoding, n_tokens)
half = np.arange(65536, dtype=np.uint16).view(np.float16)
half = half[np.isfinite(half)]
matrix = Matrix(Encoding.F16, len(half), 1, half[:, None])
out = NumbaBackend(1).matmul(matrix, np.ones((1, 1), np.float32))
assert np.array_equal(out[0], half.astype(np.float32))
@numba.njit
def halved(values, n, out):
    store_halves(np.float32(0), values, n, out)

exact = half.astype(np.float32)
values = np.concatenate([exact, exact * np.float32(1.0002), (exact + np.roll(exact, 1)) / 2, exact * 100])
out = np.empty(len(values), np.float16)
halved(values.ctypes.data, len(values), out.ctypes.data)
with np.errstate(over="ignore"):
    assert np.array_equal(out.view(np.uint16), values.astype(np.float16).view(np.uint16))
act = Activation(kind="relu")
for encoding in (Encoding.Q8, Encoding.Q4):
    part = part_layout(encoding, 192)
    rows = encode(normal(70, 2, 192), encoding).reshape(70, 2 * part.nbytes).view(np.uint8)
    shape = FfnShape(encoding, ("up", "down"), 192, part, 2 * part.nbytes, act, act)
    x, a, b = normal(1, 192), np.zeros((1, 192), np.float32), np.zeros((1, 192), np.float32)
    NumbaBackend(1).ffn(shape, rows, None, x, a)
    NumpyBackend().ffn(shape, rows, None, x, b)
    assert np.abs(a - b).max() <= 5e-6 * np.abs(b).max()
"""


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": ROOT} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.skipif(sys.platform == "darwin", reason="every processor of that platform converts float16")
def test_a_processor_without_extensions():
    result = run_python("-c", COMPARE, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")
    assert result.returncode == 0, result.stderr


def test_loading(tmp_path):
    assert load_backend("numpy").name == "numpy"
    assert load_backend("auto").name == "numba"
    assert load_backend("numba", 1).n_threads == 1
    assert load_backend("numba").n_threads <= usable_cores()
    assert are_kernels_cached()
    with pytest.raises(ValueError, match="thread"):
        load_backend("numba", 0)
    with pytest.raises(ValueError, match="unknown"):
        load_backend("fast")  # type: ignore[arg-type]


SHOW_DIRECTORY = "from reference_engine.backends.numba_runtime import kernel_directory as d; print(d())"


def test_the_cache_directory_follows_the_platform(tmp_path):
    shown = run_python("-c", SHOW_DIRECTORY, NUMBA_CACHE_DIR=str(tmp_path))
    assert Path(shown.stdout.strip()) == tmp_path / "flashfmt" / kernel_directory().name
    if sys.platform not in ("darwin", "win32"):
        shown = run_python("-c", SHOW_DIRECTORY, NUMBA_CACHE_DIR="", XDG_CACHE_HOME=str(tmp_path))
        assert Path(shown.stdout.strip()) == tmp_path / "flashfmt" / kernel_directory().name


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="permissions are those of POSIX")
def test_a_cache_that_others_may_write_is_not_used(tmp_path):
    planted = tmp_path / "flashfmt" / kernel_directory().name
    planted.mkdir(parents=True)
    planted.chmod(0o777)
    file = tmp_path / "file"
    file.touch()
    places = {"NUMBA_CACHE_DIR": str(tmp_path), "XDG_CACHE_HOME": str(file), "TMPDIR": str(tmp_path)}
    shown = run_python("-c", SHOW_DIRECTORY, **places)
    assert shown.returncode == 0, shown.stderr
    directory = Path(shown.stdout.strip())
    assert directory != planted
    assert directory.parents[2] == tmp_path
    assert directory.parents[1].stat().st_mode & 0o777 == 0o700


def test_kernels_that_nobody_loads_any_more_are_removed(tmp_path):
    old, used = (tmp_path / "flashfmt" / f"kernels-{name}" for name in ("old", "used"))
    for directory in (old, used):
        directory.mkdir(parents=True)
        (directory / "kernel.nbc").touch()
    a_year_ago = time.time() - 365 * 86400
    os.utime(old, (a_year_ago, a_year_ago))
    code = "from reference_engine.backends.numba_runtime import note_kernels_cached as n; n()"
    assert run_python("-c", code, NUMBA_CACHE_DIR=str(tmp_path)).returncode == 0
    assert not old.exists()
    assert used.exists()
    assert are_kernels_cached()


def test_importing_the_package_does_not_import_numba():
    code = "import sys, reference_engine.backends; sys.exit('numba' in sys.modules)"
    assert run_python("-c", code).returncode == 0


def test_numbas_own_settings_are_left_alone():
    import numba

    before = numba.config.CACHE_DIR
    load_backend("numba")
    assert before == numba.config.CACHE_DIR
