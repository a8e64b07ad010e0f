"""Checkpoint directories: what is read, and what each kind of incomplete or foreign directory is refused for."""

import json
import struct

import numpy as np
import pytest

from flashfmt.convert import open_checkpoint
from flashfmt.convert.safetensors_source import SafetensorsCheckpoint
from flashfmt.encodings import Encoding
from flashfmt.errors import CheckpointError

DTYPES = {"<f4": "F32", "<f2": "F16", "<u2": "BF16", "|u1": "U8", "<i4": "I32"}


def safetensors_bytes(tensors, **changes):
    """A safetensors file; `changes` replace entries of the header."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, data in tensors.items():
        begin = len(body)
        body += data.tobytes()
        header[name] = {
            "dtype": DTYPES[data.dtype.str],
            "shape": list(data.shape),
            "data_offsets": [begin, len(body)],
        }
    text = json.dumps({**header, **changes}).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return {
        "a": rng.standard_normal((5, 3)).astype("<f4"),
        "b": rng.standard_normal(7).astype("<f2"),
        "c": rng.integers(0, 0x7F00, (4, 2, 3)).astype("<u2"),
    }


@pytest.fixture
def directory(tmp_path, weights):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(weights))
    return tmp_path


def refusal(directory):
    with pytest.raises(CheckpointError) as caught:
        SafetensorsCheckpoint(directory)
    return caught.value


def test_tensors_are_read_whole_and_by_rows(directory, weights):
    checkpoint = SafetensorsCheckpoint(directory)
    encodings = {"a": Encoding.F32, "b": Encoding.F16, "c": Encoding.BF16}
    assert {name: info.encoding for name, info in checkpoint.tensors.items()} == encodings
    for name, data in weights.items():
        whole = checkpoint.read(name)
        assert whole.encoding is encodings[name]
        np.testing.assert_array_equal(whole.data, data)
        np.testing.assert_array_equal(checkpoint.read(name, 1, 3).data, data[1:3])
        np.testing.assert_array_equal(checkpoint.read(name, 3, 99).data, data[3:])
    checkpoint.close()


def shard(directory, weights):
    (directory / "model.safetensors").unlink()
    names = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    for file in sorted(set(names.values())):
        held = {name: data for name, data in weights.items() if names[name] == file}
        (directory / file).write_bytes(safetensors_bytes(held))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def test_shards(directory, weights):
    shard(directory, weights)
    checkpoint = SafetensorsCheckpoint(directory)
    for name, data in weights.items():
        np.testing.assert_array_equal(checkpoint.read(name).data, data)
    checkpoint.close()


def test_a_missing_shard_is_named(directory, weights):
    shard(directory, weights)
    (directory / "model-2.safetensors").unlink()
    assert "missing shard model-2.safetensors" in str(refusal(directory))


def test_an_index_and_its_shards_must_agree(directory, weights):
    shard(directory, weights)
    index = directory / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**names, "d": "model-2.safetensors"}}))
    assert "d: the index says model-2.safetensors holds a tensor that it lacks" in str(refusal(directory))
    del names["b"]
    index.write_text(json.dumps({"weight_map": names}))
    assert "b: model-1.safetensors holds a tensor that the index lacks" in str(refusal(directory))
    index.write_text(json.dumps({"weight_map": {**names, "b": "../model-1.safetensors"}}))
    assert "no plain file name" in str(refusal(directory))
    index.write_text("{}")
    assert "weight_map" in str(refusal(directory))


def entry(**changes):
    return {"a": {"dtype": "F32", "shape": [5, 3], "data_offsets": [0, 60], **changes}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (entry(shape=[5, 4]), "size contradicts shape"),
        (entry(shape=[5, -3]), "bad shape"),
        (entry(shape=[True, 3]), "bad shape"),
        (entry(shape=[1 << 40, 1 << 40]), "size contradicts shape"),
        (entry(data_offsets=[60, 0]), "bad data_offsets"),
        (entry(data_offsets=[0]), "bad data_offsets"),
        (entry(data_offsets=[4, 64]), "overlap or leave a gap"),
        (entry(dtype="F64", shape=[5, 3]), "unsupported dtype"),
        (entry(dtype=32), "dtype is not a string"),
        ({"a": {"dtype": "F32"}}, "lacks dtype, shape or data_offsets"),
        ({"a": []}, "lacks dtype, shape or data_offsets"),
        ({"d": {"dtype": "F32", "shape": [1], "data_offsets": [122, 126]}}, "truncated, or with bytes after"),
        ({"d": {"dtype": "F32", "shape": [0], "data_offsets": [122, 122]}}, "empty or scalar tensor"),
        ({"d": {"dtype": "F32", "shape": [15], "data_offsets": [0, 60]}}, "overlap or leave a gap"),
    ],
)
def test_bad_headers_are_refused(directory, weights, changes, reason):
    (directory / "model.safetensors").write_bytes(safetensors_bytes(weights, **changes))
    assert reason in str(refusal(directory))


def test_every_truncation_is_refused(directory):
    whole = (directory / "model.safetensors").read_bytes()
    for length in range(0, len(whole), 7):
        (directory / "model.safetensors").write_bytes(whole[:length])
        assert "truncated" in str(refusal(directory))
    (directory / "model.safetensors").write_bytes(whole + b"\0")
    assert "truncated, or with bytes after" in str(refusal(directory))


def test_a_file_that_shrinks_while_read_is_refused(directory):
    checkpoint = SafetensorsCheckpoint(directory)
    with (directory / "model.safetensors").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(CheckpointError, match="truncated while being read"):
        checkpoint.read("c")
    checkpoint.close()


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": ' + "[" * 100_000, "\x00"])
def test_a_config_must_be_a_json_object(directory, text):
    (directory / "config.json").write_text(text)
    error = refusal(directory)
    assert "not valid JSON" in str(error) or "not a JSON object" in str(error)
    assert error.path.name == "config.json"


def test_foreign_directories_are_refused_with_advice(directory):
    def quantised(config):
        (directory / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
        return str(refusal(directory))

    assert "already quantised" in quantised({"quant_method": "gptq", "bits": 4})
    assert "got awq" in quantised({"quant_method": "awq"})
    (directory / "config.json").write_text('{"model_type": "llama"}')
    packed = safetensors_bytes({"model.layers.0.mlp.up_proj.qweight": np.zeros((2, 2), "<i4")})
    (directory / "model.safetensors").write_bytes(packed)
    assert "already quantised" in str(refusal(directory))
    (directory / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in str(refusal(directory))
    (directory / "pytorch_model.bin").write_bytes(b"")
    assert "save them as safetensors" in str(refusal(directory))
    (directory / "config.json").unlink()
    assert "no config.json" in str(refusal(directory))
    (directory / "adapter_config.json").write_text("{}")
    assert "merge it into the base model" in str(refusal(directory))


def test_files_keep_their_bytes_and_roles(directory):
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "tokenizer_config.json").write_text('{"chat_template": "old"}')
    (directory / "LICENSE").write_text("Apache")
    (directory / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model")
    checkpoint = SafetensorsCheckpoint(directory)
    assert checkpoint.files["chat_template"].content == b"old"
    assert checkpoint.files["licence"].content == b"Apache"
    assert checkpoint.licence == "apache-2.0"
    (directory / "chat_template.jinja").write_text("new")
    assert SafetensorsCheckpoint(directory).files["chat_template"].content == b"new"
    listed = '{"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]}'
    (directory / "tokenizer_config.json").write_text(listed)
    (directory / "chat_template.jinja").unlink()
    assert SafetensorsCheckpoint(directory).files["chat_template"].content == b"d"


def test_a_tokenizer_without_tokenizer_json_is_refused_with_advice(directory):
    (directory / "tokenizer.model").write_bytes(b"\x0a")
    assert "save_pretrained" in str(refusal(directory))


def test_the_identity_changes_with_the_source(directory, weights):
    def identities():
        checkpoint = SafetensorsCheckpoint(directory)
        checkpoint.close()
        return checkpoint.sha256, checkpoint.fingerprint

    before = identities()
    assert identities() == before
    path = directory / "model.safetensors"
    path.touch()
    touched = identities()
    assert touched[0] == before[0]
    assert touched[1] != before[1]
    path.write_bytes(safetensors_bytes({**weights, "d": np.zeros(1, "<f4")}))
    assert identities()[0] != before[0]


def test_sources_that_do_not_exist_or_are_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        open_checkpoint(tmp_path / "absent" / "model")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="give the directory that holds it"):
        open_checkpoint(tmp_path / "model.safetensors")
