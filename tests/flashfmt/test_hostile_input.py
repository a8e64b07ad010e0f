"""Hostile models: thousands of damaged files, and by hand what the fuzzers of tests/fuzz once found."""

import contextlib
import importlib
import random
import re
import struct
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd

import flashfmt
from flashfmt.bundles import Bundles
from flashfmt.errors import printable
from flashfmt.validate import metadata_checksum

FUZZ = Path(__file__).parents[1] / "fuzz"
GROUP = b'{"zarr_format":3,"node_type":"group"}'
MATRIX = "embedding/tokens"
EMPTY_FRAME = bytes.fromhex("28b52ffd2000010000")
SKIPPABLE_FRAME = bytes.fromhex("502a4d1804000000") + b"skip"
N_INPUTS, N_PARTS = 2400, 4
MAX_SECONDS = 2.0


def load(name):
    """A module of tests/fuzz, which import each other by name, as scripts do."""
    sys.path.insert(0, str(FUZZ))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FUZZ))


@pytest.fixture(scope="module")
def oracle():
    return load("oracle")


@pytest.fixture(scope="module")
def mutator():
    seeds = load("seeds")
    builder = seeds.load_builder()
    return load("mutations").Mutator(builder, seeds.seeds(builder))


def compressed(model, codec, frame, shape=(8,)):
    """An extension tensor of bytes with this payload."""
    configuration = {"level": 3} if codec == "zstd" else {"cname": "lz4", "clevel": 5, "shuffle": "shuffle"}
    model.add("extensions/bytes", "u8", list(shape), frame, {"name": codec, "configuration": configuration})


def raises(path, rule, error=flashfmt.FlashFormatError):
    """The refusal of a model, at opening, in verification, or not at all."""
    with pytest.raises(error) as caught, flashfmt.open(path) as model:
        model.verify()
    assert caught.value.rule == rule
    return caught.value


class TestDamagedFiles:
    def test_the_seeds_are_valid(self, oracle, mutator, tmp_path):
        for number, raw in enumerate(mutator.seeds):
            path = tmp_path / f"{number}.flash"
            path.write_bytes(raw)
            assert oracle.examine(path) == {"accepted"}

    @pytest.mark.parametrize("part", range(N_PARTS))
    def test_every_damaged_file_is_refused_by_rule_or_reads_back_right(self, oracle, mutator, tmp_path, part):
        path = tmp_path / "m.flash"
        outcomes = set()
        for number in range(part, N_INPUTS, N_PARTS):
            path.write_bytes(mutator.generate(random.Random(f"test:{number}")))
            started = time.thread_time()
            try:
                outcomes |= oracle.examine(path)
            except oracle.Finding as finding:
                pytest.fail(f"input {number}: {finding}")
            assert time.thread_time() - started < MAX_SECONDS, f"input {number}"
        assert "accepted" in outcomes
        assert len(outcomes) > 40, "the mutations no longer reach most checks"

    def test_the_oracle_sees_wrong_values(self, oracle, model, tmp_path, monkeypatch):
        path = model.write_file(tmp_path / "m.flash")
        monkeypatch.setattr(Bundles, "bundle", lambda self, neuron: self.rows[0])
        with pytest.raises(oracle.Finding, match=r"wrong.*bundle"):
            oracle.examine(path)

    def test_the_oracle_sees_foreign_exceptions(self, oracle, model, tmp_path, monkeypatch):
        path = model.write_file(tmp_path / "m.flash")
        monkeypatch.setattr(flashfmt.FlashModel, "statistics", lambda self, layer: {}["absent"])
        with pytest.raises(oracle.Finding, match="KeyError"):
            oracle.examine(path)


class TestFrames:
    """FF-TEN-3: exactly one frame, of exactly the stated size, without memory for what is only stated."""

    @pytest.mark.parametrize("behind", [EMPTY_FRAME, SKIPPABLE_FRAME, b"\0", Zstd(3).encode(b"12345678")])
    def test_nothing_may_follow_a_zstd_frame(self, model, tmp_path, behind):
        compressed(model, "zstd", Zstd(3).encode(b"12345678") + behind)
        raises(model.write_file(tmp_path / "m.flash"), "FF-TEN-3")

    def test_nothing_may_precede_it(self, model, tmp_path):
        compressed(model, "zstd", SKIPPABLE_FRAME + Zstd(3).encode(b"12345678"))
        raises(model.write_file(tmp_path / "m.flash"), "FF-TEN-3")

    @pytest.mark.parametrize("n", [0, 1, 255, 256, 70_000, 400_000])
    @pytest.mark.parametrize("checksum", [False, True])
    @pytest.mark.parametrize("kind", ["zeros", "noise"])
    def test_frames_of_every_form_are_one_frame(self, model, tmp_path, n, checksum, kind):
        content = bytes(n + 1) if kind == "zeros" else random.Random(n).randbytes(n + 1)
        compressed(model, "zstd", Zstd(3, checksum).encode(content), [n + 1])
        with flashfmt.open(model.write_file(tmp_path / "m.flash")) as opened:
            opened.verify()
            assert opened.tensor("extensions/bytes").data.tobytes() == content

    def test_blocks_of_repeated_bytes_and_raw_blocks_are_measured_apart(self, model, tmp_path):
        repeated = struct.pack("<I", 100 << 3 | 1 << 1)[:3] + b"x"
        raw = struct.pack("<I", 5 << 3 | 1)[:3] + b"hello"
        compressed(model, "zstd", bytes.fromhex("28b52ffd20") + bytes([105]) + repeated + raw, [105])
        with flashfmt.open(model.write_file(tmp_path / "m.flash")) as opened:
            assert opened.tensor("extensions/bytes").data.tobytes() == b"x" * 100 + b"hello"

    @pytest.mark.parametrize("codec", ["zstd", "blosc"])
    @pytest.mark.parametrize("nbytes", [17 << 20, 1 << 31])
    def test_a_stated_size_takes_no_memory(self, model, tmp_path, codec, nbytes):
        frame = bytes.fromhex("28b52ffde0") + struct.pack("<Q", nbytes) + b"\1\0\0"
        if codec == "blosc":
            frame = struct.pack("<BBBBIII", 2, 1, 1, 1, nbytes, 1 << 16, 16)
        compressed(model, codec, frame, [nbytes])
        path = model.write_file(tmp_path / "m.flash")
        with traced() as peak:
            raises(path, None, flashfmt.UnsupportedError)
        assert peak() < 20 << 20

    def test_a_bomb_is_refused_and_plausible_compression_is_not(self, model, tmp_path):
        compressed(model, "zstd", Zstd(3).encode(bytes(17 << 20)), [17 << 20])
        error = raises(model.write_file(tmp_path / "m.flash"), None, flashfmt.UnsupportedError)
        assert error.where == "extensions/bytes"
        assert error.exit_code == 4
        sparse = np.zeros(17 << 20, np.uint8)
        sparse[::200] = np.random.default_rng(5).integers(0, 256, len(sparse[::200]))
        compressed(model, "blosc", Blosc("zstd", 5, Blosc.NOSHUFFLE).encode(sparse), [17 << 20])
        with flashfmt.open(model.write_file(tmp_path / "m.flash")) as opened:
            assert np.array_equal(opened.tensor("extensions/bytes").data, sparse)


class TestContainer:
    @pytest.mark.parametrize("distance", [1 << 20, 1 << 62, 1 << 63, (1 << 64) - (1 << 24)])
    def test_entries_behind_the_directory_are_refused_by_rule(self, model, tmp_path, distance):
        """An entry whose size reaches there, and two that follow it there: offsets and sizes agree with each other."""
        z = model.zip()
        long, *moved = list(z.central)[-3:]
        (nbytes,) = struct.unpack_from("<Q", z.data, z.central[long] + 46 + len(long) + 4)
        for field in (4, 12):
            z.patch(z.central[long] + 46 + len(long) + field, "Q", nbytes + distance)
            z.patch(z.local[long] + 30 + len(long) + field, "Q", nbytes + distance)
        for key in moved:
            z.patch(z.central[key] + 46 + len(key) + 20, "Q", z.local[key] + distance)
        path = tmp_path / "m.flash"
        path.write_bytes(z.data)
        raises(path, "FF-ZIP-11")

    def test_many_entries_take_memory_in_proportion(self, model, tmp_path):
        model.extra["extensions/zarr.json"] = GROUP
        model.extra |= {f"extensions/{number:x}/zarr.json": GROUP for number in range(5000)}
        path = model.write_file(tmp_path / "m.flash")
        assert peak_of_opening(path) < 8 * path.stat().st_size


class TestDocuments:
    def test_what_means_nothing_is_not_held(self, model, tmp_path):
        """Parsed JSON takes up to 50 times its text: for one document at a time, of at most 1 MiB."""
        document = GROUP[:-1] + b',"attributes":{"a":[' + b",".join([b'{"":0}'] * 130_000) + b"]}}"
        model.extra["extensions/zarr.json"] = GROUP
        model.extra |= {f"extensions/{number}/zarr.json": document for number in range(4)}
        path = model.write_file(tmp_path / "m.flash")
        assert peak_of_opening(path) < (60 << 20) + 2 * path.stat().st_size

    @pytest.mark.parametrize("field", ["dimension_names", "parts"])
    def test_long_lists_are_refused_by_the_schema(self, model, tmp_path, field):
        document = model.arrays["layers/0/ffn/bundles"].document
        holder = document if field == "dimension_names" else document["attributes"]["flashfmt"]
        holder[field] = ["ab"] * 100_000
        error = raises(model.write_file(tmp_path / "m.flash"), "FF-ARR-3" if holder is document else "FF-ARR-10")
        assert "length" in error.message

    def test_the_digits_of_the_metadata_checksum_are_those_of_the_manifest(self, model, pack_zip, tmp_path):
        """A decoy: the text of the field stands in another object, the manifest writes its own with white space.

        The checksum then covers its own digits; 64 free letters are chosen so that it comes out as they say.
        """
        documents, stated = model.documents(), 0x12345678
        root = documents["zarr.json"].replace(b'"metadata_crc32c":', b'"metadata_crc32c": ')
        root = re.sub(rb'(?<="metadata_crc32c": ")[0-9a-f]{8}', b"%08x" % stated, root)
        root = root[:-2] + b',"decoy":{"metadata_crc32c":"00000000"},"free":"%b"}}'

        def checksum(letters):
            return metadata_checksum(documents | {"zarr.json": root % letters})

        base = checksum(b"a" * 64)
        effects = [base ^ checksum(b"a" * at + b"c" + b"a" * (63 - at)) for at in range(64)]
        chosen = combination(effects, base ^ stated)
        letters = bytes(b"ac"[chosen >> at & 1] for at in range(64))
        assert checksum(letters) == stated
        documents["zarr.json"] = root % letters
        path = tmp_path / "m.flash"
        path.write_bytes(pack_zip([(key, documents.get(key, raw), at) for key, raw, at in model.entries()]).data)
        raises(path, "FF-SUM-2")


class TestValues:
    """Weights of any bits may be read before they are verified."""

    @pytest.mark.parametrize(("encoding", "scale"), [("q8", "0000807f"), ("q8", "ffff7f7f"), ("q4", "007c007e")])
    def test_scales_that_are_not_finite_decode_quietly(self, tiny, tmp_path, encoding, scale):
        model = tiny(encoding, residents=encoding)
        model.edit_payload(MATRIX, 0, bytes.fromhex(scale))
        with flashfmt.open(model.write_file(tmp_path / "m.flash")) as opened:
            assert not np.isfinite(opened.tensor(MATRIX).decode()[0]).all()

    def test_a_window_from_one_end_of_the_numbers_to_the_other(self, model, tmp_path):
        name = "layers/0/statistics/aggregated_window"
        limits = np.array([-3e38, 3e38, 3e38, 3e38, 3e38], "<f4")
        model.edit_payload(name, 0, limits.tobytes())
        error = raises(model.write_file(tmp_path / "m.flash"), "FF-STAT-2")
        assert error.where == f"{name}[0]"


class TestErrors:
    @pytest.mark.parametrize("text", ["\x1b[2J\x07", "\n\r", "\u202e", "x" * 100_000])
    @pytest.mark.parametrize("field", ["data_type", "node_type", "a field of its own"])
    def test_text_from_a_file_cannot_control_a_terminal(self, model, tmp_path, text, field):
        document = model.arrays[MATRIX].document
        document[text if field == "a field of its own" else field] = text
        with pytest.raises(flashfmt.FlashFormatError) as caught:
            flashfmt.open(model.write_file(tmp_path / "m.flash"))
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 2000

    def test_ordinary_text_is_shown_as_it_is(self):
        assert printable("grüße \\ 'x'") == "grüße \\ 'x'"
        assert printable("a\nb") == "a\\nb"
        assert printable((1, "é")) == "(1, 'é')"


def combination(effects, target):
    """Bit mask of the effects whose exclusive or is the target, by elimination over GF(2)."""
    basis = {}

    def reduced(value, mask):
        while value and value.bit_length() in basis:
            base, base_mask = basis[value.bit_length()]
            value, mask = value ^ base, mask ^ base_mask
        return value, mask

    for index, effect in enumerate(effects):
        value, mask = reduced(effect, 1 << index)
        if value:
            basis[value.bit_length()] = value, mask
    value, mask = reduced(target, 0)
    assert value == 0
    return mask


@contextlib.contextmanager
def traced():
    """A function that says the peak of the memory taken inside the context, in bytes."""
    tracemalloc.start()
    peaks = []
    try:
        yield lambda: peaks[0]
    finally:
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()


def peak_of_opening(path):
    """Bytes of memory at the peak of opening a valid model."""
    with traced() as peak:
        flashfmt.open(path).close()
    return peak()
