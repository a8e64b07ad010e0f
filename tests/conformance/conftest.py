"""Fixtures of the suite's tests: the runner and our reader as modules, without a process for each case."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFORMANCE = Path(__file__).parents[2] / "conformance"
JS_FOLDER = CONFORMANCE / "readers" / "js"
_INSTALL_SECONDS = 60


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


@pytest.fixture(scope="session")
def js_reader(tmp_path_factory):
    """The script in a folder with its packages: the checkout's where installed, else a copy that npm fills."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None:
        pytest.skip("node is not installed")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    if int(re.match(r"v(\d+)", version).group(1)) < 20:
        pytest.skip(f"node {version.strip()} is older than 20")
    if (JS_FOLDER / "node_modules" / "zarrita").is_dir():
        return JS_FOLDER / "flash_reader.mjs"
    if npm is None:
        pytest.skip("npm is not installed")
    target = tmp_path_factory.mktemp("js")
    for name in ("flash_reader.mjs", "package.json", "package-lock.json"):
        shutil.copy(JS_FOLDER / name, target)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=20000"]
    try:
        done = subprocess.run(
            command, cwd=target, capture_output=True, text=True, check=False, timeout=_INSTALL_SECONDS
        )
    except subprocess.TimeoutExpired:
        pytest.skip("npm did not install zarrita in time: no package registry?")
    if done.returncode != 0:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
        pytest.skip(f"npm cannot install zarrita: {reason}")
    return target / "flash_reader.mjs"
