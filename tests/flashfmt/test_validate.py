"""Each rule that metadata can break, broken once; the reader must name that rule."""

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flashfmt
from flashfmt.manifest import Manifest, required_arrays

BUNDLES = "layers/0/ffn/bundles"
MATRIX = "layers/0/attention/q/weight"
VECTOR = "final_norm/weight"


def ours(name, **fields):
    return lambda m: m.arrays[name].ours.update(fields)


def document(name, **fields):
    return lambda m: m.arrays[name].document.update(fields)


def decoder(**fields):
    return lambda m: m.manifest["decoder"].update(fields)


def section(name, **fields):
    return lambda m: m.manifest["decoder"][name].update(fields)


def predictor(**fields):
    return lambda m: m.manifest["predictors"][0].update(fields)


def sharding(**fields):
    return lambda m: m.arrays[BUNDLES].document["codecs"][0]["configuration"].update(fields)


def raw_document(raw):
    return lambda m: m.groups.update(layers=raw)


def positions(m):
    m.manifest["decoder"]["positions"] = {"n_rows": 100}


def second_predictor(m):
    m.manifest["predictors"].append(m.manifest["predictors"][0])


def second_rotary(m):
    m.manifest["decoder"]["rotary"].append({"name": "main", "n_dims": 8})


def drop(name):
    return lambda m: m.arrays.pop(name)


def extra_vector(name):
    return lambda m: m.vector(name, 4)


def remove_group(m):
    m.groups["layers/0/ffn"] = {}


def node_below_array(m):
    m.vector(f"{VECTOR}/deeper", 4)
    m.groups[VECTOR] = {}


def chunk_missing(m):
    m.extra["extensions/a/zarr.json"] = json.dumps(m.arrays[VECTOR].document).encode()
    m.groups["extensions"] = {"zarr_format": 3, "node_type": "group", "attributes": {}}


def extension_of_other_kind(m):
    m.arrays["extensions/a"] = m.arrays["files/tokenizer"]


def compressed_file(m):
    m.arrays["files/tokenizer"].document["codecs"].append({"name": "zstd"})


def grid(shape):
    return {"name": "regular", "configuration": {"chunk_shape": shape}}


def large_file(m):
    shape = [(256 << 20) + 1]
    m.arrays["files/tokenizer"].document.update(shape=shape, chunk_grid=grid(shape))


def reshaped(name, shape):
    def change(m):
        m.arrays[name].document.update(shape=shape, chunk_grid=grid(shape))
        if m.arrays[name].ours["kind"] == "tensor":
            m.arrays[name].ours["shape"] = shape

    return change


def wide_row(m):
    m.add("extensions/a", "q8", [1, 1 << 25], b"x")


def odd_quantised(m):
    m.add("extensions/a", "q4", [2, 32], bytes(64))


def quantised_vector(m):
    m.add("extensions/a", "q4", [64], bytes(64))


def as_bfloat(m):
    m.add(VECTOR, "bf16", [64], bytes(128))


def transposed(m):
    m.add("layers/0/attention/k/weight", "f16", [64, 32], bytes(4096))


def checksum_field_twice(m):
    m.root_attributes["note"] = {"metadata_crc32c": "00000000"}


def stale_checksum(m):
    m.manifest["metadata_crc32c"] = "12345678"


def deep(depth):
    return b'{"a":' * depth + b"1" + b"}" * depth


def group_with(text):
    return b'{"zarr_format":3,"node_type":"group","attributes":{"a":' + text + b"}}"


BREAKS = [
    ("FF-JSON-1", raw_document(b"\xef\xbb\xbf{}")),
    ("FF-JSON-1", raw_document(group_with(b'"\xff"'))),
    ("FF-JSON-2", raw_document(b"{")),
    ("FF-JSON-2", raw_document(group_with(b"1") + b"x")),
    ("FF-JSON-3", raw_document(group_with(b'{"b":1,"b":1}'))),
    ("FF-JSON-4", raw_document(group_with(b"NaN"))),
    ("FF-JSON-4", raw_document(group_with(b"-Infinity"))),
    ("FF-JSON-4", raw_document(group_with(b"1e999"))),
    ("FF-JSON-4", raw_document(group_with(b"18446744073709551616"))),
    ("FF-JSON-4", raw_document(group_with(b"9" * 5000))),
    ("FF-JSON-5", raw_document(b"[]")),
    ("FF-JSON-6", raw_document(group_with(rb'"\ud800"'))),
    ("FF-LIM-3", raw_document(b" " * (1 << 20) + b"{}")),
    ("FF-LIM-4", raw_document(group_with(deep(31)))),
    ("FF-LIM-4", raw_document(b"[" * 1_000_000)),
    ("FF-MAN-1", lambda m: m.root_attributes.pop("flashfmt")),
    ("FF-MAN-1", lambda m: m.root_attributes.update(flashfmt=[])),
    ("FF-MAN-2", decoder(d_model=True)),
    ("FF-MAN-2", decoder(d_model=0)),
    ("FF-MAN-2", decoder(layers=[])),
    ("FF-MAN-2", lambda m: m.manifest["decoder"].pop("norm")),
    ("FF-MAN-2", section("norm", eps=0)),
    ("FF-MAN-2", section("norm", kind="batch_norm")),
    ("FF-MAN-2", section("norm", bias=1)),
    ("FF-MAN-2", lambda m: m.manifest["decoder"]["rotary"][0].update(name="main\n")),
    ("FF-MAN-3", second_rotary),
    ("FF-MAN-3", lambda m: m.manifest["decoder"]["layers"][1].update(rotary="other")),
    ("FF-MAN-4", section("attention", n_kv_heads=3)),
    ("FF-MAN-5", lambda m: m.manifest["decoder"]["rotary"][0].update(n_dims=18)),
    ("FF-MAN-6", section("embedding", d_embed=32)),
    ("FF-MAN-6", section("embedding", projection=True)),
    ("FF-MAN-7", lambda m: m.manifest["tokens"].update(bos=32)),
    ("FF-MAN-7", lambda m: m.manifest["tokens"].update(eos=[2, 32])),
    ("FF-MAN-8", positions),
    ("FF-MAN-9", decoder(block={"shared_norm": True})),
    ("FF-MAN-9", section("ffn", kind="plain", gate_bias=True)),
    ("FF-MAN-10", extra_vector("layers/0/surplus")),
    ("FF-MAN-10", extra_vector("layers/2/ffn/up_bias")),
    ("FF-MAN-10", lambda m: m.arrays.update({"layers/2/ffn/bundles": m.arrays[BUNDLES]})),
    ("FF-MAN-10", lambda m: m.arrays.update({"layers/00/ffn/bundles": m.arrays[BUNDLES]})),
    ("FF-MAN-11", drop(BUNDLES)),
    ("FF-MAN-11", drop(MATRIX)),
    ("FF-MAN-11", decoder(layers=[{}] * 10_000)),
    ("FF-MAN-12", transposed),
    ("FF-MAN-13", as_bfloat),
    ("FF-PRED-1", predictor(layer=2)),
    ("FF-PRED-1", second_predictor),
    ("FF-PRED-2", predictor(tap={"layer": 2})),
    ("FF-PRED-3", lambda m: m.manifest["predictors"][0].pop("rank")),
    ("FF-PRED-3", predictor(kind="low_bit_gate", bias=False)),
    ("FF-PRED-4", predictor(threshold=1.5)),
    ("FF-ARR-1", raw_document(b'{"zarr_format":2}')),
    ("FF-ARR-1", raw_document(b'{"zarr_format":3,"node_type":"blob"}')),
    ("FF-ARR-1", raw_document(b'{"zarr_format":3.5,"node_type":"group"}')),
    ("FF-ARR-2", raw_document(b'{"zarr_format":3,"node_type":"group","attributes":{},"more":1}')),
    ("FF-ARR-2", remove_group),
    ("FF-ARR-2", node_below_array),
    ("FF-ARR-3", document(VECTOR, more=1)),
    ("FF-ARR-3", document(VECTOR, storage_transformers=["x"])),
    ("FF-ARR-3", document(VECTOR, dimension_names=["x", "y"])),
    ("FF-ARR-4", reshaped(VECTOR, [0])),
    ("FF-ARR-4", document(VECTOR, shape=[])),
    ("FF-ARR-4", document(VECTOR, shape=[True])),
    ("FF-ARR-4", reshaped(VECTOR, [1] * 9)),
    ("FF-ARR-5", document(VECTOR, chunk_grid=grid([32]))),
    ("FF-ARR-5", document(VECTOR, chunk_grid={"name": "other"})),
    ("FF-ARR-6", document(VECTOR, chunk_key_encoding={"name": "default", "configuration": {"separator": "."}})),
    ("FF-ARR-7", document(VECTOR, fill_value=1)),
    ("FF-ARR-7", document(VECTOR, fill_value=False)),
    ("FF-ARR-7", document(VECTOR, fill_value="NaN")),
    ("FF-ARR-8", document(VECTOR, codecs=[{"name": "bytes", "configuration": {"endian": "big"}}])),
    ("FF-ARR-8", document(VECTOR, codecs=[{"name": "bytes"}])),
    ("FF-ARR-8", document(VECTOR, codecs=[{"name": "numcodecs.bz2"}])),
    ("FF-ARR-8", document(VECTOR, codecs=[{"name": "zstd"}])),
    ("FF-ARR-8", lambda m: m.arrays[VECTOR].document["codecs"].append(m.arrays[VECTOR].document["codecs"][0])),
    ("FF-ARR-8", compressed_file),
    ("FF-ARR-8", document(BUNDLES, codecs=[{"name": "bytes", "configuration": {"endian": "little"}}])),
    ("FF-ARR-9", document(VECTOR, data_type="int32")),
    ("FF-ARR-9", document(VECTOR, data_type=["float32"])),
    ("FF-ARR-10", document(VECTOR, attributes={})),
    ("FF-ARR-10", ours(VECTOR, kind="other")),
    ("FF-ARR-10", ours(VECTOR, encoding="q5")),
    ("FF-ARR-10", ours(VECTOR, crc32c="ABCDEF01")),
    ("FF-ARR-10", ours(VECTOR, crc32c="abcdef01\n")),
    ("FF-ARR-10", extension_of_other_kind),
    ("FF-ARR-11", lambda m: m.extra.update({"surplus": b"x"})),
    ("FF-ARR-11", lambda m: m.extra.update({"final_norm/weight/c/1": b"x"})),
    ("FF-ARR-12", chunk_missing),
    ("FF-TEN-1", ours(VECTOR, shape=[32])),
    ("FF-TEN-1", odd_quantised),
    ("FF-TEN-1", quantised_vector),
    ("FF-TEN-2", lambda m: m.arrays[VECTOR].replace(bytes(255))),
    ("FF-TEN-2", lambda m: m.arrays[VECTOR].replace(bytes(257))),
    ("FF-TEN-2", lambda m: m.arrays["files/tokenizer"].replace(bytes(3))),
    ("FF-BND-1", ours(BUNDLES, parts=["up", "gate", "down"])),
    ("FF-BND-1", ours(BUNDLES, n_neurons=5)),
    ("FF-BND-1", ours(BUNDLES, d_model=128)),
    ("FF-BND-2", ours(BUNDLES, encoding="u8")),
    ("FF-BND-3", ours(BUNDLES, part_nbytes=64)),
    ("FF-BND-3", ours(BUNDLES, row_nbytes=256)),
    ("FF-BND-4", reshaped(BUNDLES, [6, 64, 3])),
    ("FF-BND-5", sharding(index_location="start")),
    ("FF-BND-5", sharding(chunk_shape=[2, 3, 64])),
    ("FF-BND-5", sharding(index_codecs=[{"name": "bytes", "configuration": {"endian": "little"}}])),
    ("FF-BND-5", sharding(codecs=[{"name": "bytes"}])),
    ("FF-BND-6", ours(BUNDLES, stride=128, alignment=64)),
    ("FF-BND-7", ours(BUNDLES, stride=1024)),
    ("FF-BND-7", lambda m: m.arrays[BUNDLES].replace(m.arrays[BUNDLES].payload + b"\0")),
    ("FF-ALIGN-4", ours(BUNDLES, alignment=96)),
    ("FF-ALIGN-4", ours(BUNDLES, alignment=32)),
    ("FF-ALIGN-4", ours(BUNDLES, alignment=65536)),
    ("FF-ALIGN-5", ours(BUNDLES, alignment=1024)),
    ("FF-FILE-1", lambda m: m.arrays.update({"layers/0/licence": m.arrays["files/tokenizer"]})),
    ("FF-FILE-1", lambda m: m.add_file("0licence", "licence", b"x")),
    ("FF-FILE-2", ours("files/tokenizer", filename="../tokenizer.json")),
    ("FF-FILE-2", ours("files/tokenizer", filename="..")),
    ("FF-FILE-2", ours("files/tokenizer", filename="a\\b")),
    ("FF-FILE-2", ours("files/tokenizer", filename="")),
    ("FF-LIM-5", section("ffn", d_ff=(1 << 24) + 1)),
    ("FF-LIM-5", ours(BUNDLES, n_neurons=(1 << 24) + 1)),
    ("FF-LIM-6", ours(BUNDLES, row_nbytes=(16 << 20) + 1)),
    ("FF-LIM-6", wide_row),
    ("FF-LIM-7", reshaped(VECTOR, [(1 << 31) + 1])),
    ("FF-LIM-8", large_file),
    ("FF-SUM-1", stale_checksum),
    ("FF-SUM-2", checksum_field_twice),
]


@pytest.mark.parametrize(("rule", "change"), BREAKS, ids=[f"{i}-{rule}" for i, (rule, _) in enumerate(BREAKS)])
def test_a_broken_rule_is_named(model, tmp_path, rule, change):
    change(model)
    path = model.write_file(tmp_path / "tiny.flash")
    with pytest.raises(flashfmt.FlashFormatError) as caught:
        flashfmt.open(path)
    assert caught.value.rule == rule, str(caught.value)
    assert caught.value.path == path
    assert caught.value.where is not None
    assert rule in str(caught.value)


@pytest.mark.parametrize("rule", ["FF-MAN-12", "FF-BND-7", "FF-SUM-1"])
def test_a_directory_is_held_to_the_same_rules(model, tmp_path, rule):
    next(change for name, change in BREAKS if name == rule)(model)
    with pytest.raises(flashfmt.FlashFormatError) as caught:
        flashfmt.open(model.write_directory(tmp_path / "tiny"))
    assert caught.value.rule == rule


def test_the_root_must_be_a_group(model, tmp_path):
    path = model.write_directory(tmp_path / "tiny")
    (path / "zarr.json").write_bytes((path / "final_norm/weight/zarr.json").read_bytes())
    with pytest.raises(flashfmt.FlashFormatError) as caught:
        flashfmt.open(path)
    assert caught.value.rule == "FF-ARR-1"


def test_a_misplaced_bundles_payload_is_refused(model, tmp_path):
    model.arrays[BUNDLES].alignment = 128
    with pytest.raises(flashfmt.FlashFormatError) as caught:
        flashfmt.open(model.write_file(tmp_path / "tiny.flash"))
    assert caught.value.rule == "FF-ALIGN-1"


@pytest.mark.parametrize("version", ["2.0", "0.9", "12.3"])
def test_an_unknown_major_version_is_unsupported_whatever_follows(model, tmp_path, version):
    model.manifest.clear()
    model.manifest.update(version=version, something="else")
    with pytest.raises(flashfmt.UnsupportedError, match=re.escape(version)) as caught:
        flashfmt.open(model.write_file(tmp_path / "tiny.flash"))
    assert (caught.value.rule, caught.value.exit_code) == ("FF-VER-1", 4)


@pytest.mark.parametrize("version", ["1", "1.0.0", "01.0", "1.x", 1, None, "1.0\n", "\u0662.\u0660"])
def test_a_version_that_is_none_is_refused(model, tmp_path, version):
    model.manifest["version"] = version
    with pytest.raises(flashfmt.FlashFormatError) as caught:
        flashfmt.open(model.write_file(tmp_path / "tiny.flash"))
    assert caught.value.rule == "FF-VER-3"


def test_a_newer_minor_version_with_unknown_fields_is_read(model, tmp_path):
    model.manifest.update(version="1.7", novelty=[1], optional_features=["speed"])
    with flashfmt.open(model.write_file(tmp_path / "tiny.flash")) as opened:
        assert opened.manifest.version == "1.7"


def test_an_unknown_required_feature_is_unsupported(model, tmp_path):
    model.manifest.update(required_features=["mixture_of_experts"], decoder={})
    with pytest.raises(flashfmt.UnsupportedError, match="mixture_of_experts") as caught:
        flashfmt.open(model.write_file(tmp_path / "tiny.flash"))
    assert caught.value.rule == "FF-VER-2"


def test_extensions_may_hold_other_tensors(model, tmp_path, container):
    model.vector("extensions/acme/gain", 3)
    with flashfmt.open(model.write(tmp_path / "tiny.flash", container)) as opened:
        opened.verify()
        assert opened.tensor("extensions/acme/gain").decode().shape == (3,)


def test_the_builder_lists_what_the_manifest_calls_for(model, tmp_path):
    with flashfmt.open(model.write_file(tmp_path / "tiny.flash")) as opened:
        assert set(opened.tensors) == set(required_arrays(opened.manifest))
        assert isinstance(opened.manifest, Manifest)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


def read_everything(path):
    """Open and verify; only flashfmt's own errors may escape."""
    try:
        with flashfmt.open(path) as opened:
            for layer in range(len(opened.layers)):
                opened.bundles(layer)
            opened.verify()
    except flashfmt.FlashError as error:
        return error
    return None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damaged_file_escapes_the_taxonomy(tiny, scratch, data):
    z = tiny().zip()
    raw = bytearray(z.data)
    metadata_stop = z.payload["embedding/tokens/c/0/0"]
    places = st.one_of(
        st.integers(0, metadata_stop - 1),
        st.integers(min(z.central.values()), len(raw) - 1),
        st.integers(0, len(raw) - 1),
    )
    flips = data.draw(
        st.lists(st.tuples(places, st.integers(1, 255)), min_size=1, max_size=4, unique_by=lambda f: f[0])
    )
    for place, mask in flips:
        raw[place] ^= mask
    path = scratch / "flipped.flash"
    path.write_bytes(raw)
    assert read_everything(path) is not None, "a flipped byte went unnoticed"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_truncated_file_escapes_the_taxonomy(tiny, scratch, data):
    raw = tiny().zip().data
    length = data.draw(st.integers(0, len(raw) - 1))
    path = scratch / "truncated.flash"
    path.write_bytes(raw[:length])
    error = read_everything(path)
    assert isinstance(error, flashfmt.FlashFormatError)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 1 << 33)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


def leaves(value, place=()):
    yield place
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], (*place, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from leaves(value[index], (*place, index))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_other_json_value_escapes_the_taxonomy(tiny, scratch, data):
    model = tiny()
    names = ["manifest", BUNDLES, MATRIX, "files/tokenizer"]
    name = data.draw(st.sampled_from(names))
    root = model.manifest if name == "manifest" else model.arrays[name].document
    place = data.draw(st.sampled_from([place for place in leaves(root) if place]))
    for step in place[:-1]:
        root = root[step]
    root[place[-1]] = data.draw(json_values)
    read_everything(model.write_file(scratch / "changed.flash"))
