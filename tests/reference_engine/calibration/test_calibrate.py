"""Calibration as a whole, on a tiny ReLU model and a tiny SiLU one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import flashfmt
from flashfmt.errors import FlashWriteError, PromptError
from flashfmt.manifest import InputTap, bundles_name
from reference_engine.calibration import CalibrationOptions, Target, calibrate
from reference_engine.calibration.scratch import Scratch
from reference_engine.engine import EngineOptions
from reference_engine.token_text import read_texts
from reference_engine.tokenizer import load_tokenizer

ENGINE = EngineOptions(memory=4 << 30, backend="numpy")
QUICK = CalibrationOptions(n_tokens=2560, held_out=0.25, epochs=2, rank=16)


@pytest.fixture(scope="module")
def text(write_text):
    return write_text(1, 2500)


@pytest.fixture(scope="module")
def calibrated(tiny_flash, text, tmp_path_factory):
    """(path, report) of the tiny OPT with predictors for a recall of 0.9, scratch kept."""
    path = tmp_path_factory.mktemp("calibrated") / "opt.flash"
    options = CalibrationOptions(n_tokens=2560, held_out=0.25, epochs=2, rank=16, target=Target("recall", 0.9))
    return path, calibrate(tiny_flash("opt"), [text], path, options=options, engine=ENGINE, keep_scratch=True)


def oracle_activations(oracle, ids, window):
    """Values of the neurons of each layer, by transformers: float32 [n_layers, n_tokens, d_ff]."""
    torch = pytest.importorskip("torch")
    layers = oracle.model.decoder.layers
    seen = [[] for _ in layers]
    hooks = [
        layer.activation_fn.register_forward_hook(lambda m, i, out, at=at: seen[at].append(out.detach()))
        for at, layer in enumerate(layers)
        if isinstance(layer.activation_fn, torch.nn.Module)
    ]
    with torch.no_grad():
        for first in range(0, len(ids), window):
            oracle(torch.tensor([ids[first : first + window]]))
    for hook in hooks:
        hook.remove()
    return np.stack([torch.cat([a.reshape(-1, a.shape[-1]) for a in layer]).numpy() for layer in seen])


def kept_scratch(path):
    """What the calibration of the fixture has recorded."""
    store = path.with_name(path.name + ".calibration")
    fingerprint = json.loads((store / "journal.json").read_text())["fingerprint"]
    scratch = Scratch(store, fingerprint, n_layers=2, n_tokens=2560, d_model=64, d_ff=128, chunk_tokens=128)
    assert scratch.resumed
    return scratch


def test_the_file_says_what_the_report_says(calibrated):
    path, report = calibrated
    assert report.target_met
    assert not report.resumed
    with flashfmt.open(path) as model:
        model.verify()
        assert model.manifest.predictors == report.predictors
        for layer, predictor in enumerate(report.predictors):
            assert (predictor.layer, predictor.kind, predictor.rank) == (layer, "low_rank", 16)
            assert predictor.measured.recall == pytest.approx(0.9, abs=0.03)
            assert predictor.measured.n_tokens == report.n_held_out_tokens == 640
            assert predictor.measured.perplexity_ratio == pytest.approx(1 + report.perplexity_cost)
            assert "tokens 1920 to 2560" in predictor.measured.text
            _, tensors = model.predictor(layer)
            assert {t.encoding for name, t in tensors.items() if name != "bias"} == {"f16"}
        assert f"perplexity {report.perplexity:.4g}" in model.manifest.statistics.text


def test_everything_else_is_copied(calibrated, tiny_flash):
    with flashfmt.open(tiny_flash("opt")) as source, flashfmt.open(calibrated[0]) as copy:
        assert copy.decoder == source.decoder
        assert copy.manifest.provenance == source.manifest.provenance
        for name in source.tensors:
            np.testing.assert_array_equal(copy.tensor(name).data, source.tensor(name).data)
        for info in source.layers:
            assert info.name == bundles_name(info.layer)
            np.testing.assert_array_equal(copy.bundles(info.layer).rows, source.bundles(info.layer).rows)
        assert {role: copy.file(role) for role in copy.files} == {role: source.file(role) for role in source.files}


def test_what_is_recorded_is_what_transformers_computes(calibrated, tiny_checkpoint, text):
    path, _ = calibrated
    with flashfmt.open(path) as model:
        ids = read_texts([text], load_tokenizer(model)).token_ids[:2560]
        frequencies = [model.statistics(layer)["firing_frequency"] for layer in range(2)]
        curves = [model.statistics(layer)["aggregated_window"] for layer in range(2)]
    h = oracle_activations(tiny_checkpoint("opt")[1], ids, 128)
    expected = h[:, 1920:] != 0
    scratch = kept_scratch(path)
    for layer in range(2):
        np.testing.assert_allclose(scratch.sizes(layer, 0, 1920), np.abs(h[layer, :1920]).sum(axis=0), rtol=1e-3)
        np.testing.assert_allclose(frequencies[layer], expected[layer].mean(axis=0), atol=2e-3)
        assert curves[layer][0] == pytest.approx(expected[layer].mean(), abs=1e-3)
        union = [(expected[layer][t - 3 : t + 1]).any(axis=0).mean() for t in range(3, 640)]
        assert curves[layer][3] == pytest.approx(np.mean(union), abs=1e-3)


def test_measured_figures_follow_from_the_stored_arrays(calibrated):
    """Sigmoid, threshold and counts in plain float64, on what the scratch store holds."""
    path, report = calibrated
    scratch = kept_scratch(path)
    with flashfmt.open(path) as model:
        for layer, predictor in enumerate(report.predictors):
            _, tensors = model.predictor(layer)
            down, up, bias = (tensors[name].decode().astype(np.float64) for name in ("down", "up", "bias"))
            z, active = scratch.inputs(layer, 1920, 2560).astype(np.float64), scratch.active(layer, 1920, 2560)
            predicted = 1 / (1 + np.exp(-(z @ down.T @ up.T + bias))) > predictor.threshold
            measured = predictor.measured
            assert measured.recall == pytest.approx((predicted & active).sum() / active.sum(), abs=1e-4)
            assert measured.precision == pytest.approx((predicted & active).sum() / predicted.sum(), abs=1e-4)
            assert measured.predicted_fraction == pytest.approx(predicted.mean(), abs=1e-4)


def test_held_out_text_changes_nothing_that_is_fitted(tiny_flash, write_text, tmp_path):
    begin = write_text(1, 1100).read_text() + "."
    results = []
    for seed in (2, 3):
        path = tmp_path / f"{seed}.flash"
        text = write_text(seed, 1500, start=begin)
        results.append(calibrate(tiny_flash("opt"), [text], path, options=QUICK, engine=ENGINE))
    with flashfmt.open(tmp_path / "2.flash") as first, flashfmt.open(tmp_path / "3.flash") as second:
        ids = [read_texts([write_text(s, 1500, start=begin)], load_tokenizer(first)).token_ids for s in (2, 3)]
        assert ids[0][:1920] == ids[1][:1920]  # train and validation
        assert ids[0][1920:2560] != ids[1][1920:2560]
        for layer in range(2):
            (p, a), (q, b) = first.predictor(layer), second.predictor(layer)
            assert p.threshold == q.threshold
            assert p.measured.recall != q.measured.recall
            for name in a:
                np.testing.assert_array_equal(a[name].data, b[name].data)
    assert results[0].perplexity != results[1].perplexity


KILLED = """
import os, signal, sys
from reference_engine.calibration import CalibrationOptions, calibrate
from reference_engine.engine import EngineOptions

def die(what, done, total):
    if what == sys.argv[4] and done >= int(sys.argv[5]):
        os.kill(os.getpid(), signal.SIGKILL)

calibrate(sys.argv[1], [sys.argv[2]], sys.argv[3], progress=die,
          options=CalibrationOptions(n_tokens=2560, held_out=0.25, epochs=2, rank=16),
          engine=EngineOptions(memory=4 << 30, backend="numpy"))
"""


@pytest.fixture(scope="module")
def uninterrupted(tiny_flash, text, tmp_path_factory):
    """(path, report) of the calibration that is going to be killed, left to run."""
    path = tmp_path_factory.mktemp("uninterrupted") / "m.flash"
    return path, calibrate(tiny_flash("opt"), [text], path, options=QUICK, engine=ENGINE)


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize(("step", "done"), [("recording activity", 1024), ("fitting layers", 1)])
def test_a_killed_calibration_goes_on_where_it_was(tiny_flash, text, tmp_path, uninterrupted, step, done):
    target = tmp_path / "m.flash"
    arguments = [sys.executable, "-c", KILLED, str(tiny_flash("opt")), str(text), str(target), step, str(done)]
    assert subprocess.run(arguments, check=False).returncode == -9
    assert not target.exists()
    seen = []
    report = calibrate(
        tiny_flash("opt"), [text], target, options=QUICK, engine=ENGINE, progress=lambda *news: seen.append(news)
    )
    assert report.resumed
    assert next(news for news in seen if news[0] == "recording activity")[1] >= 1024 - 128
    assert report.predictors == uninterrupted[1].predictors
    assert target.read_bytes() == uninterrupted[0].read_bytes()
    assert not list(tmp_path.glob("*.calibration"))


def test_a_perplexity_target_is_met_on_the_whole_model(tiny_flash, text, tmp_path):
    options = CalibrationOptions(n_tokens=1280, rank=8, epochs=1, target=Target("perplexity", 0.5))
    report = calibrate(tiny_flash("opt"), [text], tmp_path / "m.flash", options=options, engine=ENGINE)
    assert report.target_met
    assert report.perplexity_cost < 0.5
    assert max(p.measured.recall for p in report.predictors) < 0.8  # so much loss allows to leave out a lot


def test_look_ahead_predictors_read_an_earlier_activation(tiny_flash, text, tmp_path):
    options = CalibrationOptions(n_tokens=1280, rank=16, epochs=1, tap="attention_input", ahead=1)
    report = calibrate(tiny_flash("opt"), [text], tmp_path / "m.flash", options=options, engine=ENGINE)
    assert [p.tap for p in report.predictors] == [InputTap(layer=0, point="attention_input")] * 2
    assert all(p.measured.recall > 0.8 for p in report.predictors)


@pytest.mark.parametrize("target", [Target("recall", 0.9), Target("perplexity", 0.02)])
def test_a_silu_model_gets_low_bit_gates(tiny_flash, text, tmp_path, target):
    options = CalibrationOptions(n_tokens=1536, held_out=0.25, active_share=0.4, target=target)
    report = calibrate(tiny_flash("llama"), [text], tmp_path / "m.flash", options=options, engine=ENGINE)
    with flashfmt.open(tmp_path / "m.flash") as model:
        model.verify()
        for layer, predictor in enumerate(report.predictors):
            assert predictor.kind == "low_bit_gate"
            assert model.predictor(layer)[1]["gate"].encoding == "q4"
            assert predictor.measured.recall > 0.9
            share = model.statistics(layer)["firing_frequency"].mean()
            if target.metric == "recall":
                assert share == pytest.approx(0.4, abs=0.06)
    if target.metric == "perplexity":
        assert report.perplexity_cost < 0.1


def test_a_relu_model_takes_a_low_bit_gate_too(tiny_flash, text, tmp_path):
    options = CalibrationOptions(n_tokens=1280, kind="low_bit_gate")
    report = calibrate(tiny_flash("opt"), [text], tmp_path / "m.flash", options=options, engine=ENGINE)
    assert {(p.kind, p.threshold, p.signed) for p in report.predictors} == {("low_bit_gate", 0.0, True)}


def test_what_does_not_go_together_is_refused(tiny_flash, text, tmp_path, write_text):
    target = tmp_path / "m.flash"
    with pytest.raises(PromptError, match="silu gives no zeros"):
        calibrate(tiny_flash("llama"), [text], target, options=CalibrationOptions(kind="low_rank"), engine=ENGINE)
    with pytest.raises(PromptError, match="no such rank"):
        calibrate(tiny_flash("opt"), [text], target, options=CalibrationOptions(rank=65), engine=ENGINE)
    with pytest.raises(PromptError, match="too short"):
        calibrate(tiny_flash("opt"), [write_text(0, 20)], target, engine=ENGINE)
    target.write_bytes(b"precious")
    with pytest.raises(FlashWriteError, match="exists"):
        calibrate(tiny_flash("opt"), [text], target, options=QUICK, engine=ENGINE)
    assert target.read_bytes() == b"precious"


def test_a_calibrated_model_can_be_calibrated_again(calibrated, text, tmp_path):
    again = tmp_path / "again"
    report = calibrate(calibrated[0], [text], again, options=CalibrationOptions(n_tokens=768, epochs=0), engine=ENGINE)
    with flashfmt.open(again) as model:
        model.verify()
        assert model.container == "directory"
        assert model.manifest.predictors == report.predictors
