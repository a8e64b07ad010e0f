"""Evaluation as a whole: perplexities against independent runs, names of selectors, tables and plots."""

import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

import flashfmt
from flashfmt.errors import MissingExtraError, PromptError
from reference_engine.calibration import CalibrationOptions, calibrate
from reference_engine.calibration_cli import calibrate as calibrate_command
from reference_engine.calibration_cli import evaluate as evaluate_command
from reference_engine.engine import Engine, EngineOptions
from reference_engine.evaluation import EvaluationOptions, evaluate
from reference_engine.evaluation.plot import plot
from reference_engine.evaluation.tables import tables
from reference_engine.token_text import read_texts
from reference_engine.tokenizer import load_tokenizer

ENGINE = EngineOptions(memory=4 << 30, backend="numpy")
QUICK = {"n_tokens": 300, "window": 128, "stride": 64, "simulated_tokens": 100}


@pytest.fixture(scope="module")
def text(write_text):
    return write_text(9, 1500)


@pytest.fixture(scope="module")
def calibrated(tiny_flash, text, tmp_path_factory):
    path = tmp_path_factory.mktemp("calibrated") / "opt.flash"
    options = CalibrationOptions(n_tokens=1280, rank=16, epochs=1)
    calibrate(tiny_flash("opt"), [text], path, options=options, engine=ENGINE)
    return path


@pytest.fixture(scope="module")
def evaluation(calibrated, text):
    names = ("dense", "exact", "file", "file:sweep", "oracle", "oracle:20%", "threshold:0.2", "threshold", "lowbit:q4")
    return evaluate(calibrated, [text], options=EvaluationOptions(selectors=names, **QUICK), engine=ENGINE)


def by_label(evaluation):
    return {point.label: point for point in evaluation.points}


def test_nothing_that_matters_is_left_out_at_no_cost(evaluation):
    points = by_label(evaluation)
    for label in ("dense", "exact", "oracle"):
        assert points[label].cost == pytest.approx(0, abs=1e-5)
    assert points["oracle"].computed_share == pytest.approx(points["oracle"].active_share)
    assert points["dense"].computed_share == 1
    assert points["dense"].recall is None


def test_perplexity_is_that_of_the_tokens_one_by_one(evaluation, calibrated, text):
    """The engine feeds token after token in sparse mode's order; a hook of ours leaves out what the file says."""
    with flashfmt.open(calibrated) as model:
        ids = read_texts([text], load_tokenizer(model)).token_ids[:300]
    nats = []
    with Engine(calibrated, EngineOptions(memory=4 << 30, backend="numpy", context_tokens=128)) as engine:
        engine.load()
        for first, scored_from in ((0, 1), (64, 128), (128, 192), (192, 256)):
            session = engine.start()
            logits = [session.feed([token]).astype(np.float64) for token in ids[first : first + 128]]
            for at in range(scored_from, min(first + 128, 300)):
                row = logits[at - first - 1]
                nats.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[ids[at]])
    assert len(nats) == evaluation.n_scored_tokens == 299
    assert by_label(evaluation)["exact"].perplexity == pytest.approx(np.exp(np.mean(nats)), rel=1e-4)


def test_a_sweep_trades_recall_for_fewer_neurons(evaluation):
    points = by_label(evaluation)
    order = ["file logit -2", "file logit -1", "file", "file logit +1", "file logit +2"]
    for name in ("computed_share", "recall"):
        values = [getattr(points[label], name) for label in order]
        assert values == sorted(values, reverse=True)
    assert points["file"].recall == pytest.approx(0.95, abs=0.04)


def test_shares_are_kept(evaluation):
    points = by_label(evaluation)
    assert points["oracle 20%"].computed_share == pytest.approx(0.2, abs=0.05)
    quarter = points["threshold 25% of nonzero"]
    assert quarter.computed_share == pytest.approx(0.25 * quarter.active_share, abs=0.03)
    assert points["threshold 0.2"].computed_share < points["oracle"].computed_share
    assert points["lowbit q4"].recall > 0.9


def test_totals_are_those_of_the_layers(evaluation):
    for point in evaluation.points:
        if point.layers:
            assert point.computed_share == pytest.approx(np.mean([layer.computed_share for layer in point.layers]))
            assert len(point.layers) == 2


def test_windows_are_simulated_on_the_files_predictors(evaluation):
    assert (evaluation.simulated, evaluation.n_simulated_tokens) == ("file", 100)
    whole = next(w for w in evaluation.windows if w.rule == "frequency" and w.size == 1)
    longest = [w for w in evaluation.windows if w.rule == "paper"][-1]
    assert whole.hit_rate >= longest.hit_rate > 0.9


def test_a_silu_model_has_points_by_share(tiny_flash, text):
    names = ("lowbit:q4:50%", "threshold:50%", "oracle:50%", "lowbit:q8:0.1", "all")
    found = evaluate(tiny_flash("llama"), [text], options=EvaluationOptions(selectors=names, **QUICK), engine=ENGINE)
    points = by_label(found)
    for label in ("lowbit q4 50%", "threshold 50%", "oracle 50%"):
        assert points[label].computed_share == pytest.approx(0.5, abs=0.06)
    assert points["lowbit q4 50%"].recall > 0.9
    assert points["lowbit q8:0.1"].recall > 0.98
    assert points["all"].cost == pytest.approx(0, abs=1e-5)
    assert evaluation_defaults_run(tiny_flash("llama"), text)


def evaluation_defaults_run(path, text):
    quick = EvaluationOptions(n_tokens=40, simulated_tokens=0)
    return {point.selector for point in evaluate(path, [text], options=quick, engine=ENGINE).points} == {
        "dense",
        "oracle",
        "threshold",
        "lowbit",
    }


def test_what_does_not_go_with_a_model_is_refused(tiny_flash, text, write_text):
    with pytest.raises(PromptError, match="no predictors"):
        evaluate(tiny_flash("opt"), [text], options=EvaluationOptions(selectors=("file",), **QUICK), engine=ENGINE)
    with pytest.raises(ValueError, match="no selector"):
        evaluate(tiny_flash("opt"), [text], options=EvaluationOptions(selectors=("magic",)), engine=ENGINE)
    with pytest.raises(ValueError, match="trace"):
        evaluate(tiny_flash("opt"), [text], options=EvaluationOptions(selectors=("trace:x",)), engine=ENGINE)
    with pytest.raises(PromptError, match="empty"):
        evaluate(tiny_flash("opt"), [write_text(0, 0)], engine=ENGINE)


def test_tables_and_json_hold_the_figures(evaluation):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        for part in tables(evaluation):
            console.print(part)
        shown = console.export_text()
    point = by_label(evaluation)["file"]
    assert f"{point.perplexity:.4g}" in shown
    assert "file logit +1" in shown
    assert "paper, last 16 tokens" in shown
    document = json.loads(json.dumps(evaluation.as_dict()))
    assert [p["perplexity"] for p in document["points"]] == [p.perplexity for p in evaluation.points]


def test_a_plot_needs_matplotlib(evaluation, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"flashfmt\[plots\]"):
        plot(evaluation, tmp_path / "x.png")


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_a_plot_is_drawn(evaluation, tmp_path, suffix, magic):
    pytest.importorskip("matplotlib")
    plot(evaluation, tmp_path / f"x{suffix}")
    assert (tmp_path / f"x{suffix}").read_bytes().startswith(magic)


def test_the_commands(tiny_flash, text, tmp_path):
    target = tmp_path / "m.flash"
    common = ["--text", str(text), "--memory", "4GiB", "--backend", "numpy", "--quiet"]
    arguments = [str(tiny_flash("opt")), *common, "--output", str(target), "--tokens", "768", "--rank", "8"]
    result = CliRunner().invoke(calibrate_command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "low_rank 8" in result.stdout
    assert "held-out tokens" in result.stdout
    report = json.loads(
        CliRunner().invoke(calibrate_command, [*arguments, "--overwrite", "--json"], catch_exceptions=False).stdout
    )
    assert report["predictors"][0]["rank"] == 8
    arguments = [str(target), *common, "--tokens", "150", "--selectors", "dense, file", "--simulate", "64"]
    result = CliRunner().invoke(evaluate_command, [*arguments, "--json", str(tmp_path / "e.json")])
    assert result.exit_code == 0
    assert "neuron windows with file" in result.stdout
    document = json.loads((tmp_path / "e.json").read_text())
    assert [point["selector"] for point in document["points"]] == ["dense", "file"]
    piped = CliRunner().invoke(evaluate_command, [*arguments, "--json", "-"], catch_exceptions=False)
    assert json.loads(piped.stdout) == document


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (calibrate_command, ["--target", "speed=9"], "not a target"),
        (calibrate_command, ["--rank", "many"], "neither auto"),
        (calibrate_command, ["--memory", "lots"], "not a size"),
        (evaluate_command, ["--selectors", "magic"], "no selector"),
        (evaluate_command, ["--window", "10", "--stride", "20"], "skip over text"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_loaded(tmp_path, command, arguments, message):
    result = CliRunner().invoke(command, [str(tmp_path / "none.flash"), "--text", "none.txt", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_plot_of_an_unknown_kind_is_wrong_usage(tmp_path):
    result = CliRunner().invoke(evaluate_command, ["m.flash", "--text", "t", "--plot", str(tmp_path / "x.pdf")])
    assert result.exit_code == 2
    assert ".svg" in result.stderr
