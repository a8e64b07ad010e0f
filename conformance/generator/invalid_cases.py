"""Every invalid case. Knows: where the faults are planted. Does not know: how."""

from __future__ import annotations

from collections.abc import Iterator

from generator import invalid_arrays, invalid_containers, invalid_documents, invalid_payloads
from generator.faults import Fault

__all__ = ["Fault", "faults"]


def faults() -> Iterator[Fault]:
    """All faults, in the order of SPEC.md's stages."""
    yield from invalid_containers.faults()
    yield from invalid_documents.faults()
    yield from invalid_arrays.faults()
    yield from invalid_payloads.faults()
