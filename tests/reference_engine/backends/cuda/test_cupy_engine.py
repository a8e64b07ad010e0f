"""The engine on a device against the CPU's: logits at every budget and encoding, the window's trace, its failures."""

import contextlib
import dataclasses

import numpy as np
import pytest

import reference_engine.engine as engine_module
from flashfmt.convert import convert
from flashfmt.errors import BudgetError, ChecksumError, PromptError
from reference_engine.calibration import CalibrationOptions, calibrate
from reference_engine.device_placement import CONTEXT_NBYTES
from reference_engine.engine import Engine, EngineOptions
from reference_engine.neuron_window import parse_window
from reference_engine.plan import MemoryPlan
from reference_engine.selectors import parse_selector
from reference_engine.sparse_mode import SparseOptions

IDS = np.random.default_rng(5).integers(0, 97, 9).tolist()
ROOM = CONTEXT_NBYTES + (64 << 20)


@pytest.fixture
def on_this_device(device, monkeypatch):
    """The engine meets the test's device where it would look for a GPU."""
    if device.name == "emulated":
        monkeypatch.setattr(device, "most", device.most)  # what a test sets ends with it
        monkeypatch.setattr(engine_module, "open_cuda_device", lambda: device)


@pytest.fixture(scope="module")
def calibrated(tiny_flash, write_text, tmp_path_factory):
    """A tiny OPT with predictors and statistics."""
    path = tmp_path_factory.mktemp("preloading") / "opt.flash"
    options = CalibrationOptions(n_tokens=1280, epochs=0, rank=8)
    engine = EngineOptions(memory=4 << 30, backend="numpy")
    calibrate(tiny_flash("opt"), [write_text(1, 1300)], path, options=options, engine=engine)
    return path


@contextlib.contextmanager
def loaded(path, **options):
    with Engine(path, EngineOptions(context_tokens=32, **options)) as engine:
        engine.load()
        yield engine


def logits(engine, ids=IDS):
    """Of a prompt, then of three tokens one by one."""
    session = engine.start()
    return np.concatenate([session.feed_all(ids), *(session.feed_all([token]) for token in (3, 1, 2))])


@pytest.mark.usefixtures("on_this_device")
@pytest.mark.parametrize("kind", ["plain", "gated"])
@pytest.mark.parametrize("encoding", ["f32", "f16", "bf16", "q8", "q4"])
def test_logits_are_those_of_the_cpu(synthetic, relative_error, kind, encoding):
    path = synthetic(kind, encoding, encoding)
    with loaded(path, memory=4 << 30, backend="numpy") as engine:
        expected = logits(engine)
    with loaded(path, device="cuda", vram=ROOM) as engine:
        assert isinstance(engine.plan, MemoryPlan)
        assert engine.plan.is_resident
        assert relative_error(logits(engine), expected) <= 1e-5


@pytest.mark.usefixtures("on_this_device")
@pytest.mark.parametrize("variant", ["opt_post_norm_projected", "llama_rope_yarn", "mistral", "qwen3", "smollm3"])
def test_architectures(tiny_checkpoint, tmp_path, relative_error, variant):
    source, oracle = tiny_checkpoint(variant)
    convert(source, tmp_path / "m.flash", encoding="f16", residents="f16")
    ids = np.random.default_rng(6).integers(3, oracle.config.vocab_size, 9).tolist()
    with loaded(tmp_path / "m.flash", memory=4 << 30, backend="numpy") as engine:
        expected = logits(engine, ids)
    with loaded(tmp_path / "m.flash", device="cuda", vram=ROOM, kv_type="f16") as engine:
        assert relative_error(logits(engine, ids), expected) <= 2e-3


@pytest.mark.usefixtures("on_this_device")
@pytest.mark.parametrize("residents", ["q8", "q4"])
def test_residents_are_re_encoded_as_on_the_cpu(synthetic, relative_error, residents):
    path = synthetic("gated", "f32", "f32")
    with loaded(path, memory=4 << 30, backend="numpy", residents=residents) as engine:
        expected = logits(engine)
    with loaded(path, device="cuda", vram=ROOM, residents=residents) as engine:
        assert str(engine.plan.fixed.resident_encoding) == residents
        assert relative_error(logits(engine), expected) <= 1e-4


@pytest.mark.usefixtures("on_this_device")
def test_same_bits_at_every_ceiling(synthetic, monkeypatch):
    monkeypatch.setattr("reference_engine.bundle_blocks.BLOCK_BYTES", 1 << 15)
    path = synthetic("plain", "f32")
    with Engine(path, EngineOptions(context_tokens=32, device="cuda", vram=ROOM)) as engine:
        floor = engine.plan.floor
        engine.load()
        expected = logits(engine)
    for ceiling in (floor, floor + (150 << 10)):
        with loaded(path, device="cuda", vram=ceiling) as engine:
            assert not engine.plan.is_resident
            assert np.array_equal(logits(engine), expected)
            broken_off = engine.stack._bundles.blocks(0, None)
            next(broken_off)
            broken_off.close()
            assert np.array_equal(logits(engine), expected)
            assert engine.counters().bytes_read > 0
    with pytest.raises(BudgetError, match="smallest"):
        Engine(path, EngineOptions(context_tokens=32, device="cuda", vram=floor - 1))


def cpu_and_device_traces(path, sparse, *, vram, **device_options):
    """Logits and, for every pass and layer, (active, hits, missing, evicted) of both engines in as many slots."""
    results = []
    device = Engine(path, EngineOptions(context_tokens=32, device="cuda", vram=vram, sparse=sparse, **device_options))
    capacities = device.plan.capacities
    cpu = Engine(path, EngineOptions(context_tokens=32, backend="numpy", sparse=sparse))
    object.__setattr__(cpu.plan, "capacities", capacities)
    for engine in (cpu, device):
        with engine:
            records = []
            engine.load()
            engine.sparse.watch(records.append)
            values = logits(engine)
            results.append((values, records))
            n_from_tier = getattr(engine.sparse, "n_from_tier", 0)
    return *results, n_from_tier


@pytest.mark.usefixtures("on_this_device")
@pytest.mark.parametrize("selector", ["lowbit:q8:0.001", "lowbit:q8:0.001@previous", "all"])
@pytest.mark.parametrize("window", ["lru", "paper:2"])
@pytest.mark.parametrize("tier", [0, 1 << 16, 1 << 22])
def test_windows_and_logits_are_those_of_the_cpu(synthetic, relative_error, monkeypatch, selector, window, tier):
    path = synthetic("plain", "f16")
    sparse = SparseOptions(parse_selector(selector), window=parse_window(window))
    monkeypatch.setattr("reference_engine.sparse_plan.MIN_SLOTS", 100)
    with Engine(path, EngineOptions(context_tokens=32, device="cuda", vram=ROOM, sparse=sparse)) as probe:
        floor = probe.plan.floor
    (expected, cpu), (actual, gpu), n_from_tier = cpu_and_device_traces(path, sparse, vram=floor, host_memory=tier)
    assert relative_error(actual, expected) <= 1e-4
    n_saved = 0
    for one, other in zip(cpu, gpu, strict=True):
        for a, b in zip(one.layers, other.layers, strict=True):
            assert np.array_equal(a.active, b.active)
            assert a.figures.n_evicted == b.figures.n_evicted
            assert a.figures.n_hits == b.figures.n_hits
            n_saved += a.figures.n_missing - b.figures.n_missing
    assert n_saved == n_from_tier
    if tier != 1 << 16 or selector != "all":  # a scan of everything outruns a small tier
        assert bool(n_from_tier) == bool(tier)


@pytest.mark.usefixtures("on_this_device")
@pytest.mark.parametrize("sparse", [None, SparseOptions(parse_selector("all"), window=parse_window("lru"))])
def test_a_damaged_bundle_is_named_and_the_rest_goes_on(synthetic, tmp_path, sparse):
    path = tmp_path / "m.flash"
    data = bytearray(synthetic("plain", "f16").read_bytes())
    with Engine(synthetic("plain", "f16"), EngineOptions(context_tokens=32, backend="numpy")) as engine:
        info = engine.model.layers[1]
    data[info.extent.offset + 300 * info.geometry.stride + 5] ^= 0x40
    path.write_bytes(data)
    with Engine(path, EngineOptions(context_tokens=32, device="cuda", vram=ROOM, sparse=sparse)) as engine:
        if sparse is None:
            with pytest.raises(ChecksumError, match="layer 1, neuron 300"):
                engine.load()
            return
        engine.load()
        for _ in range(2):
            with pytest.raises(ChecksumError, match="layer 1, neuron 300"):
                engine.start().feed([1])


@pytest.mark.usefixtures("on_this_device")
def test_what_cannot_be_done_is_refused_before_loading(synthetic, device):
    path = synthetic("plain", "f16")
    if device.name == "emulated":
        with pytest.raises(BudgetError, match="free"):
            Engine(path, EngineOptions(device="cuda", vram=1 << 50))
    for options in (
        {"device": "cuda", "host_memory": 1 << 20},
        {"device": "cpu", "vram": 1 << 30},
    ):
        with pytest.raises(PromptError):
            Engine(path, EngineOptions(**options))
    with pytest.raises(BudgetError, match="DRAM"):
        Engine(path, EngineOptions(device="cuda", vram=ROOM, memory=1 << 20))
    sparse = SparseOptions(parse_selector("lowbit:q8@previous"), prefetch=parse_selector("lowbit:q4"))
    with (
        Engine(path, EngineOptions(device="cuda", sparse=sparse)) as engine,
        pytest.raises(PromptError, match="prefetching"),
    ):
        engine.load()


@pytest.mark.usefixtures("on_this_device")
@pytest.mark.parametrize("kind", ["plain", "gated"])
@pytest.mark.parametrize("selector", ["threshold:0.02", "oracle", "oracle:0.01", "threshold:0.02@attention_input"])
def test_selectors_that_compute_are_those_of_the_cpu(synthetic, relative_error, kind, selector):
    sparse = SparseOptions(parse_selector(selector), window=parse_window("lru"))
    (expected, cpu), (actual, gpu), _ = cpu_and_device_traces(synthetic(kind, "f32"), sparse, vram=ROOM)
    assert relative_error(actual, expected) <= 1e-4
    n_active = 0
    for one, other in zip(cpu, gpu, strict=True):
        for a, b in zip(one.layers, other.layers, strict=True):
            assert len(np.setxor1d(a.active, b.active)) <= 2  # values that are the threshold but for rounding
            n_active += len(a.active)
    assert n_active > 0


@pytest.mark.usefixtures("on_this_device")
@pytest.mark.parametrize("tier", [0, 1 << 16])
@pytest.mark.parametrize("hint", ["lowbit:q8:0.001@previous", "lowbit:q4:0.2@attention_input", "all"])
@pytest.mark.parametrize("overlap", [True, False])
def test_what_is_read_ahead_decides_nothing(synthetic, relative_error, monkeypatch, tier, hint, overlap):
    path = synthetic("plain", "f16")
    monkeypatch.setattr("reference_engine.sparse_plan.MIN_SLOTS", 400)
    monkeypatch.setattr("reference_engine.device_layer.GROUP_BUNDLES", 16)  # more groups than buffers
    sparse = SparseOptions(
        parse_selector("lowbit:q8:0.001"), parse_selector(hint), window=parse_window("lru"), overlap=overlap
    )
    with Engine(path, EngineOptions(context_tokens=32, device="cuda", vram=ROOM, sparse=sparse)) as probe:
        floor = probe.plan.floor
    (expected, cpu), (actual, gpu), _ = cpu_and_device_traces(path, sparse, vram=floor, host_memory=tier)
    assert relative_error(actual, expected) <= 1e-4
    for one, other in zip(cpu, gpu, strict=True):
        for a, b in zip(one.layers, other.layers, strict=True):
            assert np.array_equal(a.active, b.active)
            assert b.figures.n_hits + b.figures.n_missing <= b.figures.n_active
    if hint != "all":
        assert sum(step.figures.n_prefetched for record in gpu for step in record.layers) > 0


@pytest.mark.usefixtures("on_this_device")
def test_slots_begin_with_the_neurons_that_fire_most(calibrated):
    sparse = SparseOptions(parse_selector("file"), window=parse_window("lru"))
    hits = {}
    for preload in (False, True):
        options = EngineOptions(device="cuda", vram=ROOM, sparse=dataclasses.replace(sparse, preload=preload))
        with Engine(calibrated, options) as engine:
            seen, passes = [], []
            announced = engine.load_nbytes
            engine.load(seen.append)
            assert abs(sum(seen) - announced) <= 4096 * len(seen)
            engine.sparse.watch(passes.append)
            engine.start().feed([5])
            hits[preload] = sum(step.figures.n_hits for step in passes[0].layers)
            n_active = sum(step.figures.n_active for step in passes[0].layers)
    assert hits[False] == 0
    assert hits[True] > 0.6 * n_active
