"""Who may import what (docs/architecture.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for package in ("flashfmt", "reference_engine") for p in (ROOT / package).rglob("*.py"))
ENGINE_MAY_USE = {
    "flashfmt",
    "flashfmt.encodings",
    "flashfmt.errors",
    "flashfmt.layout",
    "flashfmt.manifest",
}
ONLY_IN = {
    "cupy": "reference_engine/backends/cupy_",
    "gguf": "flashfmt/convert/gguf_source.py",
    "kvikio": "reference_engine/device_direct.py",
    "huggingface_hub": "flashfmt/convert/hub.py",
    "llvmlite": "reference_engine/backends/numba_",
    "numba": ("reference_engine/backends/numba_", "reference_engine/flash_io/numba_"),
    "zarr": ("flashfmt/zarr_store.py", "reference_engine/calibration/scratch.py"),
}
NOWHERE = {"accelerate", "safetensors", "tensorstore", "transformers"}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_respect_the_layers(path):
    name = str(path.relative_to(ROOT))
    for module in imported_modules(path):
        top = module.split(".")[0]
        assert top not in NOWHERE
        assert top != "torch" or name == "reference_engine/training/torch_fit.py"
        assert top not in ONLY_IN or name.startswith(ONLY_IN[top])
        if name.startswith("flashfmt/"):
            assert top != "reference_engine"
        elif top == "flashfmt":
            assert module in ENGINE_MAY_USE


def test_opening_a_file_loads_no_heavy_library():
    code = "import flashfmt, sys; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"zarr", "numba", "torch", "transformers", "tokenizers", "gguf", "rich"} & set(loaded)


def test_torch_is_loaded_only_when_it_is_asked_for():
    code = (
        "import sys, reference_engine.engine, reference_engine.calibration, reference_engine.training as t;"
        "t.load_fitter('numpy'); print(*{m.split('.')[0] for m in sys.modules})"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in loaded
    assert "torch" not in loaded
