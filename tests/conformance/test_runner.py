"""The runner's judgement of readers that are wrong, each in its own way; and the verb `flashfmt conformance`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from flashfmt.cli import cli
from flashfmt.conformance import suite_folder
from flashfmt.errors import FlashError

CONFORMANCE = Path(__file__).parents[2] / "conformance"
VALID = "valid/minimal.integrity"
INVALID = "invalid/tensor-checksum"


@pytest.fixture
def reader(tmp_path):
    """Make a reader of a body that may use `request`, `json`, `sys`."""

    def make(body, claims=None):
        script = tmp_path / "reader.py"
        answer = json.dumps(json.dumps(claims or {}))
        known = f"if request['level'] == 'capabilities':\n    print({answer})\n    sys.exit()"
        script.write_text(f"import json, sys, time\nrequest = json.load(sys.stdin)\n{known}\n{body}\n")
        return [sys.executable, str(script)]

    return make


def run(command, *options):
    done = subprocess.run(
        [sys.executable, CONFORMANCE / "run.py", *options, "--", *command], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout


ACCEPT = "print(json.dumps({'verified': True}))"
REJECT = "print(json.dumps({'rule': 'FF-SUM-3'})); sys.exit(65)"


@pytest.mark.parametrize(
    ("body", "case", "complaint"),
    [
        (ACCEPT, INVALID, "accepted, wanted FF-SUM-3"),
        (REJECT, VALID, "exit status 65"),
        (REJECT.replace("SUM-3", "SUM-4"), INVALID, "rejected for FF-SUM-4, wanted FF-SUM-3"),
        (REJECT.replace("65", "1"), INVALID, "exit status 1, wanted FF-SUM-3"),
        ("sys.exit(65)", INVALID, "rejected without a rule"),
        ("print('{\"rule\": [1]}'); sys.exit(65)", INVALID, "wanted FF-SUM-3"),
        ("raise ValueError", VALID, "exit status 1"),
        ("print('verified')", VALID, "the answer is not JSON"),
        ("print('[]')", VALID, "the answer is not an object"),
        ("print('{}')", VALID, "answer.verified is missing"),
        (ACCEPT.replace("True", "1"), VALID, "answer.verified is 1, wanted true"),
        (ACCEPT.replace("True", "True, 'more': 1"), VALID, "answer.more is not expected"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", VALID, "killed by signal 9"),
    ],
)
def test_wrong_answers_fail(reader, body, case, complaint):
    status, output = run(reader(body), f"--only={case}")
    assert status == 1
    assert complaint in output
    assert output.splitlines()[-1] == "0 passed, 1 failed"


def test_a_reader_that_hangs_fails(reader):
    status, output = run(reader("time.sleep(60)"), f"--only={VALID}", "--timeout=1")
    assert (status, "no answer in time" in output) == (1, True)


@pytest.mark.parametrize(("body", "case"), [(ACCEPT, VALID), (REJECT, INVALID)])
def test_right_answers_pass(reader, body, case):
    status, output = run(reader(body), f"--only={case}")
    assert (status, output.splitlines()[-1]) == (0, "1 passed, 0 failed")


@pytest.mark.parametrize(
    "claims",
    [
        {"levels": ["structure"]},
        {"containers": ["directory"]},
        {"codecs": []},
        {"rules": ["FF-JSON-"]},
    ],
)
def test_what_is_not_claimed_is_skipped_and_nothing_is_no_success(reader, claims):
    status, output = run(reader(ACCEPT, claims), f"--only={INVALID}")
    assert (status, output.splitlines()[-1]) == (1, "0 passed, 0 failed, 1 skipped")


def test_numbers_are_judged_by_their_distance(runner):
    one, near, far = ("AACAPw==", "CgCAPw==", "AAAAQA==")  # 1, 1 + 1.2e-6, 2
    case = {"expected": {"logits": one}, "approximate": {"logits": 1e-4}}
    assert runner.judge(0, runner.canonical({"logits": near}), case) == ""
    assert "wanted 1.0" in runner.judge(0, runner.canonical({"logits": far}), case)
    assert "wanted 1.0" in runner.judge(0, runner.canonical({"logits": "AADAfw=="}), case)  # NaN
    for wrong in ("AACAPwAAgD8=", "????", 1, None):
        assert runner.judge(0, runner.canonical({"logits": wrong}), case)


def test_json_report(reader):
    status, output = run(reader(ACCEPT), f"--only={VALID}", f"--only={INVALID}", "--json")
    report = json.loads(output)
    assert status == 1
    assert report["totals"] == {"passed": 1, "failed": 1}
    assert {result["id"]: result["outcome"] for result in report["results"]} == {VALID: "passed", INVALID: "failed"}


def test_wrong_usage():
    assert run(["no such program"])[0] == 2
    assert run([sys.executable], "--only=nothing-like-this")[0] == 2


def test_recipes_make_what_a_repository_cannot_hold(runner, tmp_path):
    suite = runner.Suite(CONFORMANCE)
    kinds = set()
    for case in suite.index:
        path = CONFORMANCE / f"{case['id']}.json"
        recipe = json.loads(path.read_text(encoding="ascii")).get("recipe")
        if recipe is not None:
            folder = tmp_path / path.stem
            folder.mkdir()
            made = suite._make(recipe, folder)
            for found, folders, names in os.walk(made):
                entries = [Path(found, name) for name in folders + names]
                kinds |= {"link" for entry in entries if entry.is_symlink()}
                kinds |= {"pipe" for entry in entries if entry.is_fifo()}
                kinds |= set() if entries else {"empty"}
    assert kinds == {"link", "pipe", "empty"}


def test_the_verb_runs_the_suite(reader):
    code = "import sys; from flashfmt.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "conformance", f"--only={VALID}", "--jobs=1", "--timeout=30", "--"]
    done = subprocess.run([*command, *reader(ACCEPT), "--option"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "1 passed, 0 failed")


def test_the_verb_says_where_the_suite_is_to_be_found(tmp_path):
    with pytest.raises(FlashError, match="--suite"):
        suite_folder(tmp_path)
    result = CliRunner().invoke(cli, ["conformance", "--suite", str(tmp_path), "--", "true"])
    assert isinstance(result.exception, FlashError)
