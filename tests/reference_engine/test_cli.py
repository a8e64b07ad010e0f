import io
import json
import sys
from typing import NamedTuple

import pytest

from flashfmt.cli import main
from flashfmt.convert import convert

SMALL = ["--memory", "2GiB", "--context", "64"]


@pytest.fixture(scope="module")
def model(tiny_checkpoint, tmp_path_factory):
    source, _ = tiny_checkpoint("llama")
    path = tmp_path_factory.mktemp("cli") / "tiny.flash"
    convert(source, path)
    return str(path)


class Result(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def flashfmt(capsys, monkeypatch):
    """The command, run in this process."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        return Result(exit_.value.code, *capsys.readouterr())

    return run


def test_run_writes_text_to_stdout_and_figures_to_stderr(flashfmt, model):
    result = flashfmt("run", model, "The quick", *SMALL, "--temperature", "0", "--max-tokens", "5", "--ignore-eos")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.endswith("\n")
    for figure in (
        "memory plan",
        "first token after",
        "tokens/s",
        "read per token",
        "waiting for flash",
        "peak memory",
    ):
        assert figure in result.stderr
        assert figure not in result.stdout


def test_run_is_repeatable_by_seed_and_reads_standard_input(flashfmt, model):
    options = [*SMALL, "--max-tokens", "12", "--temperature", "5", "--ignore-eos", "--quiet"]
    first = flashfmt("run", model, "Eight words", *options, "--seed", "7")
    again = flashfmt("run", model, "-", *options, "--seed", "7", stdin="Eight words")
    other = flashfmt("run", model, "Eight words", *options, "--seed", "8")
    assert first.stdout == again.stdout != other.stdout
    assert first.stderr == ""


def test_run_as_json(flashfmt, model):
    result = flashfmt("run", model, "--chat", "Hello", *SMALL, "--max-tokens", "4", "--ignore-eos", "--json")
    report = json.loads(result.stdout)
    assert result.stderr == ""
    assert report["finish_reason"] == "length"
    assert len(report["token_ids"]) == 4
    assert report["statistics"]["generated_tokens"] == 4
    assert report["plan"]["planned_bytes"] <= 2 << 30


def test_run_with_token_ids(flashfmt, model):
    result = flashfmt("run", model, "--tokens", "5,6,7", *SMALL, "--max-tokens", "3", "--temperature", "0", "--json")
    assert result.exit_code == 0, result.stderr


def test_plan_prints_the_split(flashfmt, model):
    result = flashfmt("plan", model, *SMALL)
    assert result.exit_code == 0
    for row in ("resident tensors", "KV cache (64 tokens)", "FFN bundles pinned", "smallest ceiling that works"):
        assert row in result.stdout
    figures = json.loads(flashfmt("plan", model, *SMALL, "--json").stdout)
    assert figures["floor_bytes"] <= figures["planned_bytes"] <= figures["ceiling_bytes"] == 2 << 30


def test_chat_keeps_the_conversation_and_leaves_at_an_empty_line(flashfmt, model):
    options = ["--memory", "2GiB", "--max-tokens", "3", "--temperature", "0", "--quiet"]
    result = flashfmt("chat", model, *options, stdin="Hi\nAgain\n\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") >= 2
    loud = flashfmt("chat", model, *options[:-1], stdin="Hi\nAgain\n")
    uses = [int(line.split(" of 128")[0].split()[-1]) for line in loud.stderr.splitlines() if "of context" in line]
    assert len(uses) == 2
    assert uses[0] < uses[1]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["run", "MODEL", "hi", "--memory", "1MB"], 1, "the smallest that works is"),
        (["run", "MODEL", "hi", "--memory", "lots"], 2, "is not a size"),
        (["run", "MODEL"], 2, "either PROMPT or --tokens"),
        (["run", "MODEL", "--tokens", "1,x"], 2, "not a list of numbers"),
        (["run", "MODEL", "--tokens", "99999", *SMALL], 1, "outside the vocabulary"),
        (["run", "MODEL", "word " * 80, *SMALL], 1, "too many for the context of 64"),
        (["run", "MODEL", "hi", "--context", "4096"], 1, "no such context"),
        (["run", "MODEL", "hi", "--top-p", "3", *SMALL], 1, "top_p is out of range"),
        (["run", "nothing.flash", "hi"], 1, "no such file"),
        (["plan", __file__], 3, "looks like a text file"),
        (["chat", "MODEL", "--memory", "1MB"], 1, "the smallest that works is"),
    ],
)
def test_mistakes_get_one_clear_line_and_their_exit_code(flashfmt, model, arguments, exit_code, message):
    result = flashfmt(*[model if argument == "MODEL" else argument for argument in arguments])
    assert result.exit_code == exit_code, result.stderr
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
