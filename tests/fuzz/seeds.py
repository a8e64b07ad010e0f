"""Valid models to start from, built by the byte-by-byte builder of tests/flashfmt/conftest.py.

Knows: what variety of models reaches which code. Does not know: mutations.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd

BUILDER = Path(__file__).parents[1] / "flashfmt" / "conftest.py"
MATRICES = ("embedding/tokens", "logits/weight", "layers/0/attention/q/weight")


def load_builder() -> ModuleType:
    """The module with TinyModel; it is a conftest, hence no import by name."""
    spec = importlib.util.spec_from_file_location("tiny_models", BUILDER)
    if spec is None or spec.loader is None:
        raise ImportError(f"no builder of models at {BUILDER}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def seeds(builder: ModuleType | None = None) -> list[bytes]:
    """Single files, each a valid model: plain and quantised, raw and compressed, with and without optional parts."""
    tiny = (builder or load_builder()).TinyModel
    models = [
        _slim(tiny("f16")),
        _compressed(_slim(tiny("f32", residents="f32"))),
        _extended(_slim(tiny("bf16", residents="bf16"))),
        _slim(tiny("q8", residents="q8")),
        _low_bit_gate(tiny("q4", residents="q4")),
        tiny("f16", residents="q4"),
    ]
    return [bytes(model.zip().data) for model in models]


def _slim(model: Any) -> Any:
    """One layer and no predictor: half the documents, so twice the inputs a second."""
    for name in [name for name in model.arrays if name.startswith("layers/1/")]:
        del model.arrays[name]
    model.manifest["decoder"]["layers"].pop()
    model.manifest["predictors"] = []
    return model


def _compressed(model: Any) -> Any:
    """Matrices under zstd and blosc in turn."""
    codecs: list[tuple[Any, dict[str, Any]]] = [
        (Zstd(3), {"name": "zstd", "configuration": {"level": 3}}),
        (Blosc("lz4", 5, Blosc.SHUFFLE), _blosc("lz4", "shuffle")),
        (Blosc("zstd", 5, Blosc.BITSHUFFLE), _blosc("zstd", "bitshuffle")),
    ]
    for name, (codec, configuration) in zip(MATRICES, codecs, strict=True):
        array = model.arrays[name]
        array.document["codecs"].append(configuration)
        array.replace(bytes(codec.encode(np.frombuffer(array.payload, np.uint8))))
    return model


def _blosc(cname: str, shuffle: str) -> dict[str, Any]:
    return {"name": "blosc", "configuration": {"cname": cname, "clevel": 5, "shuffle": shuffle, "typesize": 1}}


def _extended(model: Any) -> Any:
    """Extension arrays of every type, optional features, fields of the future."""
    model.manifest |= {"optional_features": ["later"], "future": {"deep": [1, 2.5, None]}}
    model.manifest["decoder"]["attention"]["qk_norm"] = {"kind": "rms_norm", "eps": 1e-6, "weight": False}
    model.add("extensions/scalars", "u8", [7], bytes(range(7)))
    model.add("extensions/cube", "u32", [2, 1, 3], bytes(range(24)))
    model.add("extensions/halves", "f16", [1, 5], bytes(10), {"name": "zstd", "configuration": {"level": 0}})
    model.arrays["extensions/halves"].replace(bytes(Zstd(0).encode(bytes(10))))
    return model


def _low_bit_gate(model: Any) -> Any:
    """A predictor of the other kind."""
    for name in [name for name in model.arrays if "/predictor/" in name]:
        del model.arrays[name]
    model.manifest["predictors"] = [{"layer": 0, "kind": "low_bit_gate", "tap": {"layer": 0}, "threshold": 0.1}]
    model.matrix("layers/0/predictor/gate", model.manifest["decoder"]["ffn"]["d_ff"], 64)
    return model
