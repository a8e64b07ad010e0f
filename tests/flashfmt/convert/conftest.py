"""Fixtures of the conversion tests: configs, GGUF files written field by field, real GGUF weights."""

from pathlib import Path

import numpy as np
import pytest

from flashfmt.convert.config import Config

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
OPT = {
    "model_type": "opt",
    "vocab_size": 320,
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


@pytest.fixture
def config_of():
    """A function (base="llama", **changes) -> Config; a change to `...` removes the key."""

    def build(base="llama", **changes):
        values = {**(OPT if base == "opt" else LLAMA), "model_type": base, **changes}
        return Config({key: value for key, value in values.items() if value is not ...}, Path("config.json"))

    return build


@pytest.fixture
def write_gguf(tmp_path):
    """A function (architecture, metadata, tensors, name="model.gguf") -> path of a GGUF file, written by `gguf`.

    Metadata values are str, bool, int, float or lists of one of them; tensors are arrays, or (array, type) where the
    array is quantised to the type.
    """
    gguf = pytest.importorskip("gguf")

    def write(architecture, metadata, tensors, name="model.gguf"):
        writer = gguf.GGUFWriter(tmp_path / name, architecture)
        for key, value in metadata.items():
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)
        for tensor, value in tensors.items():
            if isinstance(value, tuple):
                packed = gguf.quantize(np.ascontiguousarray(value[0], np.float32), value[1])
                writer.add_tensor(tensor, packed, raw_dtype=value[1])
            else:
                writer.add_tensor(tensor, np.ascontiguousarray(value))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    return write
