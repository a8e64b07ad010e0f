"""Comparing CRC-32C checksums with evidence (SPEC.md section "Checksums").

Knows: checksums. Does not know: what they cover.
"""

from __future__ import annotations

from pathlib import Path

from flashfmt.errors import ChecksumError


def require_crc32c(actual: int, expected: int, *, path: Path, where: str, rule: str, message: str) -> None:
    """Raise ChecksumError under `rule` unless the two checksums are equal."""
    if actual != expected:
        raise ChecksumError(
            message, path=path, where=where, rule=rule, expected=f"{expected:08x}", actual=f"{actual:08x}"
        )
