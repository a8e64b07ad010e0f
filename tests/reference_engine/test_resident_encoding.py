"""Resident matrices re-encoded while loading: the same bytes as in a converted file, chosen only where it is needed."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import flashfmt
from flashfmt.convert import convert
from flashfmt.encodings import Encoding
from flashfmt.errors import BudgetError, ChecksumError, FlashError
from reference_engine import residents
from reference_engine import synthetic as synthetic_module
from reference_engine.cli import plan, run
from reference_engine.engine import Engine, EngineOptions
from reference_engine.neuron_window import parse_window
from reference_engine.resident_encoding import choose_plan, encodings_to_try, resident_encoding
from reference_engine.residents import load_residents, resident_matrices, residents_nbytes
from reference_engine.selectors import parse_selector
from reference_engine.sparse_mode import SparseOptions
from reference_engine.synthetic import Shape, write_synthetic

LOW_BIT = SparseOptions(parse_selector("lowbit:q4"), window=parse_window("lru"))
TINY_GATED = Shape("tiny-gated", 2, 128, 320, 8, 2, 97, plain=False, tied=False, context_tokens=512)
PROMPT = [5, 17, 3, 96, 0, 42, 8]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(residents, "_PIECE_WEIGHTS", 64 * 5)


def logits(path, **options):
    with Engine(path, EngineOptions(memory=8 << 30, **options)) as engine:
        engine.load()
        return engine.start().feed_all(PROMPT)


@pytest.mark.parametrize("encoding", ["q8", "q4"])
@pytest.mark.parametrize("variant", ["opt", "llama_rope_yarn", "qwen3"])
def test_the_same_bytes_as_in_a_converted_file(tiny_checkpoint, tmp_path, variant, encoding):
    source = tiny_checkpoint(variant)[0]
    convert(source, tmp_path / "wide.flash", encoding="f32", residents="f32")
    convert(source, tmp_path / "narrow.flash", encoding="f32", residents=encoding)
    with flashfmt.open(tmp_path / "wide.flash") as wide, flashfmt.open(tmp_path / "narrow.flash") as narrow:
        loaded, expected = load_residents(wide, encoding=Encoding(encoding)), load_residents(narrow)
        n_matrices = 0
        for info in residents.resident_tensors(narrow):
            if len(info.shape) == 1:
                np.testing.assert_array_equal(loaded.vector(info.name), expected.vector(info.name))
                continue
            n_matrices += 1
            mine, theirs = loaded.matrix(info.name), expected.matrix(info.name)
            assert (mine.encoding, mine.n_rows, mine.n_cols) == (theirs.encoding, theirs.n_rows, theirs.n_cols)
            np.testing.assert_array_equal(mine.data, theirs.data)
        assert n_matrices > 4
        assert residents_nbytes(wide, Encoding(encoding)) < residents_nbytes(wide)


@pytest.mark.parametrize("encoding", ["q8", "q4"])
def test_the_engine_computes_what_it_does_with_a_converted_file(tiny_checkpoint, tmp_path, encoding):
    source = tiny_checkpoint("opt")[0]
    convert(source, tmp_path / "wide.flash", encoding="f32", residents="f32")
    convert(source, tmp_path / "narrow.flash", encoding="f32", residents=encoding)
    expected = logits(tmp_path / "narrow.flash")
    np.testing.assert_array_equal(logits(tmp_path / "wide.flash", residents=encoding), expected)
    assert not np.array_equal(logits(tmp_path / "wide.flash"), expected)


def test_exact_mode_leaves_everything_as_stored_unless_told_otherwise(synthetic):
    path = synthetic("gated", "f16", "f16")
    for choice in ("stored", "auto"):
        with Engine(path, EngineOptions(residents=choice)) as engine:
            assert engine.plan.fixed.resident_encoding is None
            assert engine.plan.as_dict()["resident_encoding"] == "stored"
    with Engine(path, EngineOptions(residents="q8")) as engine:
        assert engine.plan.fixed.resident_encoding is Encoding.Q8


def test_compressed_matrices_are_re_encoded_as_well(tmp_path, monkeypatch):
    specs = synthetic_module._tensor_specs
    for codec in ("raw", "zstd"):
        with monkeypatch.context() as patch:
            patch.setattr(
                synthetic_module,
                "_tensor_specs",
                lambda *a, codec=codec: (dataclasses.replace(spec, codec=codec) for spec in specs(*a)),
            )
            write_synthetic(tmp_path / f"{codec}.flash", TINY_GATED)
    with flashfmt.open(tmp_path / "raw.flash") as raw, flashfmt.open(tmp_path / "zstd.flash") as zstd:
        assert {zstd.tensors[info.name].codec for info in residents.resident_tensors(raw)} == {"zstd"}
        expected, loaded = (load_residents(model, encoding=Encoding.Q8) for model in (raw, zstd))
        for info in residents.resident_tensors(raw):
            if len(info.shape) == 2:
                np.testing.assert_array_equal(loaded.matrix(info.name).data, expected.matrix(info.name).data)


def test_what_is_narrow_already_stays(synthetic):
    with flashfmt.open(synthetic("gated", "f16", "q8")) as model:
        assert encodings_to_try(resident_matrices(model), "auto", may_be_lossy=True) == [None, Encoding.Q4]
        assert residents_nbytes(model, Encoding.Q8) == residents_nbytes(model)
        for info in model.tensors.values():
            assert resident_encoding(info, Encoding.Q8) == info.encoding
            positions = dataclasses.replace(info, name="embedding/positions")
            assert resident_encoding(positions, Encoding.Q4) == info.encoding
    with flashfmt.open(synthetic("gated", "f16", "f16")) as model:
        assert encodings_to_try(resident_matrices(model), "auto", may_be_lossy=True) == [None, Encoding.Q8, Encoding.Q4]
        assert encodings_to_try(resident_matrices(model), "auto", may_be_lossy=False) == [None]
        assert encodings_to_try(resident_matrices(model), "q4", may_be_lossy=False) == [Encoding.Q4]


@given(
    sizes=st.lists(st.integers(1, 100), min_size=3, max_size=3), room=st.integers(0, 200), enough=st.integers(1, 100)
)
def test_the_widest_that_leaves_enough(sizes, room, enough):
    """Sizes of the residents as stored, in q8 and in q4; what is left of the room is for the window."""
    nbytes = dict(zip((None, Encoding.Q8, Encoding.Q4), sorted(sizes, reverse=True), strict=True))

    def plan(encoding):
        if nbytes[encoding] > room:
            raise BudgetError(str(encoding))
        return encoding, room - nbytes[encoding]

    fits = [encoding for encoding in nbytes if nbytes[encoding] <= room]
    if not fits:
        with pytest.raises(BudgetError, match="q4"):
            choose_plan(list(nbytes), plan, lambda made: made[1] >= enough)
        return
    chosen, _ = choose_plan(list(nbytes), plan, lambda made: made[1] >= enough)
    wide_enough = [encoding for encoding in fits if encoding is not Encoding.Q4 and room - nbytes[encoding] >= enough]
    assert chosen == (wide_enough[0] if wide_enough else Encoding.Q8 if Encoding.Q8 in fits else fits[0])


@pytest.mark.usefixtures("steady")
def test_sparse_mode_takes_narrow_residents_where_the_window_would_not_fit(opt_like):
    def planned(memory, choice="auto"):
        options = EngineOptions(memory=memory, context_tokens=32, sparse=LOW_BIT, residents=choice)
        with Engine(opt_like, options) as engine:
            return engine.plan

    stored = planned(8 << 30)
    assert stored.fixed.resident_encoding is None
    assert stored.held_share == 1
    floors = {choice: planned(8 << 30, choice).floor for choice in ("stored", "q8", "q4")}
    assert floors["stored"] > floors["q8"] > floors["q4"]
    tight = planned(floors["stored"] + (1 << 20))
    assert tight.fixed.resident_encoding is Encoding.Q8
    assert tight.held_share > 0.24
    assert planned(floors["stored"] + (1 << 20), "stored").held_share < 0.24
    least = planned((floors["q8"] + floors["q4"]) // 2)
    assert least.fixed.resident_encoding is Encoding.Q4
    with pytest.raises(BudgetError, match="smallest that works"):
        planned(floors["q4"] - (8 << 20))


@pytest.fixture
def steady(monkeypatch):
    """The process always holds the same, whatever other tests have left in it."""
    monkeypatch.setattr("reference_engine.engine.resident_nbytes", lambda: 100 << 20)


@pytest.fixture(scope="module")
def opt_like(tmp_path_factory):
    """Residents of tens of megabytes, so that their size decides."""
    path = tmp_path_factory.mktemp("wide") / "wide.flash"
    write_synthetic(path, Shape("wide", 2, 512, 2048, 8, 8, 40000, plain=True, tied=True, context_tokens=64))
    yield path
    path.unlink()


@pytest.mark.usefixtures("steady")
def test_the_plan_says_so(opt_like):
    with Engine(opt_like, EngineOptions(context_tokens=32, sparse=LOW_BIT)) as engine:
        memory = engine.plan.floor + (1 << 20)
    arguments = [
        str(opt_like),
        "--selector",
        "lowbit:q4",
        "--window",
        "lru",
        "--context",
        "32",
        "--memory",
        str(memory),
    ]
    shown = CliRunner().invoke(plan, arguments)
    assert shown.exit_code == 0, shown.output
    assert "resident tensors, in q8" in shown.output
    assert "--residents" in shown.output
    report = json.loads(CliRunner().invoke(plan, [*arguments, "--json"]).stdout)
    assert report["resident_encoding"] == "q8"
    ran = CliRunner().invoke(run, [*arguments, "--tokens", "5,6,7", "--max-tokens", "2", "--ignore-eos"])
    assert ran.exit_code == 0, ran.output
    assert "resident tensors, in q8" in ran.stderr


CHILD = """
import sys
from reference_engine.engine import Engine, EngineOptions
from reference_engine.machine import peak_resident_nbytes
from reference_engine.selectors import parse_selector
from reference_engine.sparse_mode import SparseOptions
path, memory, residents = sys.argv[1], int(sys.argv[2]), sys.argv[3]
sparse = SparseOptions(parse_selector("lowbit:q4"))
engine = Engine(path, EngineOptions(memory=memory, context_tokens=32, sparse=sparse, residents=residents))
engine.load()
engine.start().feed([5, 6, 7])
print(engine.plan.floor, peak_resident_nbytes())
engine.close()
"""


def test_trying_several_encodings_stays_below_the_ceiling(opt_like):
    """Loading kernels takes more for a moment than this small model does afterwards."""

    def child(memory, choice):
        command = [sys.executable, "-c", CHILD, str(opt_like), str(memory), choice]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return map(int, done.stdout.split())

    for choice, widest in (("auto", "stored"), ("q8", "q8")):
        floor, _ = child(8 << 30, widest)
        _, peak = child(floor + (2 << 20), choice)
        assert peak <= floor + (2 << 20)


def test_a_damaged_matrix_is_found_while_it_is_re_encoded(synthetic, tmp_path):
    path = tmp_path / "m.flash"
    path.write_bytes(synthetic("gated", "f16", "f16").read_bytes())
    with flashfmt.open(path) as model:
        info = model.tensors["layers/1/attention/q/weight"]
    with path.open("r+b") as file:
        file.seek(info.extent.offset + info.extent.nbytes - 3)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with flashfmt.open(path) as model:
        with pytest.raises(ChecksumError, match=info.name):
            load_residents(model, encoding=Encoding.Q8)
        load_residents(model, encoding=Encoding.Q8, verify=False)


def test_values_that_cannot_be_encoded_name_the_tensor(synthetic, tmp_path):
    path = tmp_path / "m.flash"
    path.write_bytes(synthetic("gated", "f16", "f16").read_bytes())
    with flashfmt.open(path) as model:
        info = model.tensors["layers/0/attention/k/weight"]
    with path.open("r+b") as file:
        file.seek(info.extent.offset + 64)
        file.write(np.array([np.inf], "<f2").tobytes())
    with (
        flashfmt.open(path) as model,
        pytest.raises(FlashError, match=r"layers/0/attention/k/weight.*--residents stored"),
    ):
        load_residents(model, encoding=Encoding.Q8, verify=False)
