"""The command: its report, its options, its files."""

import json

import pytest
from click.testing import CliRunner

import reference_engine.bench.plot as plot_module
from flashfmt.cli import cli
from flashfmt.encodings import Encoding
from flashfmt.errors import BudgetError, MissingExtraError
from reference_engine import bench_cli
from reference_engine.bench.ablation import WARM_UP_TOKENS
from reference_engine.bench_cli import bench


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench_cli, "_FLOOR_SECONDS", 0.01)


def invoke(*arguments):
    return CliRunner().invoke(bench, [str(argument) for argument in arguments])


@pytest.fixture
def model(small_files):
    return small_files.path(Encoding.F16)


SHORT = ("--tokens", 3, "--prompt-tokens", 5, "-q", "--memory", "8GiB", "--seconds", 10**6)
RUN_KEYS = {
    "prompt_tokens", "n_tokens", "n_sequences", "tokens_per_second", "seconds_per_token", "p50_seconds", "p99_seconds",
    "first_token_seconds", "bytes_per_token", "requests_per_token", "hit_rate", "active_per_token",
    "missing_per_token", "peak_memory_bytes", "split_seconds", "token_seconds", "plan",
}  # fmt: skip
SPLIT_KEYS = {"select", "issue", "wait", "ffn", "upkeep", "check", "rest"}
MACHINE_KEYS = {"processor", "cores", "memory_bytes", "disk", "system", "python", "load_average"}


def test_the_command_is_known():
    assert "bench" in cli.list_commands(None)


def test_exact_mode_is_measured(model):
    result = invoke(model, *SHORT, "--json", "--repeats", 2, "--compare")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert set(report) == {"flashfmt_bench", "machine", "settings", "model", "synthetic_activity", "run", "floor"}
    run = report["run"]
    assert set(run) == RUN_KEYS
    assert set(run["split_seconds"]) == SPLIT_KEYS
    assert set(report["machine"]) == MACHINE_KEYS
    assert (run["n_tokens"], run["n_sequences"], run["prompt_tokens"]) == (6, 2, 5)
    assert run["bytes_per_token"] == run["plan"]["streamed_bytes_per_token"] == 0
    assert run["hit_rate"] is None
    assert run["split_seconds"]["rest"] > 0
    assert run["p50_seconds"] <= run["p99_seconds"] <= max(run["token_seconds"])
    assert report["synthetic_activity"] is None
    assert report["floor"]["measured_over_floor"] > 0


def test_activity_stands_in_for_a_real_model(small_shape, cache):
    result = invoke("--like", small_shape.name, "--cache", cache, "--residents", "q8", *SHORT, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    run, activity = report["run"], report["synthetic_activity"]
    assert report["model"]["synthetic_weights"]
    assert 0 < run["hit_rate"] < 1
    assert run["missing_per_token"] == pytest.approx(run["active_per_token"] * (1 - run["hit_rate"]))
    assert run["active_per_token"] / (2 * 640) == pytest.approx(activity["achieved"]["active_share"], rel=0.3)
    assert activity["published"]["held_share"] == 0.24


def test_without_activity_all_neurons_are_computed(small_shape, cache):
    result = invoke("--like", small_shape.name, "--cache", cache, "--residents", "q8", *SHORT, "--exact", "--json")
    assert json.loads(result.stdout)["run"]["active_per_token"] == 0


def test_people_get_a_table_that_discloses(small_shape, cache):
    result = invoke("--like", small_shape.name, "--cache", cache, "--residents", "q8", *SHORT)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    for expected in ("synthetic weights", "synthetic activity", "published: 10.0% active", "tokens/s", "peak memory"):
        assert expected in text


def test_an_ablation_in_a_table_and_in_files(small_shape, cache, tmp_path, monkeypatch):
    def missing():
        raise MissingExtraError("plots need matplotlib; install flashfmt[plots]")

    monkeypatch.setattr(plot_module, "require_matplotlib", missing)
    arguments = ("--cache", cache, "--residents", "q8", "--ablation", "--rows", "overlap,window", *SHORT)
    result = invoke("--like", small_shape.name, *arguments, "--output", tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert "install flashfmt[plots]" in result.stderr
    assert result.stdout.index("+ window of 5 tokens") < result.stdout.index("+ overlap")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["results.json", "tables.txt"]
    assert "+ window of 5 tokens" in (tmp_path / "new" / "tables.txt").read_text()
    report = json.loads((tmp_path / "new" / "results.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["window", "overlap"]
    for row in report["rows"]:
        assert set(row["run"]) == RUN_KEYS
        assert row["n_warm_up"] == WARM_UP_TOKENS
    assert report["settings"]["verify"] == "never"


def test_residents_that_are_narrow_already_are_no_row_of_their_own(small_shape, cache):
    arguments = ("--cache", cache, "--residents", "q8", "--ablation", "--rows", "overlap,q8_residents", *SHORT)
    result = invoke("--like", small_shape.name, *arguments, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [row["name"] for row in report["rows"]] == ["overlap"]
    assert "stored as narrowly" in report["notes"][0]


def test_residents_of_a_model_are_held_as_asked_for(model):
    for arguments, held in (((), "stored"), (("--residents", "q8"), "q8")):
        result = invoke(model, *SHORT, *arguments, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["run"]["plan"]["resident_encoding"] == held
    assert "does not go with MODEL" in invoke(model, *SHORT, "--residents", "f32").output


def test_pictures_are_drawn_where_they_can_be(small_shape, cache, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ("--cache", cache, "--residents", "q8", "--ablation", "--rows", "overlap", *SHORT, "--compare")
    assert invoke("--like", small_shape.name, *arguments, "--output", tmp_path).exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "tables.txt", "latency.png", "latency.svg"}


def test_a_share_of_the_model_is_a_ceiling(model):
    result = invoke(model, "--memory", "5%", "-q")
    assert isinstance(result.exception, BudgetError)
    assert result.exception.actual == int(0.05 * model.stat().st_size)


def test_a_selector_of_one_s_own_decides(model):
    result = invoke(model, *SHORT, "--selector", "oracle", "--window", "lru", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["settings"]["window"] == "lru"
    assert report["synthetic_activity"] is None
    assert report["run"]["active_per_token"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either MODEL or --like"),
        (["m.flash", "--like", "opt-125m"], "give either MODEL or --like"),
        (["--like", "gpt-5"], "is none of"),
        (["m.flash", "--memory", "0%"], "no share"),
        (["m.flash", "--memory", "much"], "not a size"),
        (["m.flash", "--memory", "x%"], "could not convert"),
        (["m.flash", "--rows", "naive"], "goes with --ablation"),
        (["m.flash", "--ablation", "--rows", "all"], "is no row"),
        (["m.flash", "--no-keep"], "goes with --like"),
        (["--like", "opt-125m", "--exact", "--ablation"], "computes all neurons"),
        (["m.flash", "--prefetch", "all"], "reads ahead for a --selector"),
        (["m.flash", "--ablation", "--device", "cuda"], "for the CPU"),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())


def test_a_file_that_is_not_there_is_an_error_with_its_name(tmp_path):
    result = invoke(tmp_path / "none.flash")
    assert result.exit_code == 1
    assert "none.flash" in str(result.exception)
