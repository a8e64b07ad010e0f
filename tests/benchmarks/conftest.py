"""The package of the comparison, which lies beside the scripts."""

import sys
from pathlib import Path

import pytest


@pytest.fixture
def comparison(monkeypatch):
    """Makes ``comparison`` importable."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "comparison"]:
        del sys.modules[name]
