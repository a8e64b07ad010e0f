"""The small ReLU model that comes with the repository: real sparsity, from checkpoint to sparse text."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from flashfmt.cli import cli
from reference_engine.engine import Engine, EngineOptions
from reference_engine.selectors import parse_selector
from reference_engine.sparse_mode import SparseOptions
from reference_engine.tokenizer import load_tokenizer

MODELS = Path(__file__).parents[2] / "models"
TEXT = MODELS / "text"
N_NEURONS = 6 * 1024


def flashfmt(*arguments):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def relu(tmp_path_factory):
    path = tmp_path_factory.mktemp("relu") / "relu.flash"
    flashfmt("convert", MODELS / "relu-opt-6m", path)
    return path


@pytest.fixture(scope="module")
def calibrated(relu):
    path = relu.with_name("calibrated.flash")
    answer = flashfmt(
        "calibrate", relu, "--text", TEXT / "calibration.txt", "--tokens", 6000, "--epochs", 1, "--rank", 16,
        "--output", path, "--json", "--quiet",
    )  # fmt: skip
    return path, json.loads(answer)


@pytest.fixture(scope="module")
def ids(relu):
    with Engine(relu) as engine:
        return load_tokenizer(engine.model).encode(
            (TEXT / "evaluation.txt").read_text()[:1200], add_special_tokens=True
        )[:160]


def logits(path, ids, selector):
    """Logits behind each token, fed one by one, and what sparse mode counted."""
    with Engine(path, EngineOptions(sparse=SparseOptions(parse_selector(selector)))) as engine:
        engine.load()
        session = engine.start()
        return np.stack([session.feed([token]) for token in ids]), engine.sparse.totals


def test_hardly_any_neuron_is_active_and_the_text_is_predicted(relu):
    arguments = ("--selectors", "exact,oracle", "--tokens", 1024, "--simulate", 0, "--json", "-", "--quiet")
    exact, oracle = json.loads(flashfmt("eval", relu, "--text", TEXT / "evaluation.txt", *arguments))["points"]
    assert exact["perplexity"] < 50
    assert oracle["perplexity"] == pytest.approx(exact["perplexity"], rel=1e-5)
    assert 0.02 < oracle["active_share"] < 0.1


def test_leaving_out_what_is_inactive_changes_nothing(relu, ids):
    dense, _ = logits(relu, ids, "all")
    sparse, totals = logits(relu, ids, "oracle")
    assert np.abs(sparse - dense).max() <= 1e-4 * np.abs(dense).max()
    assert totals.total("n_active") < 0.15 * N_NEURONS * len(ids)


def test_stored_predictors_keep_the_text_with_a_part_of_the_neurons(calibrated, ids):
    path, report = calibrated
    measured = [predictor["measured"] for predictor in report["predictors"]]
    assert all(each["recall"] > 0.85 for each in measured)
    assert np.mean([each["predicted_fraction"] for each in measured]) < 0.5
    assert measured[0]["perplexity_ratio"] < 1.1
    dense, _ = logits(path, ids, "all")
    sparse, totals = logits(path, ids, "file")
    assert totals.total("n_active") < 0.5 * N_NEURONS * len(ids)
    agreement = np.mean(sparse.argmax(axis=1) == dense.argmax(axis=1))
    assert agreement > 0.8
