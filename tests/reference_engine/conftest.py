"""Small synthetic models for the engine's tests."""

import pytest

from flashfmt.encodings import Encoding
from reference_engine.synthetic import Shape, write_synthetic

TINY_PLAIN = Shape("tiny-plain", 3, 64, 448, 4, 4, 97, plain=True, tied=True, context_tokens=512)
TINY_GATED = Shape("tiny-gated", 2, 128, 320, 8, 2, 97, plain=False, tied=False, context_tokens=512)


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
