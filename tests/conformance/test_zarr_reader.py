"""The reader on zarr-python answers what the suite expects of it, at the levels it claims."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CONFORMANCE = Path(__file__).parents[2] / "conformance"
READER = CONFORMANCE / "readers" / "zarr_reader.py"
MINIMAL = CONFORMANCE / "valid" / "minimal.flash"


def ask(request):
    """Exit status and answer of the reader."""
    done = subprocess.run(
        [sys.executable, READER], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr


@pytest.fixture(scope="module")
def results():
    command = [sys.executable, CONFORMANCE / "run.py", "--json", "--", sys.executable, READER]
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


@pytest.mark.parametrize(
    "rule", ["FF-IDX-2", "FF-IDX-3", "FF-JSON-3", "FF-JSON-6", "FF-SUM-1", "FF-SUM-2", "FF-VER-1", "FF-VER-2"]
)
def test_refuses_what_it_claims_to_refuse(results, rule):
    index = json.loads((CONFORMANCE / "cases.json").read_text(encoding="ascii"))["cases"]
    cases = {case["id"] for case in index if case["level"] == "structure" and case.get("rules") == [rule]}
    assert cases
    assert cases <= {result["id"] for result in results if result["outcome"] == "passed"}


def test_a_changed_document_is_refused(tmp_path):
    changed = MINIMAL.read_bytes().replace(b'"name":"minimal"', b'"name":"maximal"')
    path = tmp_path / "changed.flash"
    path.write_bytes(changed)
    assert ask({"level": "structure", "path": str(path), "bundles": []}) == (65, {"rule": "FF-SUM-1"})


def test_a_file_that_is_missing_is_a_failure_and_no_answer(tmp_path):
    status, _ = ask({"level": "structure", "path": str(tmp_path / "none.flash"), "bundles": []})
    assert status == 1


def test_nothing_of_the_project_is_imported():
    code = (
        "import json, runpy, sys\n"
        "request = {'level': 'values', 'path': sys.argv[2], 'tensors': ['embedding/tokens'], 'bundles': [[0, 0]]}\n"
        "runpy.run_path(sys.argv[1])['answer'](request)\n"
        "print(json.dumps([name in sys.modules for name in ('zarr', 'flashfmt', 'reference_engine')]))"
    )
    done = subprocess.run([sys.executable, "-c", code, READER, MINIMAL], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [True, False, False]
