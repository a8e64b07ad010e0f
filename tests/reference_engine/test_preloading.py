"""Slots filled before the first token: which neurons, what is announced, and that nothing else changes."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfmt.errors import ChecksumError
from reference_engine.calibration import CalibrationOptions, calibrate
from reference_engine.engine import Engine, EngineOptions
from reference_engine.neuron_window import parse_window
from reference_engine.preloading import likely_tokens
from reference_engine.selectors import parse_selector
from reference_engine.sparse_mode import SparseOptions

FREQUENCIES = st.lists(st.sampled_from([0.0, 0.001, 0.2, 0.5, 0.97, 1.0]), min_size=1, max_size=40)


@settings(max_examples=30, deadline=None)
@given(frequency=FREQUENCIES, capacity=st.integers(1, 40))
def test_the_most_frequent_neurons_are_shown_as_often_as_they_fire(frequency, capacity):
    first, *others = likely_tokens(np.array(frequency, np.float32), capacity)
    assert len(first) == min(capacity, np.count_nonzero(frequency))
    left_out = np.setdiff1d(np.arange(len(frequency)), first)
    assert len(left_out) == 0 or np.array(frequency)[left_out].max() <= min((frequency[i] for i in first), default=0)
    for neuron in first.tolist():
        shown = np.mean([neuron in token for token in others])
        assert shown == pytest.approx(frequency[neuron], abs=1 / 64 + 1e-6)


@pytest.mark.parametrize("rule", ["lru", "frequency:64"])
def test_the_least_frequent_leave_first(rule):
    frequency = np.array([0.9, 0.1, 0.5, 0.3, 0.0])
    window = parse_window(rule).build(5, 4)
    for active in likely_tokens(frequency, 4):
        window.step(active)
    assert window.held().tolist() == [0, 1, 2, 3]
    assert window.step(np.array([4], np.int32)).evicted.tolist() == [1]


@pytest.fixture(scope="module")
def calibrated(tiny_flash, write_text, tmp_path_factory):
    """A tiny OPT with predictors and statistics."""
    path = tmp_path_factory.mktemp("preloading") / "opt.flash"
    options = CalibrationOptions(n_tokens=1280, epochs=0, rank=8)
    calibrate(tiny_flash("opt"), [write_text(1, 1300)], path, options=options, engine=options_of(sparse=None))
    return path


def options_of(sparse):
    return EngineOptions(memory=4 << 30, backend="numpy", sparse=sparse)


def run(path, *, preload, window="lru", n_slots=None):
    """Logits of some tokens, figures of the first of them, bytes announced and reported while loading."""
    sparse = SparseOptions(parse_selector("file"), window=parse_window(window), preload=preload)
    with Engine(path, options_of(sparse)) as engine:
        if n_slots is not None:
            engine.plan = dataclasses.replace(engine.plan, capacities=(n_slots,) * len(engine.plan.capacities))
        seen = []
        announced = engine.load_nbytes
        engine.load(seen.append)
        passes = []
        engine.sparse.watch(passes.append)
        session = engine.start()
        logits = np.stack([session.feed([token]) for token in (5, 9, 7, 5)])
        first = [step.figures for step in passes[0].layers]
        return logits, first, announced, seen


@pytest.mark.parametrize("window", ["lru", "frequency", "paper:2"])
@pytest.mark.parametrize("n_slots", [90, None])
def test_the_first_token_finds_more_and_computes_the_same(calibrated, window, n_slots):
    cold, cold_figures, _, _ = run(calibrated, preload=False, window=window, n_slots=n_slots)
    warm, warm_figures, _, _ = run(calibrated, preload=True, window=window, n_slots=n_slots)
    np.testing.assert_allclose(warm, cold, rtol=1e-4, atol=1e-5)
    assert [f.n_active for f in warm_figures] == [f.n_active for f in cold_figures]
    assert sum(f.n_hits for f in cold_figures) == 0
    hits, active = sum(f.n_hits for f in warm_figures), sum(f.n_active for f in warm_figures)
    assert hits > (0 if window == "paper:2" else 0.6 * active)


@pytest.mark.parametrize("window", ["lru", "paper:2"])
def test_loading_reports_what_it_announced(calibrated, window):
    for preload in (False, True):
        _, _, announced, seen = run(calibrated, preload=preload, window=window, n_slots=90)
        assert abs(sum(seen) - announced) <= 4096 * len(seen)


def test_a_damaged_bundle_is_found_while_loading(calibrated, tmp_path):
    copy = tmp_path / "damaged.flash"
    copy.write_bytes(calibrated.read_bytes())
    with Engine(copy, options_of(SparseOptions(parse_selector("file")))) as engine:
        info = engine.model.layers[1]
        frequency = engine.model.statistics(1)["firing_frequency"]
        neuron = int(np.argmax(frequency))
        with open(copy, "r+b") as file:
            file.seek(info.extent.offset + neuron * info.geometry.stride)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))
        with pytest.raises(ChecksumError, match=f"layer 1, neuron {neuron}"):
            engine.load()
