"""Reducing an input to what its finding needs: the fewest keys that differ from a seed."""

from __future__ import annotations

from dataclasses import replace

from entries import Entry, unpack
from mutations import Mutator
from probe import Probe, Report


def minimised(report: Report, mutator: Mutator, probe: Probe) -> Report:
    """The same finding with as many keys as possible as in the nearest seed; `report` itself if that loses it."""
    found = {entry.key: entry.payload for entry in unpack(report.raw)}
    if not found:
        return report
    nearest = max(mutator.seeds, key=lambda seed: sum(found.get(e.key) == e.payload for e in unpack(seed)))
    original = unpack(nearest)
    changes = {key for key, payload in found.items() if payload not in (e.payload for e in original if e.key == key)}
    changes |= {entry.key for entry in original if entry.key not in found}
    best = report
    for key in sorted(changes):
        attempt = _packed(mutator, original, found, changes - {key})
        result = probe.outcomes(attempt)
        if isinstance(result, Report) and result.signature == report.signature:
            changes, best = changes - {key}, result
    return replace(best, message=f"{best.message} (keys changed: {', '.join(sorted(changes))})"[:2000])


def _packed(mutator: Mutator, original: list[Entry], found: dict[str, bytes], changes: set[str]) -> bytes:
    """The seed with some keys taken from the finding: changed, added or missing."""
    entries = [
        Entry(e.key, found[e.key] if e.key in changes else e.payload, e.alignment)
        for e in original
        if e.key not in changes or e.key in found
    ]
    added = changes - {entry.key for entry in original}
    entries += [Entry(key, found[key], 64) for key in sorted(added)]
    entries.sort(key=lambda e: (0, e.key.count("/"), e.key) if e.is_document else (1, 0, ""))
    mutator.reseal(entries)
    return bytes(mutator.zip_model([(e.key, e.payload, e.alignment) for e in entries]).data)
