"""The reader on zarr-python: what `test_readers` does not ask of all."""

import json
import subprocess
import sys
from pathlib import Path

CONFORMANCE = Path(__file__).parents[2] / "conformance"
READER = CONFORMANCE / "readers" / "zarr_reader.py"
MINIMAL = CONFORMANCE / "valid" / "minimal.flash"


def test_a_file_that_is_missing_is_a_failure_and_no_answer(tmp_path):
    request = json.dumps({"level": "structure", "path": str(tmp_path / "none.flash"), "bundles": []})
    done = subprocess.run([sys.executable, READER], input=request, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")


def test_nothing_of_the_project_is_imported():
    code = (
        "import json, runpy, sys\n"
        "request = {'level': 'values', 'path': sys.argv[2], 'tensors': ['embedding/tokens'], 'bundles': [[0, 0]]}\n"
        "runpy.run_path(sys.argv[1])['answer'](request)\n"
        "print(json.dumps([name in sys.modules for name in ('zarr', 'flashfmt', 'reference_engine')]))"
    )
    done = subprocess.run([sys.executable, "-c", code, READER, MINIMAL], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [True, False, False]
