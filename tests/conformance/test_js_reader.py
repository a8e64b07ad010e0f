"""The reader on zarrita answers what the suite expects of it; skipped where Node or its packages cannot be had."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFORMANCE = Path(__file__).parents[2] / "conformance"
FOLDER = CONFORMANCE / "readers" / "js"
INSTALL_SECONDS = 60


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The script in a folder with its packages: the checkout's where installed, else a copy that npm fills."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None:
        pytest.skip("node is not installed")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    if int(re.match(r"v(\d+)", version).group(1)) < 20:
        pytest.skip(f"node {version.strip()} is older than 20")
    if (FOLDER / "node_modules" / "zarrita").is_dir():
        return FOLDER / "flash_reader.mjs"
    if npm is None:
        pytest.skip("npm is not installed")
    target = tmp_path_factory.mktemp("js")
    for name in ("flash_reader.mjs", "package.json", "package-lock.json"):
        shutil.copy(FOLDER / name, target)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=20000"]
    try:
        done = subprocess.run(command, cwd=target, capture_output=True, text=True, check=False, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip("npm did not install zarrita in time: no package registry?")
    if done.returncode != 0:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
        pytest.skip(f"npm cannot install zarrita: {reason}")
    return target / "flash_reader.mjs"


@pytest.fixture(scope="module")
def results(reader):
    command = [sys.executable, CONFORMANCE / "run.py", "--json", "--", "node", reader]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)["results"]


def test_passes_what_it_claims(results):
    assert [result for result in results if result["outcome"] == "failed"] == []


def test_reads_every_valid_model(results):
    passed = {result["id"] for result in results if result["outcome"] == "passed"}
    index = json.loads((CONFORMANCE / "cases.json").read_text(encoding="ascii"))["cases"]
    claimed = {case["id"] for case in index if case["level"] in ("structure", "values") and "rules" not in case}
    assert claimed
    assert claimed <= passed


@pytest.mark.parametrize("rule", ["FF-IDX-2", "FF-IDX-3", "FF-JSON-1", "FF-JSON-6", "FF-SUM-1", "FF-VER-1", "FF-VER-2"])
def test_refuses_what_it_claims_to_refuse(results, rule):
    index = json.loads((CONFORMANCE / "cases.json").read_text(encoding="ascii"))["cases"]
    cases = {case["id"] for case in index if case["level"] == "structure" and case.get("rules") == [rule]}
    assert cases
    assert cases <= {result["id"] for result in results if result["outcome"] == "passed"}


def test_a_changed_document_is_refused(reader, tmp_path):
    sound = (CONFORMANCE / "valid" / "minimal.flash").read_bytes()
    path = tmp_path / "changed.flash"
    path.write_bytes(sound.replace(b'"name":"minimal"', b'"name":"maximal"'))
    request = json.dumps({"level": "structure", "path": os.fspath(path), "bundles": []})
    done = subprocess.run(["node", reader], input=request, capture_output=True, text=True, check=False)
    assert (done.returncode, json.loads(done.stdout)) == (65, {"rule": "FF-SUM-1"})


def test_the_lock_names_no_registry():
    text = (FOLDER / "package-lock.json").read_text(encoding="utf-8")
    assert "http" not in text
    assert json.loads(text)["packages"]["node_modules/zarrita"]["version"] == "0.7.5"
