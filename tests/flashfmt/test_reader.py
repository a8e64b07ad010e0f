"""Reading values, and `verify`: each rule of the payloads broken once."""

import json
import struct
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numcodecs import Blosc, Zstd

import flashfmt
from flashfmt import verify

BUNDLES = "layers/1/ffn/bundles"
MATRIX = "embedding/tokens"
VECTOR = "final_norm/weight"
INF16 = struct.pack("<H", 0x7C00)
NAN32 = struct.pack("<f", float("nan"))


def compressed(model, codec, payload):
    array = model.arrays[MATRIX]
    configuration = {"level": 3} if codec == "zstd" else {"cname": "zstd", "clevel": 5, "shuffle": "bitshuffle"}
    array.document["codecs"].append({"name": codec, "configuration": configuration})
    array.replace(payload)


def zstd(model, change=lambda raw: raw):
    compressed(model, "zstd", Zstd(3).encode(change(model.arrays[MATRIX].payload)))


def blosc(model, change=lambda raw: raw):
    compressed(model, "blosc", Blosc("zstd", 5, Blosc.BITSHUFFLE).encode(change(model.arrays[MATRIX].payload)))


def edit_bundles(offset, raw, *, rows=False):
    """Overwrite bytes of a payload with matching checksums, those of the bundles too when `rows`."""

    def change(model):
        model.edit_payload(BUNDLES, offset, raw)
        if rows:
            sums = [google_crc32c.value(row) for row in model.rows(1)]
            model.arrays["layers/1/ffn/bundle_crc32c"].replace(np.array(sums, "<u4").tobytes())

    return change


def index_entry(i, offset, nbytes, *, seal=True):
    def change(model):
        payload = bytearray(model.arrays[BUNDLES].payload)
        start = len(payload) - 6 * 16 - 4
        struct.pack_into("<QQ", payload, start + 16 * i, offset, nbytes)
        if seal:
            struct.pack_into("<I", payload, len(payload) - 4, google_crc32c.value(bytes(payload[start:-4])))
        model.arrays[BUNDLES].replace(bytes(payload))

    return change


def edit(name, offset, raw):
    return lambda model: model.edit_payload(name, offset, raw)


def wrong(name, **fields):
    return lambda model: model.arrays[name].ours.update(fields)


BREAKS = [
    ("f16", "FF-SUM-3", wrong(VECTOR, crc32c="00000000")),
    ("f16", "FF-SUM-4", wrong(BUNDLES, crc32c="00000000")),
    ("f16", "FF-SUM-5", edit("layers/1/ffn/bundle_crc32c", 8, b"\0\0\0\0")),
    ("f16", "FF-SUM-5", edit_bundles(512 + 100, b"\x01\x02")),
    ("f16", "FF-SUM-6", wrong("files/tokenizer", crc32c="00000000")),
    ("f16", "FF-SUM-6", wrong("files/tokenizer", sha256="0" * 64)),
    ("f16", "FF-TEN-4", edit(VECTOR, 8, NAN32)),
    ("f16", "FF-TEN-4", edit(MATRIX, 640, INF16)),
    ("f16", "FF-TEN-4", edit_bundles(512 + 10, INF16, rows=True)),
    ("f32", "FF-TEN-4", edit_bundles(1024 + 8, NAN32, rows=True)),
    ("bf16", "FF-TEN-4", edit_bundles(512 + 10, struct.pack("<H", 0xFF80), rows=True)),
    ("q8", "FF-TEN-4", edit_bundles(512 + 128, NAN32, rows=True)),
    ("q4", "FF-TEN-4", edit_bundles(512 + 128 + 2, INF16, rows=True)),
    ("q8", "FF-TEN-5", edit_bundles(512 + 4, b"\1", rows=True)),
    ("q4", "FF-TEN-5", edit_bundles(512 + 127, b"\1", rows=True)),
    ("f16", "FF-TEN-4", lambda m: zstd(m, lambda raw: INF16 + raw[2:])),
    ("f16", "FF-TEN-4", lambda m: blosc(m, lambda raw: raw[:-2] + INF16)),
    ("f16", "FF-TEN-3", lambda m: zstd(m, lambda raw: raw + b"\0")),
    ("f16", "FF-TEN-3", lambda m: zstd(m, lambda raw: raw[:-1])),
    ("f16", "FF-TEN-3", lambda m: blosc(m, lambda raw: raw + b"\0\0")),
    ("f16", "FF-TEN-3", lambda m: compressed(m, "zstd", b"not a frame at all")),
    ("f16", "FF-TEN-3", lambda m: compressed(m, "zstd", b"")),
    ("f16", "FF-TEN-3", lambda m: compressed(m, "blosc", b"\2\1\1\2")),
    ("f16", "FF-TEN-3", lambda m: compressed(m, "zstd", Zstd(3).encode(m.arrays[MATRIX].payload)[:-9])),
    ("q8", "FF-BND-8", edit_bundles(512 + 400, b"\1")),
    ("f16", "FF-IDX-2", index_entry(2, 1024, 384 + 1, seal=False)),
    ("f16", "FF-IDX-3", index_entry(2, 1024, 384 + 1)),
    ("f16", "FF-IDX-3", index_entry(2, 512, 384)),
    ("f16", "FF-IDX-3", index_entry(5, (1 << 64) - 1, (1 << 64) - 1)),
    ("f16", "FF-STAT-1", edit("layers/0/statistics/firing_frequency", 0, struct.pack("<f", -0.5))),
    ("f16", "FF-STAT-1", edit("layers/1/statistics/firing_frequency", 4, struct.pack("<f", 1.5))),
    ("f16", "FF-STAT-2", edit("layers/0/statistics/aggregated_window", 16, struct.pack("<f", 0.2))),
    ("f16", "FF-STAT-2", edit("layers/0/statistics/aggregated_window", 0, struct.pack("<f", -0.2))),
]


@pytest.mark.parametrize(
    ("encoding", "rule", "change"), BREAKS, ids=[f"{i}-{rule}" for i, (_, rule, _) in enumerate(BREAKS)]
)
def test_verify_names_the_broken_rule(tiny, tmp_path, container, encoding, rule, change):
    model = tiny(encoding)
    change(model)
    with (
        flashfmt.open(model.write(tmp_path / "tiny.flash", container)) as opened,
        pytest.raises(flashfmt.FlashFormatError) as caught,
    ):
        opened.verify()
    assert caught.value.rule == rule, str(caught.value)
    assert isinstance(caught.value, flashfmt.ChecksumError) or not rule.startswith("FF-SUM")


def test_verify_checks_the_crc32_of_every_entry(model, tmp_path):
    z = model.zip()
    for key in ("layers/zarr.json", "final_norm/weight/c/0", f"{BUNDLES}/c/0/0/0", "files/tokenizer/c/0"):
        damaged = bytearray(z.data)
        for offset in (z.local[key] + 14, z.central[key] + 16):
            damaged[offset] ^= 1
        path = tmp_path / "tiny.flash"
        path.write_bytes(damaged)
        with flashfmt.open(path) as opened, pytest.raises(flashfmt.ChecksumError) as caught:
            opened.verify()
        assert (caught.value.rule, caught.value.where) == ("FF-ZIP-13", key)


def test_verify_works_in_blocks(tiny, tmp_path, container, monkeypatch):
    """Blocks far smaller than an array: every boundary falls inside one."""
    path = tiny("q4", residents="q8").write(tmp_path / "tiny.flash", container)
    broken = tiny("q4", residents="q8")
    edit_bundles(4 * 512 + 2 * 128 + 2, INF16, rows=True)(broken)
    broken_path = broken.write(tmp_path / "broken.flash", container)
    for nbytes in (1, 256, 1000):
        monkeypatch.setattr(verify, "BLOCK_NBYTES", nbytes)
        steps = []
        with flashfmt.open(path) as opened:
            opened.verify(steps.append)
            assert sum(steps) == opened.verify_nbytes
        with flashfmt.open(broken_path) as opened, pytest.raises(flashfmt.FlashFormatError) as caught:
            opened.verify()
        assert (caught.value.rule, caught.value.where) == ("FF-TEN-4", f"{BUNDLES}[4]")


@pytest.mark.parametrize("encoding", ["f32", "f16", "bf16", "q8", "q4"])
def test_bundles_are_views_of_the_rows(tiny, tmp_path, container, encoding):
    model = tiny(encoding)
    with flashfmt.open(model.write(tmp_path / "tiny.flash", container)) as opened:
        bundles = opened.bundles(1)
        assert opened.bundles(1) is bundles
        info = opened.layers[1]
        assert (info.layer, info.parts, info.encoding) == (1, ("gate", "up", "down"), encoding)
        raw = info.extent.path.read_bytes()
        for i, row in enumerate(model.rows(1)):
            at = info.extent.offset + i * info.geometry.stride
            assert raw[at : at + info.geometry.row_nbytes] == row == bundles.rows[i].tobytes()
            assert bundles.bundle(i).tobytes() == row
            assert np.shares_memory(bundles.bundle(i), bundles.rows)
            assert bundles.checksums[i] == google_crc32c.value(row)
        decoded = bundles.decode([5, 0, 5])
        assert (decoded.shape, decoded.dtype) == ((3, 3, 64), np.float32)
        np.testing.assert_array_equal(decoded[0], decoded[2])
        bundles.verify(range(6))
        assert bundles.decode([]).shape == (0, 3, 64)
        for bad in (-1, 6):
            for call in (bundles.bundle, lambda i: bundles.decode([i]), lambda i: bundles.verify([i])):
                with pytest.raises(IndexError):
                    call(bad)
        with pytest.raises(IndexError):
            opened.bundles(2)
    assert bundles.rows[0].tobytes() == model.rows(1)[0], "views outlive the model"
    assert not bundles.rows.flags.writeable


def test_a_damaged_bundle_is_named(model, tmp_path):
    edit_bundles(2 * 512 + 100, b"\x01\x02")(model)
    with flashfmt.open(model.write_file(tmp_path / "tiny.flash")) as opened:
        bundles = opened.bundles(1)
        bundles.verify([0, 1, 3, 4, 5])
        with pytest.raises(flashfmt.ChecksumError, match="neuron 2 of layer 1") as caught:
            bundles.verify([1, 2])
        assert str(opened.layers[1].extent.offset + 1024) in str(caught.value)


def test_a_bad_index_is_noticed_before_a_bundle_is_used(model, tmp_path):
    index_entry(2, 512, 384)(model)
    with (
        flashfmt.open(model.write_file(tmp_path / "tiny.flash")) as opened,
        pytest.raises(flashfmt.FlashFormatError) as caught,
    ):
        opened.bundles(1)
    assert caught.value.rule == "FF-IDX-3"


def test_tensors_are_views_unless_compressed(tiny, tmp_path, container):
    model = tiny(residents="f16")
    raw = model.arrays[MATRIX].payload
    zstd(model)
    with flashfmt.open(model.write(tmp_path / "tiny.flash", container)) as opened:
        assert opened.tensors[MATRIX].codec == "zstd"
        assert opened.tensor(MATRIX).data.tobytes() == raw
        vector = opened.tensor(VECTOR, verify=True)
        assert opened.tensors[VECTOR].codec == "raw"
        assert vector.decode().tobytes() == model.arrays[VECTOR].payload
        assert np.shares_memory(vector.decode(), opened.tensor(VECTOR).data)
        for tensor in (vector, opened.tensor(MATRIX)):
            assert not tensor.data.flags.writeable
        with pytest.raises(KeyError):
            opened.tensor("nothing")
        with pytest.raises(ValueError, match="does not encode weights"):
            opened.tensor("layers/0/ffn/bundle_crc32c").decode()


def test_a_damaged_tensor_is_noticed_on_request(model, tmp_path):
    wrong(VECTOR, crc32c="00000000")(model)
    with flashfmt.open(model.write_file(tmp_path / "tiny.flash")) as opened:
        opened.tensor(VECTOR)
        with pytest.raises(flashfmt.ChecksumError) as caught:
            opened.tensor(VECTOR, verify=True)
        assert (caught.value.rule, caught.value.where) == ("FF-SUM-3", VECTOR)


def test_a_compressed_tensor_is_always_checked(model, tmp_path):
    zstd(model)
    wrong(MATRIX, crc32c="00000000")(model)
    with (
        flashfmt.open(model.write_file(tmp_path / "tiny.flash")) as opened,
        pytest.raises(flashfmt.ChecksumError),
    ):
        opened.tensor(MATRIX)


@pytest.mark.parametrize("codec", [zstd, blosc])
def test_a_decompression_bomb_takes_no_memory(model, tmp_path, codec):
    codec(model, lambda raw: bytes(64 << 20))
    with flashfmt.open(model.write_file(tmp_path / "tiny.flash")) as opened:
        tracemalloc.start()
        with pytest.raises(flashfmt.FlashFormatError) as caught:
            opened.tensor(MATRIX)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert caught.value.rule == "FF-TEN-3"
    assert peak < 1 << 20


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damaged_frame_escapes_the_taxonomy(tiny, tmp_path, data):
    model = tiny()
    data.draw(st.sampled_from([zstd, blosc]))(model)
    frame = bytearray(model.arrays[MATRIX].payload)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.one_of(st.integers(0, min(40, len(frame) - 1)), st.integers(0, len(frame) - 1)))
        frame[place] = data.draw(st.integers(0, 255))
    model.arrays[MATRIX].replace(bytes(frame[: data.draw(st.integers(len(frame) - 20, len(frame)))]))
    with flashfmt.open(model.write_file(tmp_path / "tiny.flash")) as opened:
        try:
            assert opened.tensor(MATRIX).data.shape == (32, 64)
        except flashfmt.FlashFormatError as error:
            assert error.rule == "FF-TEN-3"  # noqa: PT017


def test_files_predictors_and_statistics(model, tmp_path, container):
    with flashfmt.open(model.write(tmp_path / "tiny.flash", container)) as opened:
        assert json.loads(opened.file("tokenizer")) == {"model": "tiny"}
        assert opened.file("chat_template").decode() == "{{ 'grüße' }}"
        assert opened.file("licence") is None
        assert opened.files["tokenizer"].filename == "tokenizer.json"
        predictor, arrays = opened.predictor(1)
        assert (predictor.kind, predictor.rank, predictor.tap.layer) == ("low_rank", 4, 0)
        assert {name: tensor.shape for name, tensor in arrays.items()} == {"down": (4, 64), "up": (6, 4), "bias": (6,)}
        assert opened.predictor(0) is None
        assert {name: values.shape for name, values in opened.statistics(0).items()} == {
            "firing_frequency": (6,),
            "aggregated_window": (5,),
        }
        assert opened.statistics(2) is None
        assert (opened.container, opened.decoder.n_layers, opened.manifest.name) == (container, 2, "tiny")


def test_a_damaged_file_is_never_handed_out(model, tmp_path):
    wrong("files/tokenizer", sha256="0" * 64)(model)
    with (
        flashfmt.open(model.write_file(tmp_path / "tiny.flash")) as opened,
        pytest.raises(flashfmt.ChecksumError) as caught,
    ):
        opened.file("tokenizer")
    assert caught.value.rule == "FF-SUM-6"


def test_a_model_without_statistics_has_none(model, tmp_path):
    model.manifest["statistics"] = None
    for name in [name for name in model.arrays if "/statistics/" in name]:
        del model.arrays[name]
    with flashfmt.open(model.write_file(tmp_path / "tiny.flash")) as opened:
        assert opened.statistics(0) is None
        opened.verify()


def test_sizes_are_those_of_the_files(model, tmp_path):
    path = model.write_file(tmp_path / "tiny.flash")
    directory = model.write_directory(tmp_path / "tiny")
    with flashfmt.open(path) as opened, flashfmt.open(str(directory)) as other:
        assert opened.nbytes == path.stat().st_size
        assert other.nbytes == sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
        assert opened.verify_nbytes == other.verify_nbytes == other.nbytes


def test_many_threads_read_one_model(tiny, tmp_path, container):
    model = tiny("q4", residents="q8")
    barrier = threading.Barrier(8)
    with flashfmt.open(model.write(tmp_path / "tiny.flash", container)) as opened:

        def read(_):
            barrier.wait()
            opened.bundles(0).verify(range(6))
            opened.verify()
            return opened.tensor(MATRIX).decode().sum() + opened.bundles(1).decode(range(6)).sum()

        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(read, range(8)))) == 1


FOREIGN = [
    (b"", "an empty file"),
    (b"GGUF\3\0\0\0", "GGUF"),
    (struct.pack("<Q", 30) + b'{"a":{"dtype":"F32"}}', "safetensors"),
    (b"hello\nworld\n", "text"),
    ("Füße\n".encode(), "text"),
    (b"PK\3\4 and nothing more", "cut short"),
    (b"PK\5\6" + bytes(18), "ZIP archive, but not a flash model"),
    (b"\x80\x02}q\0.", "pickle"),
    (bytes(5000), "zeros"),
    (b"\x01\x02\xff", "unknown kind"),
]


@pytest.mark.parametrize(("raw", "kind"), FOREIGN, ids=[kind for _, kind in FOREIGN])
def test_other_files_are_called_what_they_are(tmp_path, raw, kind):
    path = tmp_path / "given.flash"
    path.write_bytes(raw)
    with pytest.raises(flashfmt.FlashFormatError, match=kind) as caught:
        flashfmt.open(path)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("name", "raw", "kind"),
    [
        (None, b"", "an empty directory"),
        ("model.safetensors", b"", "checkpoint"),
        ("a.flash", b"", "name one of them"),
        (".zgroup", b"{}", "version 2"),
        ("notes.txt", b"", "without zarr.json"),
        ("zarr.json", b'{"zarr_format":3,"node_type":"group"}', "no manifest"),
        ("zarr.json", b'{"zarr_format":3,"node_type":"group","attributes":{"a":1}}', "no manifest"),
        ("zarr.json", b"", "not JSON"),
    ],
)
def test_other_directories_are_called_what_they_are(tmp_path, name, raw, kind):
    if name:
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(flashfmt.FlashFormatError, match=kind):
        flashfmt.open(tmp_path)


@pytest.mark.parametrize("name", ["nothing", "file/below", "a\0b"])
def test_a_path_that_leads_nowhere(tmp_path, name):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(flashfmt.FlashError) as caught:
        flashfmt.open(tmp_path / name)
    assert caught.value.exit_code == 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs a device that is no file")
def test_a_device_is_refused():
    with pytest.raises(flashfmt.FlashFormatError, match="neither"):
        flashfmt.open("/dev/null")
