"""What differs between two models: manifest, arrays, values, embedded files.

Compares what the models say, not how they are stored: container, compression, alignment and order do not count.
Values are compared bit by bit, and where they differ, as weights.

Knows: two open models. Does not know: how the differences are shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec
import numpy as np

from flashfmt.encodings import Array, Encoding, decode
from flashfmt.manifest import bundle_checksums_name
from flashfmt.reader import FlashModel
from flashfmt.tensor import BundlesInfo

DifferenceKind = Literal["manifest", "missing", "extra", "encoding", "shape", "values", "file"]

BLOCK_NBYTES: Final = 8 << 20
_ABSENT: Final = "nothing"


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference.

    `where` is an array, a role, or a path in the manifest; `first` and `second` say what each model has. For values,
    `n_different` of `n_values` differ; for weights, `max_abs` is the largest difference and `relative` the root mean
    square of the differences over that of the first model's weights.
    """

    kind: DifferenceKind
    where: str
    first: str = ""
    second: str = ""
    n_values: int = 0
    n_different: int = 0
    max_abs: float | None = None
    relative: float | None = None


def compared_nbytes(first: FlashModel, second: FlashModel) -> int:
    """Bytes that `differences` reports as progress: those of the first model's arrays that both have."""
    skipped = _derived(first)
    tensors = sum(t.nbytes for name, t in first.tensors.items() if name in second.tensors and name not in skipped)
    pairs = zip(first.layers, second.layers, strict=False)
    return tensors + sum(a.geometry.n_neurons * a.geometry.row_nbytes for a, _ in pairs)


def differences(
    first: FlashModel, second: FlashModel, progress: Callable[[int], None] | None = None
) -> Iterator[Difference]:
    """Every difference between two models: manifest, files, tensors, then bundles by layer. Streams the values.

    Parameters
    ----------
    progress : called with the bytes of the first model just compared; the sum is `compared_nbytes`.

    Raises
    ------
    FlashFormatError, FlashReadError
        If a model is damaged or cannot be read. Checksums of raw arrays are not compared with their bytes.
    """
    advance = progress or _ignore
    yield from _manifests(first, second)
    yield from _files(first, second)
    skipped = _derived(first) | _derived(second)
    names = dict.fromkeys(name for model in (first, second) for name in model.tensors if name not in skipped)
    for name in names:
        yield from _tensors(first, second, name, advance)
    for layer in range(max(len(first.layers), len(second.layers))):
        yield from _bundles(first, second, layer, advance)


def _manifests(first: FlashModel, second: FlashModel) -> Iterator[Difference]:
    a, b = (dict(_leaves(msgspec.to_builtins(model.manifest), "")) for model in (first, second))
    for path in dict.fromkeys((*a, *b)):
        left, right = a.get(path, _ABSENT), b.get(path, _ABSENT)
        if left != right and path != "metadata_crc32c":
            yield Difference("manifest", path, str(left), str(right))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every value of a manifest that is no container, with its path."""
    if isinstance(value, Mapping):
        for key, member in value.items():
            yield from _leaves(member, f"{path}.{key}" if path else key)
    elif isinstance(value, (list, tuple)) and value:
        for index, member in enumerate(value):
            yield from _leaves(member, f"{path}[{index}]")
    else:
        yield path, value


def _files(first: FlashModel, second: FlashModel) -> Iterator[Difference]:
    for role in dict.fromkeys((*first.files, *second.files)):
        a, b = first.files.get(role), second.files.get(role)
        if a is None or b is None:
            yield _one_sided(f"files/{role}", b is None)
        elif (a.filename, a.sha256) != (b.filename, b.sha256):
            yield Difference("file", f"files/{role}", f"{a.filename} {a.sha256}", f"{b.filename} {b.sha256}")


def _tensors(first: FlashModel, second: FlashModel, name: str, advance: Callable[[int], None]) -> Iterator[Difference]:
    a, b = first.tensors.get(name), second.tensors.get(name)
    if a is None or b is None:
        yield _one_sided(name, b is None)
        return
    if a.encoding is not b.encoding:
        yield Difference("encoding", name, a.encoding, b.encoding)
    if a.shape != b.shape:
        yield Difference("shape", name, str(list(a.shape)), str(list(b.shape)))
        advance(a.nbytes)
        return
    n_values = a.shape[-1]
    left, right = (model.tensor(name).data for model in (first, second))
    if left.ndim == 1:
        left, right = left[None], right[None]
    yield from _values(
        name, _Rows(left, a.encoding, n_values), _Rows(right, b.encoding, n_values), a.encoding.is_weight, advance
    )


def _bundles(first: FlashModel, second: FlashModel, layer: int, advance: Callable[[int], None]) -> Iterator[Difference]:
    if layer >= min(len(first.layers), len(second.layers)):
        longer = first if layer < len(first.layers) else second
        yield _one_sided(longer.layers[layer].name, longer is first)
        return
    a, b = first.layers[layer], second.layers[layer]
    if a.encoding is not b.encoding:
        yield Difference("encoding", a.name, a.encoding, b.encoding)
    shapes = [(i.geometry.n_neurons, *i.parts, i.d_model) for i in (a, b)]
    if shapes[0] != shapes[1]:
        yield Difference("shape", a.name, str(list(shapes[0])), str(list(shapes[1])))
        advance(a.geometry.n_neurons * a.geometry.row_nbytes)
        return
    left, right = (_bundle_rows(model, info) for model, info in ((first, a), (second, b)))
    yield from _values(a.name, left, right, True, advance)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Values in storage form; the last axis is one encoded row of `n_values`."""

    data: Array
    encoding: Encoding
    n_values: int

    def decoded(self, block: slice) -> Array:
        """Weights of some rows as a new float64 array."""
        return decode(self.data[block], self.encoding, self.n_values).astype(np.float64)


def _bundle_rows(model: FlashModel, info: BundlesInfo) -> _Rows:
    """The bundles of a layer as a view [n_neurons, parts, storage_length]."""
    rows = model.bundles(info.layer).rows
    itemsize = info.encoding.storage_dtype.itemsize
    data = np.lib.stride_tricks.as_strided(
        rows[:, :itemsize].view(info.encoding.storage_dtype),
        (len(rows), len(info.parts), info.part.storage_length),
        (info.geometry.stride, info.part.nbytes, itemsize),
        writeable=False,
    )
    return _Rows(data, info.encoding, info.d_model)


def _values(
    name: str, first: _Rows, second: _Rows, are_weights: bool, advance: Callable[[int], None]
) -> Iterator[Difference]:
    """Compare values of the same logical shape, a few rows at a time: bits first, and weights only if those differ."""
    step = max(1, BLOCK_NBYTES // max(1, first.data[0].nbytes))
    blocks = [slice(start, start + step) for start in range(0, len(first.data), step)]
    same_form = first.encoding is second.encoding
    identical = same_form
    for block in blocks:
        identical = identical and np.array_equal(_bits(first.data[block]), _bits(second.data[block]))
        advance(first.data[block].nbytes)
    if identical:
        return
    if not are_weights:
        n_different = int(np.count_nonzero(first.data != second.data))
        yield Difference("values", name, n_values=first.data.size, n_different=n_different)
        return
    n_different, max_abs, squares, squared_errors = 0, 0.0, 0.0, 0.0
    for block in blocks:
        weights = first.decoded(block)
        error = np.abs(weights - second.decoded(block))
        max_abs = max(max_abs, float(error.max()))
        n_different += int(np.count_nonzero(error))
        squares += float(np.vdot(weights, weights))
        squared_errors += float(np.vdot(error, error))
    if same_form or n_different:
        n_values = math.prod(first.data.shape[:-1]) * first.n_values
        relative = math.sqrt(squared_errors / squares) if squares else math.inf
        yield Difference("values", name, n_values=n_values, n_different=n_different, max_abs=max_abs, relative=relative)


def _bits(values: Array) -> Array:
    """The same bytes as unsigned integers, so that -0 and 0 differ."""
    return values.view(f"<u{values.dtype.itemsize}")


def _one_sided(where: str, missing: bool) -> Difference:
    """A difference where the second model has nothing, or the first."""
    if missing:
        return Difference("missing", where, "present", _ABSENT)
    return Difference("extra", where, _ABSENT, "present")


def _derived(model: FlashModel) -> set[str]:
    """Arrays that follow from others: they differ exactly where those do."""
    return {bundle_checksums_name(info.layer) for info in model.layers}


def _ignore(_: int) -> None:
    pass
