"""What a case is, on disk and in the index. Knows: the case format of README.md."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]

SPEC_VERSION = "1.0"


@dataclass
class Case:
    """One request and what a correct reader does with it: answers `expected`, or names one of `rules`."""

    id: str
    level: str
    request: Json
    expected: Json | None = None
    rules: list[str] = field(default_factory=list)
    needs: Json = field(default_factory=dict)
    approximate: Json = field(default_factory=dict)
    recipe: Json | None = None
    fault: str = ""

    def write(self, root: Path) -> Json:
        """Write the case's file; returns its entry in the index."""
        content: Json = {"request": self.request}
        if self.expected is not None:
            content["expected"] = self.expected
        if self.approximate:
            content["approximate"] = self.approximate
        if self.rules:
            content |= {"rules": self.rules, "fault": self.fault}
        if self.recipe is not None:
            content["recipe"] = self.recipe
        path = root / f"{self.id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="ascii")
        entry: Json = {"id": self.id, "level": self.level, "spec": SPEC_VERSION, "needs": self.needs}
        return entry | ({"rules": self.rules} if self.rules else {})
