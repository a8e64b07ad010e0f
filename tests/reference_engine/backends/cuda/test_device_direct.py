"""Reads straight to the device's slots against those that land on the host, and which of the two is chosen."""

import dataclasses
import os
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import flashfmt
import reference_engine.device_ways as device_ways
from flashfmt.errors import ChecksumError, FlashError, FlashReadError, MissingExtraError
from reference_engine.device_direct import SlotReader, load_kvikio
from reference_engine.device_landing import LandingRing
from reference_engine.device_layer import DeviceLayer
from reference_engine.device_ways import choose_way, measure_ways
from reference_engine.engine import Engine, EngineOptions
from reference_engine.neuron_window import parse_window
from reference_engine.plan import MemoryPlan
from reference_engine.selectors import parse_selector
from reference_engine.sparse_mode import SparseOptions, bundle_opener

N_SLOTS = 120


class Kvikio(types.ModuleType):
    """Stands in for kvikio on the emulated device: threads that read into the host's memory, late where asked to be.

    Attributes
    ----------
    damaged : file offsets whose reads fail, by how: an exception of `get`, of `pread`, or fewer bytes.
    """

    def __init__(self):
        super().__init__("kvikio")
        self.defaults = types.ModuleType("kvikio.defaults")
        self.defaults.settings = {}
        self.defaults.set = self.defaults.settings.update
        self.defaults.is_compat_mode_preferred = lambda: False
        self.pool = ThreadPoolExecutor(4)
        self.damaged = {}
        self.in_flight = self.n_reads = self.n_open = 0
        self.before_read = lambda: None

    def CuFile(self, file, flags="r"):
        assert flags == "r"
        return CuFile(self, os.open(file, os.O_RDONLY))


class CuFile:
    def __init__(self, kvikio, fd):
        self.kvikio, self.fd = kvikio, fd
        kvikio.n_open += 1

    def pread(self, buf, size=None, file_offset=0, task_size=None):
        kvikio = self.kvikio
        how = kvikio.damaged.get(file_offset)
        if how == "pread":
            raise RuntimeError("no such pointer")
        assert buf.nbytes == size
        assert buf.flags.c_contiguous
        kvikio.n_reads += 1
        kvikio.in_flight += 1

        def read():
            kvikio.before_read()
            if how == "get":
                raise RuntimeError("cuFile error: 5005")
            data = os.pread(self.fd, size - (1 if how == "short" else 0), file_offset)
            buf[: len(data)] = np.frombuffer(data, np.uint8)
            return len(data)

        return IOFuture(kvikio, kvikio.pool.submit(read))

    def close(self):
        assert not self.kvikio.in_flight
        self.kvikio.n_open -= 1
        os.close(self.fd)


class IOFuture:
    def __init__(self, kvikio, future):
        self.kvikio, self.future = kvikio, future

    def get(self):
        assert self.future is not None, "a future's result can be taken but once"
        future, self.future = self.future, None
        try:
            return future.result()
        finally:
            self.kvikio.in_flight -= 1


@pytest.fixture
def kvikio(device, monkeypatch):
    if device.name != "emulated":
        pytest.skip("stands in for kvikio where memory is the host's")
    module = Kvikio()
    monkeypatch.setitem(sys.modules, "kvikio", module)
    monkeypatch.setitem(sys.modules, "kvikio.defaults", module.defaults)
    yield module
    module.pool.shutdown()
    assert module.in_flight == module.n_open == 0


@pytest.fixture
def make_layer(device, kvikio, synthetic):
    """A function (verify, direct=True, n_tier=0) -> a layer of a synthetic model."""
    readers = []
    with flashfmt.open(synthetic("plain", "f16")) as model:
        info = model.layers[1]

        def make(verify, direct=True, n_tier=0):
            reader = bundle_opener(model)(info.extent.path)
            readers.append(reader)
            if direct:
                readers.append(SlotReader(kvikio, info.extent.path))
            return DeviceLayer(
                info,
                device,
                LandingRing(device, 4, 16 * info.geometry.stride),
                window=parse_window("lru").build(info.geometry.n_neurons, N_SLOTS),
                n_slots=N_SLOTS,
                n_tier_slots=n_tier,
                checksums=model.bundles(1).checksums,
                verify=verify,
                reader=reader,
                direct=readers[-1] if direct else None,
            )

        yield make
        for reader in readers:
            reader.close()


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr("reference_engine.device_layer.GROUP_BUNDLES", 16)


def stored(info):
    """Every bundle of a layer as it lies in the file, uint8 [n_neurons, stride]."""
    n_neurons, stride = info.geometry.n_neurons, info.geometry.stride
    data = np.fromfile(info.extent.path, np.uint8, n_neurons * stride, offset=info.extent.offset)
    return data.reshape(n_neurons, stride)


def fetch(layer, wanted, **options):
    """Bring `wanted`, check the bytes of each as it arrives, and return what it cost."""
    fetched, expected = layer.fetch(np.array(wanted, np.int32), **options), stored(layer.info)
    parts = [fetched.there(), *fetched.arrivals()]
    seen = np.concatenate([ids for ids, _ in parts])
    assert np.array_equal(np.sort(seen), np.sort(wanted))
    for ids, slots in parts:
        assert np.array_equal(layer.rows[slots], expected[ids])
    return fetched


def test_kvikio_is_set_up_for_small_reads_or_refused(kvikio, monkeypatch):
    assert load_kvikio() is kvikio
    assert kvikio.defaults.settings["gds_threshold"] == 0
    assert kvikio.defaults.settings["num_threads"] > 1
    kvikio.defaults.is_compat_mode_preferred = lambda: True
    with pytest.raises(FlashError, match="compatibility mode"):
        load_kvikio()
    monkeypatch.setitem(sys.modules, "kvikio", None)
    with pytest.raises(MissingExtraError, match="gds"):
        load_kvikio()


@pytest.fixture
def any_kvikio(device, request):
    """The stand-in on the emulated device, and what is installed on a GPU."""
    if device.name == "emulated":
        return request.getfixturevalue("kvikio")
    try:
        return load_kvikio()
    except FlashError as error:
        pytest.skip(error.message)


def test_bytes_get_to_their_rows(any_kvikio, device, synthetic):
    with flashfmt.open(synthetic("plain", "f16")) as model:
        info = model.layers[1]
        stride, slots = info.geometry.stride, np.random.default_rng(4).permutation(200).astype(np.int32)[:90]
        rows = device.zeros((200, stride), np.uint8)
        device.synchronize(device.record("compute"))
        reader = SlotReader(any_kvikio, info.extent.path)
        ids = np.arange(5, 5 + 3 * len(slots), 3)
        reads = reader.begin(info.extent.offset + ids * stride, rows, slots)
        assert len(reads) == len(slots)
        reads.wait()
        reads.wait()
        host = device.download(rows)
        assert np.array_equal(host[slots], stored(info)[ids])
        assert not np.delete(host, slots, axis=0).any()
        assert (reader.counters.n_requests, reader.counters.bytes_read) == (90, 90 * stride)
        with pytest.raises(FlashReadError) as caught:
            reader.begin(np.array([info.extent.path.stat().st_size - stride + 512]), rows, slots[:1]).wait()
        assert caught.value.path == info.extent.path
        reader.close()


@pytest.mark.parametrize("n_tier", [0, 40])
@pytest.mark.parametrize("verify", ["never", "first", "always"])
def test_slots_hold_the_same_by_either_way(make_layer, kvikio, verify, n_tier):
    rng = np.random.default_rng(3)
    straight, landing = make_layer(verify, n_tier=n_tier), make_layer(verify, direct=False, n_tier=n_tier)
    seen, n_expected = set(), 0
    for step in range(12):
        wanted = np.sort(rng.choice(200, rng.integers(1, N_SLOTS), replace=False))
        before, ahead = kvikio.n_reads, step % 4 == 3
        one, other = fetch(straight, wanted, ahead=ahead), fetch(landing, wanted, ahead=ahead)
        for name in ("n_hits", "n_evicted", "n_missing"):
            assert getattr(one, name) == getattr(other, name)
        assert straight.n_from_tier == landing.n_from_tier
        assert one.costs.bytes_read >= one.n_missing * straight.info.geometry.stride
        read = set(one.ids[one.n_there :].tolist())
        n_direct = {"never": len(read), "first": len(read & seen), "always": 0}[verify]
        if not ahead:
            assert kvikio.n_reads - before == n_direct
        else:
            assert kvikio.n_reads - before <= n_direct
        seen |= read
        n_expected += n_direct
    assert bool(n_expected) == (verify != "always")


def test_slots_fill_straight_at_the_start(make_layer, kvikio):
    layer = make_layer("never")
    fetched = layer.preload([np.arange(0, 90, dtype=np.int32), np.arange(60, 130, dtype=np.int32)])
    assert len(list(fetched.arrivals())) > 1
    held = layer.window.held()
    assert kvikio.n_reads == len(held)
    assert fetch(layer, held).n_missing == 0


@pytest.mark.parametrize("how", ["get", "pread", "short"])
def test_what_fails_is_named_and_not_held(make_layer, kvikio, how):
    layer = make_layer("never")
    fetch(layer, range(100, 140))
    info, wanted = layer.info, list(range(100))
    offset = info.extent.offset + 50 * info.geometry.stride
    kvikio.damaged[offset] = how
    fetched = layer.fetch(np.array(wanted, np.int32))
    with pytest.raises(FlashReadError, match="layer 1, neurons 48 to 63") as caught:
        list(fetched.arrivals())
    assert caught.value.where == offset + (info.geometry.stride - 1 if how == "short" else 0)
    assert caught.value.path == info.extent.path
    assert kvikio.in_flight == 0
    assert not set(range(48, 64)) & set(layer.window.held().tolist())
    kvikio.damaged.clear()
    assert fetch(layer, wanted).n_missing == 16


def test_what_is_given_up_has_ended_before_its_slots_are_free(make_layer, kvikio):
    layer = make_layer("never")
    arrivals = layer.fetch(np.arange(100, dtype=np.int32))
    parts = arrivals.arrivals()
    next(parts)
    arrivals.finish()
    assert kvikio.in_flight == 0
    assert fetch(layer, range(20, 140)).n_missing == 40


def test_an_interrupt_waits_for_what_is_in_flight(make_layer, kvikio, monkeypatch):
    layer, get = make_layer("never"), IOFuture.get

    def interrupted(future):
        monkeypatch.setattr(IOFuture, "get", get)
        future.get()
        raise KeyboardInterrupt

    fetched = layer.fetch(np.arange(40, dtype=np.int32))
    monkeypatch.setattr(IOFuture, "get", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(fetched.arrivals())
    assert kvikio.in_flight == 0
    assert fetch(layer, range(40)).n_missing == 16


def test_a_slot_is_out_of_use_before_its_read_begins(make_layer, kvikio, device, monkeypatch):
    """The one event that is waited for lies behind the compute queue and behind what the second tier takes over."""
    layer, log = make_layer("never", n_tier=40), []
    fetch(layer, range(N_SLOTS))
    for name in ("record", "wait", "synchronize", "launch"):
        method = getattr(device, name)
        monkeypatch.setattr(
            device, name, lambda *a, _name=name, _do=method, **k: (log.append((_name, a)), _do(*a, **k))[1]
        )
    kvikio.before_read = lambda: log.append(("read", ()))
    fetched = layer.fetch(np.arange(N_SLOTS, N_SLOTS + 30, dtype=np.int32))
    list(fetched.arrivals())
    names = [name for name, _ in log]
    waited = next(i for i, (name, a) in enumerate(log) if name == "wait" and a[0] == "copy")
    moved = next(i for i, (name, a) in enumerate(log) if name == "launch" and a[0] == "move_rows")
    marked = max(i for i, (name, a) in enumerate(log) if name == "record" and a[0] == "copy")
    assert waited < moved < marked < names.index("synchronize") < names.index("read")
    (event,) = (a[0] for name, a in log if name == "synchronize")
    assert event[0] == "copy"


def test_what_is_read_ahead_lands(make_layer, kvikio):
    layer = make_layer("never")
    fetched = layer.fetch(np.arange(100, dtype=np.int32), ahead=True)
    assert kvikio.n_reads == 0
    list(fetched.arrivals())
    assert kvikio.n_reads == 100 - 2 * 16  # half of the ring's buffers were lent; the layer is in work now


@pytest.fixture
def on_this_device(device, kvikio, monkeypatch):
    monkeypatch.setattr(device, "most", device.most)
    monkeypatch.setattr("reference_engine.engine.open_cuda_device", lambda: device)


@pytest.fixture
def pretend_seconds(monkeypatch):
    """A function that makes either way take as long as it says, whatever it takes."""
    measure = device_ways._seconds

    def pretend(landing, direct):
        def seconds(layer, ids):
            measure(layer, ids)
            return landing if layer._direct is None else direct

        monkeypatch.setattr(device_ways, "_seconds", seconds)

    return pretend


@pytest.mark.parametrize(
    ("landing", "direct", "way"), [(1.0, 2.0, "landing"), (1.0, 0.99, "landing"), (2.0, 1.0, "direct")]
)
def test_the_clearly_faster_way_is_chosen(kvikio, device, synthetic, pretend_seconds, landing, direct, way):
    pretend_seconds(landing, direct)
    with flashfmt.open(synthetic("plain", "f16")) as model:
        choice = choose_way(model, device, bundle_opener(model), "first")
        assert choice.name == way
        assert choice.landing / choice.direct == pytest.approx(direct / landing)
        assert choice.as_dict()["way"] == way
        assert choice.reason.count("GiB/s") == 2
        assert kvikio.n_reads > 0
        if choice.open_direct is not None:
            choice.open_direct(model.path).close()


def test_memory_that_the_libraries_take_is_counted(kvikio, device, synthetic, monkeypatch):
    monkeypatch.setattr(device, "memory", lambda: ((1 << 40) - 4096 * kvikio.n_reads, 1 << 40))
    with flashfmt.open(synthetic("plain", "f16")) as model:
        choice = choose_way(model, device, bundle_opener(model), "never")
    assert choice.device_nbytes == 4096 * kvikio.n_reads > 0


def test_without_a_choice_nothing_is_measured(kvikio, device, synthetic, monkeypatch):
    with flashfmt.open(synthetic("plain", "f16")) as model:
        opener = bundle_opener(model)
        assert choose_way(model, device, opener, "always").reason == "the host checks every bundle"
        kvikio.defaults.is_compat_mode_preferred = lambda: True
        assert "compatibility mode" in choose_way(model, device, opener, "never").reason
        monkeypatch.setitem(sys.modules, "kvikio", None)
        choice = choose_way(model, device, opener, "never")
    assert "not installed" in choice.reason
    assert (choice.name, choice.landing, choice.direct, kvikio.n_reads) == ("landing", None, None, 0)


def test_a_way_that_fails_is_not_taken(kvikio, device, synthetic, monkeypatch):
    def refuse(path, flags="r"):
        raise RuntimeError("no O_DIRECT here")

    with flashfmt.open(synthetic("plain", "f16")) as model:
        opener = bundle_opener(model)
        info = model.layers[0]
        for neuron in range(info.geometry.n_neurons):
            kvikio.damaged[info.extent.offset + neuron * info.geometry.stride] = "get"
        choice = choose_way(model, device, opener, "never")
        assert choice.name == "landing"
        assert "5005" in choice.reason
        monkeypatch.setattr(kvikio, "CuFile", refuse)
        choice = measure_ways(model, device, opener, lambda path: SlotReader(kvikio, path))
        assert choice.name == "landing"
        assert "no O_DIRECT" in choice.reason


@pytest.mark.usefixtures("on_this_device")
@pytest.mark.parametrize("verify", ["never", "first"])
@pytest.mark.parametrize("hint", [None, "lowbit:q4:0.2@attention_input"])
def test_an_engine_says_the_same_by_either_way(
    kvikio, synthetic, relative_error, pretend_seconds, monkeypatch, verify, hint
):
    monkeypatch.setattr("reference_engine.sparse_plan.MIN_SLOTS", 100)
    sparse = SparseOptions(parse_selector("lowbit:q8:0.001"), hint and parse_selector(hint), window=parse_window("lru"))
    options = EngineOptions(context_tokens=32, device="cuda", verify=verify, sparse=sparse, vram=1 << 30)
    with Engine(synthetic("plain", "f16"), options) as engine:
        floor = engine.plan.floor
    results = {}
    for way, seconds in (("landing", (1.0, 2.0)), ("direct", (2.0, 1.0))):
        pretend_seconds(*seconds)
        with Engine(synthetic("plain", "f16"), dataclasses.replace(options, vram=floor)) as engine:
            assert engine.device_way.name == way
            n_probed = kvikio.n_reads
            engine.load()
            session = engine.start()
            logits = [session.feed([token]) for token in (3, 50, 7, 9, 11, 3)]
            read, totals = engine.counters().bytes_read, engine.sparse.totals
            assert read == totals.total("bytes_read")
            results[way] = np.array(logits), totals.total("n_missing"), kvikio.n_reads - n_probed
    assert relative_error(results["direct"][0], results["landing"][0]) <= 1e-4
    assert results["direct"][1] == results["landing"][1]
    assert results["landing"][2] == 0
    assert results["direct"][2] > 0


@pytest.mark.usefixtures("on_this_device")
def test_a_damaged_bundle_is_found_before_anything_goes_straight(kvikio, synthetic, tmp_path, pretend_seconds):
    pretend_seconds(2.0, 1.0)
    path, data = tmp_path / "m.flash", bytearray(synthetic("plain", "f16").read_bytes())
    with flashfmt.open(synthetic("plain", "f16")) as model:
        info = model.layers[1]
    data[info.extent.offset + 300 * info.geometry.stride + 5] ^= 0x40
    path.write_bytes(data)
    sparse = SparseOptions(parse_selector("all"), window=parse_window("lru"))
    with Engine(path, EngineOptions(context_tokens=32, device="cuda", vram=1 << 30, sparse=sparse)) as engine:
        assert engine.device_way.name == "direct"
        engine.load()
        for _ in range(2):
            with pytest.raises(ChecksumError, match="layer 1, neuron 300"):
                engine.start().feed([1])


@pytest.mark.usefixtures("on_this_device")
def test_exact_mode_and_the_cpu_have_no_choice(kvikio, synthetic):
    for options in ({"device": "cuda", "vram": 1 << 30}, {"memory": 4 << 30, "backend": "numpy"}):
        with Engine(synthetic("plain", "f16"), EngineOptions(context_tokens=32, **options)) as engine:
            assert isinstance(engine.plan, MemoryPlan)
            assert engine.device_way is None
    assert kvikio.n_reads == 0
