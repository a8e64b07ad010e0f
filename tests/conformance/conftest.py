"""Fixtures of the suite's tests: the runner and our reader as modules, without a process for each case."""

import importlib.util
import sys
from pathlib import Path

import pytest

CONFORMANCE = Path(__file__).parents[2] / "conformance"


def _load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def runner():
    return _load("conformance_run", CONFORMANCE / "run.py")


@pytest.fixture(scope="session")
def our_reader():
    return _load("conformance_flashfmt_reader", CONFORMANCE / "readers" / "flashfmt_reader.py")
