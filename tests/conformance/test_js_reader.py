"""The reader on zarrita: what `test_readers` does not ask of all."""

import json
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "conformance" / "readers" / "js"


def test_the_lock_names_no_registry():
    text = (FOLDER / "package-lock.json").read_text(encoding="utf-8")
    assert "http" not in text
    assert json.loads(text)["packages"]["node_modules/zarrita"]["version"] == "0.7.5"
