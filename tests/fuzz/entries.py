"""A `.flash` file as a list of keys with their bytes, and documents as JSON; forgiving, for files that are damaged.

Knows: where a container's records say that entries are. Does not know: rules.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from typing import Any

KEY = re.compile(r"[a-z0-9_][a-z0-9_.-]*(/[a-z0-9_][a-z0-9_.-]*)*")


@dataclass
class Entry:
    """One key of the file being changed."""

    key: str
    payload: bytes
    alignment: int

    @property
    def is_document(self) -> bool:
        return self.key == "zarr.json" or self.key.endswith("/zarr.json")


def unpack(raw: bytes) -> list[Entry]:
    """Entries of a file by its central directory, forgiving; empty where that cannot be followed."""
    entries: list[Entry] = []
    try:
        n, _, at = struct.unpack_from("<QQQ", raw, len(raw) - 98 + 32)
        for _ in range(min(n, 4096)):
            n_name, n_extra = struct.unpack_from("<HH", raw, at + 28)
            key = raw[at + 46 : at + 46 + n_name].decode("ascii")
            nbytes, _, local = struct.unpack_from("<QQQ", raw, at + 46 + n_name + 4)
            n_local_name, n_local_extra = struct.unpack_from("<HH", raw, local + 26)
            start = local + 30 + n_local_name + n_local_extra
            alignment = 16384 if key.endswith("bundles/c/0/0/0") else 64
            entries.append(Entry(key, raw[start : start + min(nbytes, len(raw))], alignment))
            at += 46 + n_name + n_extra
    except (struct.error, UnicodeDecodeError, OverflowError):
        return []
    return entries


def parsed(entry: Entry) -> Any:
    """The JSON of a document, or None."""
    try:
        document = json.loads(entry.payload)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def dumped(document: Any) -> bytes:
    """Compact JSON."""
    return json.dumps(document, separators=(",", ":")).encode()
