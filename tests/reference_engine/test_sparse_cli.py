import json

import pytest
from click.testing import CliRunner

from reference_engine.activity_trace import read_header, read_trace
from reference_engine.cli import plan, run


def invoke(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture
def model(synthetic):
    return synthetic("plain", "f32", "f32")


SHORT = ("--tokens", "5,6,7", "--max-tokens", 4, "--temperature", 0, "--ignore-eos", "--memory", "8GiB")


def test_the_oracle_writes_what_exact_mode_writes_and_says_that_it_leaves_out(model):
    exact, sparse = invoke(run, model, *SHORT), invoke(run, model, *SHORT, "--selector", "oracle")
    assert sparse.exit_code == exact.exit_code == 0, sparse.output
    assert sparse.stdout == exact.stdout != ""
    assert "approximation" in sparse.stderr
    assert "approximation" not in exact.stderr


def test_stats_are_a_table_of_layers(model):
    result = invoke(run, model, *SHORT, "--selector", "threshold:0", "--prefetch", "lowbit:q8@previous", "--stats")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stderr.splitlines()]
    assert [line[0] for line in lines[-4:]] == ["0", "1", "2", "all"]
    assert len(lines[-1]) == 11


def test_stats_in_a_pipe_are_not_cut_to_a_width(model, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    result = invoke(run, model, *SHORT, "--selector", "oracle", "--stats")
    header, *rows = result.stderr.splitlines()[-5:]
    assert header.split()[:3] == ["layer", "active", "hits"]
    assert header.split()[-2:] == ["upkeep", "compute"]
    assert max(map(len, rows)) > 70
    assert all("…" not in row for row in rows)


def test_json_has_the_figures_and_the_trace_the_active_neurons(model, tmp_path):
    trace = tmp_path / "trace.jsonl"
    result = invoke(run, model, *SHORT, "--selector", "oracle", "--window", "paper:2", "--json", "--trace", trace)
    report = json.loads(result.stdout)
    assert report["sparse"]["n_tokens"] == 3 + 3
    assert 0 < report["sparse"]["n_hits"] < report["sparse"]["n_active"]
    assert read_header(trace).n_neurons == 448
    passes = list(read_trace(trace))
    assert [p.n_tokens for p in passes] == [3, 1, 1, 1]
    assert sum(len(ids) for p in passes for ids in p.active) == report["sparse"]["n_active"]
    again = invoke(run, model, *SHORT, "--selector", f"trace:{trace}", "--json")
    assert json.loads(again.stdout)["token_ids"] == report["token_ids"]


def test_live_view_goes_to_stderr_and_leaves_the_text_alone(model):
    quiet = invoke(run, model, *SHORT, "--selector", "oracle", "-q")
    live = invoke(run, model, *SHORT, "--selector", "oracle", "-q", "--live")
    assert live.exit_code == 0
    assert live.stdout == quiet.stdout


def test_the_plan_shows_slots_and_selectors(model):
    report = json.loads(invoke(plan, model, "--selector", "oracle", "--json", "--memory", "8GiB").stdout)
    assert report["held_share"] == 1
    assert report["selector_bytes"] > 0
    assert report["planned_bytes"] <= 8 << 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--selector", "wat"], "no selector"),
        (["--window", "paper:0", "--selector", "all"], "no rule for the window"),
        (["--prefetch", "all"], "reads ahead for a --selector"),
        (["--stats"], "show what --selector does"),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(model, arguments, message):
    result = invoke(run, model, *SHORT, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
