"""Build the suite: `python conformance/generate.py [FOLDER]`. The same bytes every time, on every machine.

Writes `valid/`, `invalid/` and the index `cases.json`. Needs numpy; imports nothing of flashfmt.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from generator.cases import SPEC_VERSION, Case
from generator.invalid_cases import Fault, faults
from generator.model import Model
from generator.recipes import recipes
from generator.valid_cases import model_cases, window_cases


def build(root: Path) -> None:
    """Write the whole suite below `root`; what stood there is removed."""
    for folder in ("valid", "invalid"):
        shutil.rmtree(root / folder, ignore_errors=True)
        (root / folder).mkdir(parents=True)
    index = [case.write(root) for case in [*_valid(root), *_invalid(root)]]
    document = {"protocol": 1, "spec_versions": [SPEC_VERSION], "cases": index}
    text = json.dumps(document, indent=1, sort_keys=True) + "\n"
    (root / "cases.json").write_text(text, encoding="ascii")


def _valid(root: Path) -> Iterator[Case]:
    for recipe in recipes():
        model = Model(recipe)
        if recipe.container == "file":
            path = f"valid/{recipe.name}.flash"
            (root / path).write_bytes(model.file)
        else:
            path = f"valid/{recipe.name}"
            model.hierarchy.write_directory(root / path)
        yield from model_cases(model, path)
    yield from window_cases()


def _invalid(root: Path) -> Iterator[Case]:
    seen: set[str] = set()
    for fault in faults():
        if fault.name in seen:
            raise ValueError(f"two cases are called {fault.name}")
        seen.add(fault.name)
        yield _write_fault(fault, root)


def _write_fault(fault: Fault, root: Path) -> Case:
    path = f"invalid/{fault.name}"
    if isinstance(fault.content, bytes):
        path += ".flash"
        (root / path).write_bytes(fault.content)
    elif fault.content is not None:
        for key, data in fault.content.items():
            target = root / path / key
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    container = "file" if isinstance(fault.content, bytes) else "directory"
    needs = {"containers": [container], "codecs": sorted({"raw", *fault.codecs})}
    request = {"level": fault.level, "path": path} | ({"bundles": [[0, 0]]} if fault.level == "structure" else {})
    return Case(
        f"invalid/{fault.name}",
        fault.level,
        request,
        rules=fault.rules,
        needs=needs,
        recipe=fault.recipe,
        fault=fault.description,
    )


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
