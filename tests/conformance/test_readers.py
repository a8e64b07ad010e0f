"""The readers on zarr-python and on zarrita answer what the suite expects of them, at the levels they claim."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFORMANCE = Path(__file__).parents[2] / "conformance"
REFUSED = {
    "zarr": ("FF-IDX-2", "FF-IDX-3", "FF-JSON-3", "FF-JSON-6", "FF-SUM-1", "FF-SUM-2", "FF-VER-1", "FF-VER-2"),
    "js": ("FF-IDX-2", "FF-IDX-3", "FF-JSON-1", "FF-JSON-6", "FF-SUM-1", "FF-VER-1", "FF-VER-2"),
}


@pytest.fixture(scope="module", params=sorted(REFUSED))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def command(name, request):
    if name == "zarr":
        return [sys.executable, CONFORMANCE / "readers" / "zarr_reader.py"]
    return ["node", request.getfixturevalue("js_reader")]


@pytest.fixture(scope="module")
def results(command):
    run = [sys.executable, CONFORMANCE / "run.py", "--json", "--", *command]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)["results"]


@pytest.fixture(scope="module")
def passed(results):
    return {result["id"] for result in results if result["outcome"] == "passed"}


@pytest.fixture(scope="module")
def cases():
    return json.loads((CONFORMANCE / "cases.json").read_text(encoding="ascii"))["cases"]


def test_passes_what_it_claims(results):
    assert [result for result in results if result["outcome"] == "failed"] == []


def test_reads_every_valid_model(passed, cases):
    claimed = {case["id"] for case in cases if case["level"] in ("structure", "values") and "rules" not in case}
    assert claimed
    assert claimed <= passed


def test_refuses_what_it_claims_to_refuse(name, passed, cases):
    for rule in REFUSED[name]:
        broken = {case["id"] for case in cases if case["level"] == "structure" and case.get("rules") == [rule]}
        assert broken
        assert broken <= passed


def test_a_changed_document_is_refused(command, tmp_path):
    sound = (CONFORMANCE / "valid" / "minimal.flash").read_bytes()
    path = tmp_path / "changed.flash"
    path.write_bytes(sound.replace(b'"name":"minimal"', b'"name":"maximal"'))
    request = json.dumps({"level": "structure", "path": os.fspath(path), "bundles": []})
    done = subprocess.run(command, input=request, capture_output=True, text=True, check=False)
    assert (done.returncode, json.loads(done.stdout)) == (65, {"rule": "FF-SUM-1"})
