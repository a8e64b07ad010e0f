"""A small synthetic model in three encodings, with bundles that can be read in halves on any device."""

import pytest

from flashfmt.encodings import Encoding
from reference_engine.bench.synthetic_files import SyntheticFiles
from reference_engine.synthetic import SHAPES, Shape

SMALL = Shape("small-opt", 2, 2048, 640, 16, 16, 97, plain=True, tied=True, context_tokens=256)


def quiet(*_):
    """Takes progress and messages."""


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Folder that synthetic models are kept in."""
    return tmp_path_factory.mktemp("bench-cache")


@pytest.fixture(scope="session")
def small_files(cache):
    """The small model's files."""
    return SyntheticFiles(SMALL, cache, residents=Encoding.F16, keep=True, say=quiet, report=quiet)


@pytest.fixture
def small_shape(monkeypatch):
    """Lets the command know the small model's shape."""
    monkeypatch.setitem(SHAPES, SMALL.name, SMALL)
    return SMALL
