"""Damage to single fields of ZIP records, in one or in both of the places that state them.

Knows: SPEC.md's tables of the single file. Does not know: what the entries hold.
"""

from __future__ import annotations

import random
import struct
from typing import Any

from odd_values import INTEGERS, integer

_END_FIELDS = [
    (0, "I"), (4, "Q"), (12, "H"), (14, "H"), (16, "I"), (20, "I"), (24, "Q"), (32, "Q"), (40, "Q"), (48, "Q"),
    (56, "I"), (60, "I"), (64, "Q"), (72, "I"), (76, "I"), (80, "H"), (82, "H"), (84, "H"), (86, "H"), (88, "I"),
    (92, "I"), (96, "H"),
]  # fmt: skip
_CENTRAL_FIELDS = [(0, "I"), *((at, "H") for at in range(4, 16, 2)), (16, "I"), (20, "I"), (24, "I")]
_CENTRAL_FIELDS += [(28, "H"), (30, "H"), (32, "H"), (34, "H"), (36, "H"), (38, "I"), (42, "I")]
_CENTRAL_EXTRA = [(46, "H"), (48, "H"), (50, "Q"), (58, "Q"), (66, "Q")]
_LOCAL_FIELDS = [
    (0, "I"),
    *((at, "H") for at in range(4, 14, 2)),
    (14, "I"),
    (18, "I"),
    (22, "I"),
    (26, "H"),
    (28, "H"),
]
_LOCAL_EXTRA = [(30, "H"), (32, "H"), (34, "Q"), (42, "Q"), (50, "H"), (52, "H"), (54, "H")]


def patch_records(rng: random.Random, z: Any) -> None:
    """Change a field of a ZIP record, sometimes in both places that state it."""
    fields = [(z.end64, form) for form in _END_FIELDS]
    key = rng.choice(list(z.central))
    if rng.random() < 0.4:
        at, (offset, form) = rng.choice(fields)
        _patch(rng, z, at + offset, form)
        return
    n_name = len(key.encode())
    central, local = z.central[key], z.local[key]
    if rng.random() < 0.3:
        value = rng.choice((*INTEGERS, (1 << 63) + local, (1 << 64) - 64)) % (1 << 64)
        for at in rng.choice(((50,), (50, 58), (66,), (50, 58, 66))):
            z.patch(central + n_name + at, "Q", value)
        if rng.random() < 0.7:
            z.patch(local + n_name + 34, "Q", value)
            z.patch(local + n_name + 42, "Q", value)
        return
    records = [
        (central, _CENTRAL_FIELDS),
        (central + n_name, _CENTRAL_EXTRA),
        (local, _LOCAL_FIELDS),
        (local + n_name, _LOCAL_EXTRA),
    ]
    base, choices = rng.choice(records)
    offset, form = rng.choice(choices)
    _patch(rng, z, base + offset, form)


def _patch(rng: random.Random, z: Any, at: int, form: str) -> None:
    (old,) = struct.unpack_from("<" + form, z.data, at)
    z.patch(at, form, integer(rng, old) % (1 << 8 * struct.calcsize(form)))
