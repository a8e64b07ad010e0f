"""The rows of an ablation: what each reads, in which order they come, and that their figures add up."""

import dataclasses

import numpy as np
import pytest

import flashfmt
from flashfmt.encodings import Encoding
from flashfmt.errors import FlashError
from reference_engine import engine as engine_module
from reference_engine.bench.ablation import ROW_NAMES
from reference_engine.bench.bundle_readers import Clock, timed
from reference_engine.bench.naive import NaiveModel
from reference_engine.bench.perform import Ceiling, Request, perform
from reference_engine.engine import Engine, EngineOptions
from reference_engine.neuron_window import DEFAULT_WINDOW
from reference_engine.sparse_mode import bundle_opener

PLENTY = 8 << 30


def request(**changes):
    values = {
        "options": EngineOptions(verify="never"),
        "ceiling": Ceiling(PLENTY),
        "window": DEFAULT_WINDOW,
        "prompt_tokens": 1,
        "n_tokens": 4,
        "seconds": 1e6,
        "rows": ROW_NAMES,
        "with_activity": True,
    }
    return Request(**{**values, **changes})


def no_progress(*_):
    """Takes progress."""


@pytest.fixture(scope="module")
def report(small_files):
    return perform(request(floor_seconds=0.01), small_files, Encoding.F16, no_progress)


@pytest.fixture(scope="module")
def rows(report):
    return {row.name: row for row in report.rows}


def test_all_rows_come_in_order(report):
    assert tuple(row.name for row in report.rows) == ROW_NAMES
    assert all(row.run.n_tokens == 4 for row in report.rows)
    assert report.notes == ()


def test_naive_reads_everything_and_keeps_nothing(rows, small_files):
    with flashfmt.open(small_files.path(Encoding.F16)) as model:
        bundles = sum(info.geometry.index_offset for info in model.layers)
        matrices = sum(
            info.extent.nbytes
            for info in model.tensors.values()
            if len(info.shape) == 2 and "predictor" not in info.name and info.name != "embedding/positions"
        )
    naive = rows["naive"]
    assert bundles + matrices <= naive.run.bytes_per_token < 1.01 * (bundles + matrices)
    assert naive.kept_bytes == 0
    assert rows["attention"].run.bytes_per_token == bundles
    assert rows["attention"].kept_bytes >= matrices


def test_without_a_window_every_active_neuron_is_read(rows):
    costs = rows["predictor"].run.costs
    assert costs.n_hits == 0
    assert costs.n_missing == costs.n_active
    assert costs.bytes_read == costs.n_missing * 2 * 2 * 2048
    assert rows["predictor"].kept_bytes > rows["attention"].kept_bytes


def test_the_window_reads_less(rows):
    assert rows["window"].run.costs.n_missing < rows["predictor"].run.costs.n_missing / 2
    assert rows["window"].kept_bytes > rows["predictor"].kept_bytes


def test_bundling_reads_the_same_bytes_in_half_the_requests(rows):
    window, bundling = rows["window"].run.costs, rows["bundling"].run.costs
    assert bundling.bytes_read == window.bytes_read > 0
    assert window.n_requests == 2 * window.n_missing
    assert bundling.n_requests <= window.n_requests / 2


def test_overlap_changes_nothing_but_time(rows):
    own, overlap, ahead = (rows[name].run.costs for name in ("own_window", "overlap", "look_ahead"))
    for name in ("n_active", "n_hits", "n_missing"):
        assert getattr(own, name) == getattr(overlap, name) == getattr(ahead, name)
    assert rows["own_window"].bytes_per_second is not None
    assert rows["overlap"].bytes_per_second is None


def test_fewer_bits_are_fewer_bytes(rows):
    missing = [rows[name].run.costs.n_missing for name in ("look_ahead", "q8", "q4")]
    read = [rows[name].floor.read_bytes for name in ("look_ahead", "q8", "q4")]
    assert missing[0] == missing[1] == missing[2]
    assert read[0] > read[1] > read[2] > 0
    assert [rows[name].encoding for name in ("look_ahead", "q8", "q4")] == ["f16", "q8", "q4"]


def test_narrow_residents_keep_and_touch_less(rows):
    q4, narrow = rows["q4"], rows["q8_residents"]
    assert narrow.encoding == q4.encoding
    assert narrow.run.costs.n_missing == q4.run.costs.n_missing
    assert narrow.kept_bytes < q4.kept_bytes
    assert narrow.floor.memory_bytes < q4.floor.memory_bytes
    assert narrow.run.plan["resident_encoding"] == "q8"


def test_the_parts_of_a_token_s_time_add_up(report):
    for row in report.rows:
        total = row.run.seconds_per_token
        assert row.io_seconds + row.upkeep_seconds + row.compute_seconds == pytest.approx(total)
        assert sum(row.run.split().values()) == pytest.approx(total)
        assert all(part >= 0 for part in row.run.split().values())


def test_the_floor_is_the_longer_of_reading_and_memory(report):
    for row in report.rows:
        floor = row.floor.as_dict(row.run.seconds_per_token)
        assert floor["floor_seconds"] == max(floor["read_seconds"], floor["memory_seconds"]) > 0
        assert floor["measured_over_floor"] == pytest.approx(row.run.seconds_per_token / floor["floor_seconds"])
        assert floor["pattern"] == ("sequential" if row.name in ("naive", "attention") else "random")


def test_reading_everything_gives_the_logits_of_exact_mode(small_files):
    path, ids = small_files.path(Encoding.F16), [5, 6, 7]
    with Engine(path, EngineOptions(memory=PLENTY, context_tokens=16)) as engine:
        engine.load()
        session = engine.start()
        expected = [session.feed([token]) for token in ids]
    with flashfmt.open(path) as model:
        opener = bundle_opener(model)
    naive = NaiveModel(path, EngineOptions(context_tokens=16), timed(opener, Clock()))
    try:
        for token, logits in zip(ids, expected, strict=True):
            np.testing.assert_allclose(naive.feed([token]), logits, rtol=1e-5, atol=1e-5 * np.abs(logits).max())
    finally:
        naive.close()


def test_some_rows_can_be_asked_for(small_files):
    report = perform(request(rows=["overlap", "naive"], n_tokens=2), small_files, Encoding.F16, no_progress)
    assert [row.name for row in report.rows] == ["naive", "overlap"]
    assert report.rows[0].floor is None


def test_a_model_of_one_s_own_runs_what_it_can(small_files):
    wanted = request(rows=["bundling", "look_ahead", "q8"], with_activity=False, n_tokens=2)
    report = perform(wanted, small_files.path(Encoding.F16), Encoding.F16, no_progress)
    assert [row.name for row in report.rows] == ["bundling"]
    assert report.rows[0].run.costs.n_active > 0
    assert len(report.notes) == 2
    assert "--prefetch" in report.notes[0]


def test_a_ceiling_without_room_for_a_window_is_noted(small_files, monkeypatch):
    plan_sparse_mode = engine_module.plan_sparse_mode

    def small(*args):
        plan = plan_sparse_mode(*args)
        return dataclasses.replace(plan, capacities=(16,) * len(plan.capacities))

    monkeypatch.setattr(engine_module, "plan_sparse_mode", small)
    report = perform(request(rows=["predictor", "window"], n_tokens=2), small_files, Encoding.F16, no_progress)
    assert len(report.notes) == 1
    assert "fewer than a token uses" in report.notes[0]


def test_a_context_that_is_too_short_is_refused_at_once(small_files):
    with pytest.raises(FlashError, match="do not fit in the context"):
        perform(request(n_tokens=500), small_files, Encoding.F16, no_progress)
