"""Small synthetic models, converted tiny checkpoints and texts for the engine's tests."""

import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from flashfmt.convert import convert
from flashfmt.encodings import Encoding
from reference_engine.synthetic import Shape, write_synthetic

TINY_PLAIN = Shape("tiny-plain", 3, 64, 448, 4, 4, 97, plain=True, tied=True, context_tokens=512)
TINY_GATED = Shape("tiny-gated", 2, 128, 320, 8, 2, 97, plain=False, tied=False, context_tokens=512)
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "boxing", "wizards", "make", "eight"]
WORDS += ["words", "a", "sentence", "they", "do", "not"]


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory):
    """A function that writes a synthetic model once and gives its path."""
    folder = tmp_path_factory.mktemp("synthetic")

    def make(kind="plain", encoding="f16", residents="f16", container="file"):
        suffix = ".flash" if container == "file" else ""
        path = folder / f"{kind}-{encoding}-{residents}{suffix}"
        if not path.exists():
            shape = TINY_PLAIN if kind == "plain" else TINY_GATED
            write_synthetic(path, shape, encoding=Encoding(encoding), residents=Encoding(residents))
        return path

    return make


@pytest.fixture(scope="session")
def tiny_flash(tiny_checkpoint, tmp_path_factory):
    """A function (variant, encoding="f32") -> path of the tiny checkpoint as a flash file."""
    folder = tmp_path_factory.mktemp("flash")

    def make(variant, encoding="f32"):
        path = folder / f"{variant}-{encoding}.flash"
        if not path.exists():
            convert(tiny_checkpoint(variant)[0], path, encoding=encoding, residents=encoding)
        return path

    return make


@pytest.fixture(scope="session")
def write_text(tmp_path_factory):
    """A function (seed, n_words, name="text.txt", start="") -> path of a text of random words."""

    def write(seed, n_words, name="text.txt", start=""):
        path = tmp_path_factory.mktemp("text") / name
        path.write_text(start + " ".join(np.random.default_rng(seed).choice(WORDS, n_words)))
        return path

    return write


@contextmanager
def limited_memory(limit):
    """A command prefix that runs a program in a memory cgroup of its own, with swap counted where it can be."""
    root = Path("/sys/fs/cgroup")
    v1 = (root / "memory").is_dir()
    group = (root / "memory" if v1 else root) / f"flashfmt-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(limit))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        yield ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh"], group
    finally:
        group.rmdir()


@pytest.fixture
def memory_cgroup():
    """A context manager (limit) -> (command prefix, the cgroup); skips the test where no memory cgroup can be made."""
    return limited_memory
