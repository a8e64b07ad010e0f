"""The suite itself: complete, reproducible, independent, small; and our library passes all of it."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from flashfmt.errors import FlashError
from flashfmt.rules import RULES

CONFORMANCE = Path(__file__).parents[2] / "conformance"
GOLDEN = ("valid", "invalid", "cases.json")
INDEX = json.loads((CONFORMANCE / "cases.json").read_text(encoding="ascii"))
CASES = INDEX["cases"]
MAX_NBYTES = 20_000_000


def files(root):
    """Bytes of the golden files below a folder, by name."""
    paths = [path for name in GOLDEN for path in [root / name, *(root / name).rglob("*")] if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_the_generator_gives_the_committed_files(tmp_path):
    subprocess.run([sys.executable, CONFORMANCE / "generate.py", tmp_path], check=True)
    built, committed = files(tmp_path), files(CONFORMANCE)
    assert sorted(built) == sorted(committed)
    assert [name for name, content in built.items() if committed[name] != content] == []


def test_every_rule_has_an_invalid_case():
    assert {rule for case in CASES for rule in case.get("rules", [])} == set(RULES)


def test_most_rules_have_a_case_of_their_own():
    alone = {case["rules"][0] for case in CASES if len(case.get("rules", [])) == 1}
    assert set(RULES) - alone <= {"FF-ARR-4", "FF-BND-7", "FF-IDX-1", "FF-LIM-1", "FF-LIM-2", "FF-LIM-8"}


def test_every_level_and_encoding_has_a_valid_case():
    valid = [case for case in CASES if "rules" not in case]
    levels = {"structure", "values", "integrity", "selection", "window", "decode"}
    assert {case["level"] for case in valid} == levels
    encodings = {encoding for case in valid for encoding in case["needs"].get("encodings", [])}
    assert encodings == {"f32", "f16", "bf16", "q8", "q4", "u8", "u32"}


def test_the_index_names_every_case_once():
    ids = [case["id"] for case in CASES]
    assert len(ids) == len(set(ids))
    for case in CASES:
        assert (CONFORMANCE / f"{case['id']}.json").is_file()
        assert case["spec"] in INDEX["spec_versions"]


def test_the_suite_is_small():
    assert sum(len(content) for content in files(CONFORMANCE).values()) < MAX_NBYTES


def test_the_generator_is_independent_of_the_library():
    sources = [CONFORMANCE / "generate.py", *(CONFORMANCE / "generator").glob("*.py")]
    found = {name for path in sources for name in imports(path)}
    assert found <= sys.stdlib_module_names | {"generator", "numpy"}


def test_the_runner_needs_the_standard_library_alone():
    assert set(imports(CONFORMANCE / "run.py")) <= sys.stdlib_module_names


@pytest.fixture(scope="module")
def ask(runner, our_reader):
    """Our reader in this process, answering as its command does."""

    class InProcess:
        def ask(self, request):
            try:
                return 0, runner.canonical(our_reader.ANSWERS[request["level"]](request))
            except FlashError as error:
                return 65, runner.canonical({"rule": error.rule})

    return InProcess()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_our_library_passes(case, runner, ask):
    result = runner.Suite(CONFORMANCE).run(case, ask)
    assert result.outcome == "passed", result.detail


def test_our_reader_passes_as_a_command():
    command = [sys.executable, CONFORMANCE / "readers" / "flashfmt_reader.py"]
    only = ["--only=minimal.*", "--only=minimal-directory.values", "--only=FF-IDX-2", "--only=symlink-*"]
    done = subprocess.run(
        [sys.executable, CONFORMANCE / "run.py", *only, "--", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("passed, 0 failed")
