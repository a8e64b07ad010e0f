"""Writes docs/manifest.schema.json: the manifest's typed model as a JSON Schema, for readers in other languages.

Run without arguments it writes the file; with ``--check`` it exits with 1 if the file is not what it would write.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

import msgspec

from flashfmt.manifest import FORMAT_VERSION, Manifest

PATH: Final = Path(__file__).parents[1] / "docs" / "manifest.schema.json"
_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


def manifest_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the manifest; unknown fields are allowed, as readers must ignore them."""
    return {
        "$schema": _DIALECT,
        "title": f"flashfmt manifest, version {FORMAT_VERSION}",
        **msgspec.json.schema(Manifest),
    }


def render() -> str:
    """Text of the schema file."""
    return json.dumps(manifest_schema(), indent=2, ensure_ascii=True) + "\n"


def main() -> int:
    """Write the file, or compare it under ``--check``; the exit status."""
    if sys.argv[1:] == ["--check"]:
        return 0 if PATH.is_file() and PATH.read_text(encoding="ascii") == render() else 1
    PATH.write_text(render(), encoding="ascii")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
