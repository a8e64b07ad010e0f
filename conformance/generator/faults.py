"""What a fault is, and the ways of planting one. Knows: hierarchies and files. Does not know: the rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from generator.checksums import crc32c
from generator.hierarchy import Hierarchy
from generator.model import Model
from generator.recipes import minimal, small_quantised, small_rich
from generator.zip_file import ZipFile

Json = dict[str, Any]
Mutation = Callable[[Hierarchy], object]

ROOT = "zarr.json"
BUNDLES = "layers/0/ffn/bundles"
CHECKSUMS = "layers/0/ffn/bundle_crc32c"
QUERY = "layers/0/attention/q/weight"

# Rules that need payload bytes; all others show in the container, the documents or the shard index.
_OF_PAYLOADS = {"FF-ZIP-13", "FF-TEN-3", "FF-TEN-4", "FF-TEN-5", "FF-BND-8", "FF-STAT-1", "FF-STAT-2"}
_OF_PAYLOADS |= {"FF-SUM-3", "FF-SUM-4", "FF-SUM-5", "FF-SUM-6"}

_RECIPES = {
    "minimal": minimal,
    "rich": small_rich,
    "q8": lambda: small_quantised("q8"),
    "q4": lambda: small_quantised("q4"),
}
_HIERARCHIES: dict[str, Hierarchy] = {}


@dataclass
class Fault:
    """An invalid case. `content` is a file's bytes, a directory's files by key, or None where a recipe makes it."""

    name: str
    rules: list[str]
    description: str
    content: bytes | dict[str, bytes] | None
    recipe: Json | None = None
    codecs: list[str] = field(default_factory=list)

    @property
    def level(self) -> str:
        """The lowest level at which a reader must notice."""
        return "integrity" if _OF_PAYLOADS & set(self.rules) else "structure"


def base(name: str = "minimal") -> Hierarchy:
    """A fresh copy of a sound hierarchy."""
    if name not in _HIERARCHIES:
        _HIERARCHIES[name] = Model(_RECIPES[name]()).hierarchy
    return _HIERARCHIES[name].copy()


def in_model(
    name: str, rule: str | list[str], description: str, mutate: Mutation, on: str = "minimal", **rest: Any
) -> Fault:
    """A fault in documents or payloads; every checksum that `mutate` leaves alone or reseals is right."""
    hierarchy = base(on)
    mutate(hierarchy)
    return Fault(name, _rules(rule), description, hierarchy.zip_file().build(), **rest)


def in_directory(
    name: str, rule: str | list[str], description: str, mutate: Callable[[dict[str, bytes]], object]
) -> Fault:
    """A fault in the files of a directory."""
    keys = base().keys()
    mutate(keys)
    return Fault(name, _rules(rule), description, keys)


def in_zip(
    name: str, rule: str | list[str], description: str, mutate: Callable[[ZipFile], object], on: str = "minimal"
) -> Fault:
    """A fault in the records of a file. `mutate` finds the offsets of the sound file in place."""
    archive = base(on).zip_file()
    archive.build()
    mutate(archive)
    return Fault(name, _rules(rule), description, archive.build())


def in_bytes(
    name: str,
    rule: str | list[str],
    description: str,
    change: Callable[[bytearray, ZipFile], bytes | bytearray],
    on: str = "minimal",
) -> Fault:
    """A fault in the bytes of a finished file."""
    archive = base(on).zip_file()
    raw = bytearray(archive.build())
    return Fault(name, _rules(rule), description, bytes(change(raw, archive)))


def by_recipe(name: str, rule: str, description: str, *operations: list[Any]) -> Fault:
    """A fault that no repository can hold: the runner makes it from a sound directory."""
    recipe = {"copy": "valid/minimal-directory", "operations": list(operations)}
    return Fault(name, [rule], description, None, recipe=recipe)


def change_bundle(h: Hierarchy, neuron: int, at: int, value: bytes) -> None:
    """Overwrite bytes of a bundle and put all three checksums right."""
    attributes = h.attributes(BUNDLES)
    payload = bytearray(h.payloads[h.key(BUNDLES)])
    start = neuron * attributes["stride"]
    payload[start + at : start + at + len(value)] = value
    h.replace(BUNDLES, bytes(payload))
    checksums = bytearray(h.payloads[h.key(CHECKSUMS)])
    crc = crc32c(bytes(payload[start : start + attributes["row_nbytes"]]))
    checksums[4 * neuron : 4 * neuron + 4] = crc.to_bytes(4, "little")
    h.replace(CHECKSUMS, bytes(checksums))


def change_tensor(h: Hierarchy, name: str, at: int, value: bytes) -> None:
    """Overwrite bytes of a tensor and put its checksum right."""
    payload = bytearray(h.payloads[h.key(name)])
    payload[at : at + len(value)] = value
    h.replace(name, bytes(payload))


def set_in(target: Any, path: str, value: Any) -> None:
    """Set ``a.b.0.c`` in nested JSON."""
    *parents, last = path.split(".")
    for segment in parents:
        target = target[int(segment)] if isinstance(target, list) else target[segment]
    if isinstance(target, list):
        target[int(last)] = value
    else:
        target[last] = value


def _rules(rule: str | list[str]) -> list[str]:
    return [rule] if isinstance(rule, str) else rule
