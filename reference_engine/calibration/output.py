"""A copy of a model with other predictors and statistics.

Knows: how a model is written. Does not know: how predictors and statistics were made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from flashfmt import BundlesSpec, FileSpec, FlashModel, FlashWriter, TensorSpec
from flashfmt.encodings import Encoding
from flashfmt.manifest import Statistics, bundle_checksums_name, required_arrays
from reference_engine.fitted_predictor import FittedPredictor

_BLOCK_NEURONS = 512
_REPLACED = ("predictor", "statistics")


def write_calibrated(
    model: FlashModel,
    target: str | os.PathLike[str],
    predictors: Sequence[FittedPredictor],
    statistics: Statistics,
    activity: Mapping[int, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]],
    *,
    fingerprint: str,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Copy a model, with these predictors and statistics in place of its own. All that is copied is verified.

    Parameters
    ----------
    activity : by layer: firing frequency [d_ff] and aggregated window [window_tokens].
    fingerprint : says where predictors and statistics come from; an interrupted call is continued under the same.
    progress : called with the bytes of each array.

    Raises
    ------
    FlashWriteError
        If the target exists and `overwrite` is false, or cannot be written.
    ChecksumError
        If the source is damaged.
    """
    advance = progress or (lambda _: None)
    manifest = msgspec.structs.replace(
        model.manifest, predictors=tuple(p.description for p in predictors), statistics=statistics
    )
    added = dict(_added(predictors, activity))
    contents = {role: model.file(role) or b"" for role in model.files}
    files = [FileSpec.of(role, model.files[role].filename, content) for role, content in sorted(contents.items())]
    tensors = list(_tensor_specs(model, required_arrays(manifest).keys(), added))
    bundles = [
        BundlesSpec(b.layer, b.encoding, b.parts, b.geometry.n_neurons, b.d_model, b.geometry.alignment)
        for b in model.layers
    ]
    with FlashWriter(
        target,
        manifest,
        tensors=tensors,
        bundles=bundles,
        files=files,
        container=None if Path(target).suffix == ".flash" else "directory",
        fingerprint=fingerprint,
        overwrite=overwrite,
    ) as writer:
        for role, content in sorted(contents.items()):
            writer.write_file(role, content)
        for spec in tensors:
            data = added[spec.name][1] if spec.name in added else model.tensor(spec.name, verify=True).data
            writer.write_tensor(spec.name, data)
            advance(data.nbytes)
        for layer in range(len(model.layers)):
            _copy_bundles(model, layer, writer, advance)


def _copy_bundles(model: FlashModel, layer: int, writer: FlashWriter, advance: Callable[[int], None]) -> None:
    info, source = model.layers[layer], model.bundles(layer)
    n_neurons = info.geometry.n_neurons
    is_done = writer.is_done(info.name)
    with writer.bundles(layer) as sink:
        for first in range(0, n_neurons, _BLOCK_NEURONS):
            neurons = range(first, min(first + _BLOCK_NEURONS, n_neurons))
            rows = np.ascontiguousarray(source.rows[neurons.start : neurons.stop])
            if not is_done:
                source.verify(neurons)
            sink.append(rows.view(info.encoding.storage_dtype).reshape(len(rows), len(info.parts), -1))
            advance(rows.nbytes)


def _added(
    predictors: Sequence[FittedPredictor],
    activity: Mapping[int, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]],
) -> list[tuple[str, tuple[TensorSpec, npt.NDArray[np.generic]]]]:
    """New tensors by name."""
    added: list[tuple[str, tuple[TensorSpec, npt.NDArray[np.generic]]]] = []
    for predictor in predictors:
        for short, (encoding, data) in predictor.arrays.items():
            name = f"layers/{predictor.description.layer}/predictor/{short}"
            shape = (len(data), predictor.d_model) if encoding.is_quantised else data.shape
            added.append((name, (TensorSpec(name, encoding, shape), data)))
    for layer, arrays in activity.items():
        for short, data in zip(("firing_frequency", "aggregated_window"), arrays, strict=True):
            name = f"layers/{layer}/statistics/{short}"
            added.append((name, (TensorSpec(name, Encoding.F32, data.shape), data)))
    return added


def _tensor_specs(
    model: FlashModel, required: Iterable[str], added: Mapping[str, tuple[TensorSpec, npt.NDArray[np.generic]]]
) -> Iterator[TensorSpec]:
    """All tensors in the order of a forward pass, then those of extensions."""
    checksums = {bundle_checksums_name(layer) for layer in range(len(model.layers))}
    names = [name for name in required if name not in checksums]
    kept = (name for name in model.tensors if not _is_replaced(name))
    names += sorted(name for name in kept if name not in names and name not in checksums)
    for name in names:
        if name in added:
            yield added[name][0]
        else:
            info = model.tensors[name]
            yield TensorSpec(name, info.encoding, info.shape, info.codec)


def _is_replaced(name: str) -> bool:
    segments = name.split("/")
    return segments[0] == "layers" and segments[2] in _REPLACED
