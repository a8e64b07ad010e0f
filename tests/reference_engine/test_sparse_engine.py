"""Sparse mode end to end: the same output as exact mode under the oracle, at every budget, window and look-ahead."""

import dataclasses
import os
from functools import partial

import numpy as np
import pytest

from flashfmt.convert import convert
from flashfmt.errors import BudgetError, ChecksumError, FlashReadError, PromptError
from reference_engine import engine as engine_module
from reference_engine.activity_trace import TraceHeader, TraceWriter
from reference_engine.engine import Engine, EngineOptions
from reference_engine.flash_io import IoTuning, open_reader
from reference_engine.layer_bundles import Fetch
from reference_engine.neuron_window import parse_window
from reference_engine.selectors import parse_selector
from reference_engine.sparse_mode import SparseOptions

PLENTY = 8 << 30
N_PROMPT = 150
N_NEW = 6


@pytest.fixture(scope="module")
def relu_opt(tiny_checkpoint, tmp_path_factory):
    """A converted tiny OPT: ReLU, so that about half of its neurons are exactly zero."""
    pytest.importorskip("transformers")
    source, _ = tiny_checkpoint("opt")
    path = tmp_path_factory.mktemp("sparse") / "opt.flash"
    convert(source, path, encoding="f32", residents="f32")
    return path


@pytest.fixture
def slots(monkeypatch):
    """A function that makes the planner give every layer so many slots, whatever the ceiling."""

    def fix(n):
        plan_sparse_mode = engine_module.plan_sparse_mode

        def plan(*args):
            plan = plan_sparse_mode(*args)
            return dataclasses.replace(plan, capacities=(n,) * len(plan.capacities))

        monkeypatch.setattr(engine_module, "plan_sparse_mode", plan)

    return fix


def options(selector, window="lru", prefetch=None, reader=None, **others):
    sparse = SparseOptions(
        parse_selector(selector),
        prefetch=None if prefetch is None else parse_selector(prefetch),
        window=parse_window(window),
        open_reader=reader,
    )
    return EngineOptions(memory=PLENTY, sparse=sparse, **others)


def prompt_for(engine, n=N_PROMPT):
    n = min(n, engine.context_tokens - N_NEW)
    return np.random.default_rng(7).integers(3, engine.vocab_size, n).tolist()


def logits(path, engine_options):
    """Logits behind a prompt in chunks, then token by token, and the figures of the run."""
    with Engine(path, engine_options) as engine:
        engine.load()
        session = engine.start()
        ids = prompt_for(engine)
        rows = [session.feed(ids)] + [session.feed([token]) for token in ids[:N_NEW]]
        return np.stack(rows), engine.sparse and engine.sparse.totals


def close(a, b, tolerance):
    return np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.fixture(scope="module")
def dense(relu_opt, synthetic):
    """Logits of exact mode, by file."""
    known = {}

    def compute(path):
        if path not in known:
            known[path] = logits(path, EngineOptions(memory=PLENTY))[0]
        return known[path]

    return compute


@pytest.mark.parametrize("n_slots", [20, 60, 128])
@pytest.mark.parametrize("window", ["paper:1", "paper:3", "lru"])
def test_under_the_oracle_output_is_that_of_exact_mode(relu_opt, dense, slots, n_slots, window):
    slots(n_slots)
    sparse, totals = logits(relu_opt, options("oracle", window))
    assert close(sparse, dense(relu_opt), 1e-4)
    assert 0 < totals.total("n_active") < totals.n_passes * 2 * 128


@pytest.mark.parametrize("selector", ["oracle", "threshold:0", "all"])
@pytest.mark.parametrize(("kind", "encoding"), [("plain", "q8"), ("plain", "q4"), ("gated", "f16"), ("gated", "q4")])
def test_nothing_is_lost_in_any_encoding(synthetic, dense, slots, selector, kind, encoding):
    slots(70)
    path = synthetic(kind, encoding, encoding)
    assert close(logits(path, options(selector))[0], dense(path), 1e-4)


@pytest.mark.parametrize("container", ["file", "directory"])
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_containers_and_backends_agree(synthetic, dense, container, backend):
    path = synthetic("plain", "f32", "f32", container)
    assert close(logits(path, options("oracle", backend=backend))[0], dense(path), 1e-4)


@pytest.mark.parametrize("selector", ["lowbit:q4", "threshold:0.05@attention_input", "oracle:0.02@previous"])
def test_the_window_changes_what_is_read_and_not_what_comes_out(relu_opt, slots, selector):
    infinite, held = logits(relu_opt, options(selector, "lru"))
    slots(100)
    one, read_again = logits(relu_opt, options(selector, "paper:1"))
    assert close(one, infinite, 1e-5)
    assert read_again.total("n_missing") > held.total("n_missing")


@pytest.mark.parametrize("prefetch", ["oracle@previous", "oracle@attention_output", "lowbit:q4@attention_input"])
@pytest.mark.parametrize("n_slots", [30, 128])
def test_a_hint_reads_ahead_and_decides_nothing(relu_opt, dense, slots, prefetch, n_slots):
    slots(n_slots)
    sparse, totals = logits(relu_opt, options("oracle", "paper:2", prefetch))
    assert close(sparse, dense(relu_opt), 1e-4)
    assert n_slots == 30 or totals.total("n_prefetched") > 0


def test_reads_ahead_go_on_while_attention_is_computed(relu_opt, dense, slots, monkeypatch):
    """More is wanted than the queue takes at once: the rest is pushed in between, not when the layer's turn comes."""
    slots(128)
    carried = []

    def carry_on(fetch):
        real(fetch)
        carried.append(len(fetch.missing))

    real, tuning = Fetch.carry_on, IoTuning(depth=2)
    monkeypatch.setattr(Fetch, "carry_on", carry_on)
    reader = partial(open_reader, tuning=tuning, range_alignment=512)
    ahead, _ = logits(relu_opt, options("oracle", "paper:1", "oracle@previous", reader))
    assert close(ahead, dense(relu_opt), 1e-4)
    assert len(carried) >= N_NEW
    assert max(carried) > tuning.depth
    carried.clear()
    logits(relu_opt, options("oracle", "paper:1", reader=reader))
    assert not carried


def test_what_is_needed_often_stays_though_not_all_of_a_token_fits(relu_opt, dense, slots):
    """Half as many slots as neurons, all of them active: every token may find what the slots held."""
    slots(64)
    sparse, totals = logits(relu_opt, options("all", "frequency:64"))
    assert close(sparse, dense(relu_opt), 1e-4)
    n_layers, n_active = 2, 128
    later = (totals.n_passes - 1) * n_layers
    assert totals.total("n_active") == (later + n_layers) * n_active
    assert totals.total("n_hits") + totals.total("n_missing") == totals.total("n_active")
    assert totals.total("n_hits") >= later * 32


def test_figures_add_up(relu_opt, slots):
    slots(128)
    with Engine(relu_opt, options("oracle", "paper:2")) as engine:
        engine.load()
        records = []
        engine.sparse.watch(records.append)
        session = engine.start()
        session.feed(prompt_for(engine, 9))
        for token in (5, 6, 7):
            session.feed([token])
        counters, totals = engine.sparse.counters, engine.sparse.totals
    assert [record.n_tokens for record in records] == [9, 1, 1, 1]
    for record in records:
        assert len(record.layers) == 2
        for step in record.layers:
            f = step.figures
            assert f.n_active == len(step.active) == f.n_hits + f.n_missing
            assert (f.n_missing == 0) == (f.bytes_read == 0)
            assert 0 <= f.n_requests <= f.n_missing
            assert f.compute_seconds > 0
            assert f.upkeep_seconds > 0
    assert records[0].layers[0].figures.n_hits == 0
    assert totals.total("bytes_read") == counters.bytes_read
    assert totals.total("n_missing") == sum(s.figures.n_missing for r in records for s in r.layers)
    assert 0 < totals.hit_rate < 1


def test_a_recorded_run_can_be_replayed(relu_opt, tmp_path):
    trace = tmp_path / "trace.jsonl"
    with Engine(relu_opt, options("oracle")) as engine:
        engine.load()
        ffn = engine.model.decoder.ffn
        with TraceWriter(trace, TraceHeader("tiny", 2, ffn.d_ff)) as writer:
            engine.sparse.watch(lambda r: writer.write(r.n_tokens, [(s.active, s.figures.as_dict()) for s in r.layers]))
            recorded = engine.start().feed(prompt_for(engine, 20))
    with Engine(relu_opt, options(f"trace:{trace}")) as engine:
        engine.load()
        session = engine.start()
        np.testing.assert_array_equal(session.feed(prompt_for(engine, 20)), recorded)
        with pytest.raises(PromptError, match="no more tokens"):
            session.feed([5])


class FailingReader:
    """A reader whose reads fail while `broken` says so."""

    broken = False

    def __init__(self, reader):
        self._reader = reader

    def __getattr__(self, name):
        return getattr(self._reader, name)

    def submit(self, offsets, nbytes, buffer, positions, *, ahead=False):
        pending = self._reader.submit(offsets, nbytes, buffer, positions, ahead=ahead)
        if FailingReader.broken and len(offsets):
            pending.wait()
            pending._error = FlashReadError("read failed: Input/output error", where=int(offsets[-1]))
        return pending


@pytest.mark.parametrize("selector", ["oracle", "oracle@attention_input"])
def test_after_a_device_error_the_session_goes_on_as_if_nothing_had_been(relu_opt, slots, monkeypatch, selector):
    slots(100)

    def reader(path):
        return FailingReader(open_reader(path, range_alignment=512))

    with Engine(relu_opt, options(selector, "paper:1", reader=reader)) as engine:
        engine.load()
        session = engine.start()
        ids = prompt_for(engine, 9)
        session.feed(ids)
        layer = engine.model.layers[0]
        monkeypatch.setattr(FailingReader, "broken", True)
        for _ in range(2):
            with pytest.raises(FlashReadError, match=r"layer 0, neuron \d+ cannot be read.*Input/output") as caught:
                session.feed([5])
            assert (caught.value.where - layer.extent.offset) % layer.geometry.stride == 0
            assert session.n_tokens == 9
        monkeypatch.setattr(FailingReader, "broken", False)
        after = session.feed([5])
    with Engine(relu_opt, options(selector, "paper:1")) as engine:
        engine.load()
        session = engine.start()
        session.feed(ids)
        assert close(after, session.feed([5]), 1e-5)


def damaged_copy(path, tmp_path):
    copy = tmp_path / "damaged.flash"
    copy.write_bytes(path.read_bytes())
    return copy


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
        file.flush()
        os.fsync(file.fileno())


@pytest.mark.parametrize("verify", ["first", "always"])
def test_a_flipped_byte_is_found_when_the_bundle_arrives(relu_opt, tmp_path, verify):
    path = damaged_copy(relu_opt, tmp_path)
    with Engine(path, options("all", verify=verify)) as engine:
        engine.load()
        info = engine.model.layers[1]
        place = info.extent.offset + 77 * info.geometry.stride
        flip(path, place + 3)
        session = engine.start()
        for _ in range(2):
            with pytest.raises(ChecksumError, match="layer 1, neuron 77") as caught:
                session.feed([5, 6])
            assert caught.value.where == place
            assert session.n_tokens == 0
        flip(path, place + 3)
        healed = session.feed([5, 6])
    with Engine(relu_opt, EngineOptions(memory=PLENTY)) as engine:
        engine.load()
        assert close(healed, engine.start().feed([5, 6]), 1e-5)


def test_a_file_that_ends_early_is_a_read_error(relu_opt, tmp_path):
    path = damaged_copy(relu_opt, tmp_path)
    with Engine(path, options("all")) as engine:
        engine.load()
        info = engine.model.layers[1]
        end = info.extent.offset + 8 * 4096
        os.truncate(path, end)
        session = engine.start()
        with pytest.raises(FlashReadError, match="layer 1, neuron"):
            session.feed([5])
        assert session.n_tokens == 0


def test_a_ceiling_below_the_floor_is_refused_with_the_floor(relu_opt):
    with pytest.raises(BudgetError, match=r"smallest that works is \d+ MiB"):
        Engine(relu_opt, dataclasses.replace(options("oracle"), memory=1 << 20))


@pytest.mark.parametrize(
    ("selector", "prefetch", "message"),
    [
        ("file", None, "carries no predictors"),
        ("threshold:0@previous", "oracle", "looks at the FFN input itself"),
    ],
)
def test_selectors_that_do_not_go_together(relu_opt, selector, prefetch, message):
    with pytest.raises(PromptError, match=message), Engine(relu_opt, options(selector, prefetch=prefetch)) as engine:
        engine.load()


def test_loading_reports_the_bytes_it_announced(relu_opt):
    with Engine(relu_opt, options("oracle", prefetch="lowbit:q8@previous")) as engine:
        seen = []
        engine.load(seen.append)
        assert abs(sum(seen) - engine.load_nbytes) <= 4096 * len(seen)
