"""The C reader: clean under strict warnings, right about the whole suite, and never in trouble with damaged models.

Knows: the reader's makefile and the suite's runner. Does not know: the format.
"""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SUITE = Path(__file__).parents[2] / "conformance"
SOURCES = SUITE / "readers" / "c"


def _make(folder, *targets):
    command = ["make", "-s", "-j2", "-C", str(SOURCES), f"OUT={folder}", *targets]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def compiler():
    """The C compiler that the makefile calls."""
    for program in ("make", "cc"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here to build the C reader with")
    return "cc"


@pytest.fixture(scope="module")
def reader(compiler, tmp_path_factory):
    """Path of the reader, compiled with all warnings as errors."""
    folder = tmp_path_factory.mktemp("c-reader")
    _make(folder, "all")
    return folder / "flash_reader"


@pytest.fixture(scope="module")
def sanitized(compiler, tmp_path_factory):
    """Folder of the builds with AddressSanitizer and UndefinedBehaviorSanitizer."""
    folder = tmp_path_factory.mktemp("c-reader-sanitized")
    flags = ["-fsanitize=address,undefined", "-x", "c", "-", "-o", str(folder / "probe")]
    probe = subprocess.run([compiler, *flags], input=b"int main(void) { return 0; }", capture_output=True, check=False)
    if probe.returncode or subprocess.run([folder / "probe"], capture_output=True, check=False).returncode:
        pytest.skip("the C compiler has no working address and undefined-behaviour sanitizers")
    _make(folder, "sanitized", "fuzz")
    return folder


def _ask(reader, request):
    text = request if isinstance(request, bytes) else json.dumps(request).encode()
    return subprocess.run([reader], input=text, capture_output=True, check=False)


def _run_suite(reader):
    command = [sys.executable, str(SUITE / "run.py"), "--jobs", "2", "--", str(reader)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_agrees_with_the_suite(reader):
    _run_suite(reader)


def test_agrees_with_the_suite_under_sanitizers(sanitized):
    _run_suite(sanitized / "flash_reader_sanitized")


@pytest.mark.parametrize("level", ["structure", "values"])
def test_answers_in_canonical_json(reader, level):
    for path in sorted((SUITE / "valid").glob(f"*.{level}.json")):
        request = json.loads(path.read_bytes())["request"]
        request["path"] = str(SUITE / request["path"])
        done = _ask(reader, request)
        if done.returncode:
            assert b"compressed" in done.stderr
            continue
        canonical = json.dumps(json.loads(done.stdout), sort_keys=True, separators=(",", ":"))
        assert done.stdout.decode("ascii") == canonical + "\n"


@pytest.mark.parametrize(
    "request_text",
    [
        b"",
        b"[]",
        b'{"level":"integrity"}',
        b'{"level":"integrity","path":"\\u0000"}',
        b'{"level":"integrity","path":"no such file"}',
        b'{"level":"decode","path":"/dev/null"}',
        b'{"level":"structure","path":"/dev/null"}',
    ],
)
def test_bad_requests_are_failures_and_no_rejections(reader, request_text):
    done = _ask(reader, request_text)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr


def test_arguments_are_usage_errors(reader):
    assert subprocess.run([reader, "x"], capture_output=True, check=False).returncode == 1


def test_asks_for_what_a_model_lacks_are_failures(reader):
    path = str(SUITE / "valid" / "minimal.flash")
    for asked in ({"bundles": [[0, 6]]}, {"bundles": [[1, 0]]}, {"bundles": [[0, -1]]}, {"tensors": ["nothing"]}):
        assert _ask(reader, {"level": "values", "path": path, **asked}).returncode == 1


def test_a_compressed_tensor_is_no_rejection(reader):
    request = {"level": "integrity", "path": str(SUITE / "valid" / "compressed-tensors.flash")}
    assert _ask(reader, request).returncode == 1


DAMAGED = [
    ("fuzz", "minimal.flash", "", 500),
    ("fuzz", "every-encoding.flash", "", 200),
    ("fuzz", "minimal-directory", "zarr.json", 200),
    ("fuzz_deep", "minimal.flash", "", 1000),
    ("fuzz_deep", "predictors-files-extensions.flash", "", 300),
    ("fuzz_deep", "gated-fatrelu-q4.flash", "", 200),
    ("fuzz_deep", "minimal-directory", "zarr.json", 800),
    ("fuzz_deep", "minimal-directory", "layers/0/ffn/bundles/zarr.json", 300),
    ("fuzz_deep", "minimal-directory", "layers/0/ffn/bundles/c/0/0/0", 100),
]


@pytest.mark.parametrize(("program", "model", "file", "n"), DAMAGED)
def test_damage_is_rejected_or_harmless(sanitized, tmp_path, program, model, file, n):
    source, target = SUITE / "valid" / model, tmp_path / "model"
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
    command = [sanitized / program, target, target / file if file else target, str(n), "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = Counter(done.stdout.split("\n")[:-1])
    assert answers.total() == n
    assert len(answers) > 3, "the damage does not reach the checks"
