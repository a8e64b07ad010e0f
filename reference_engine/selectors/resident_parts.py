"""Copies of one projection of a layer in DRAM, taken out of its bundles: what a selector that computes needs.

Knows: where a part lies in a bundle, and how it is re-encoded. Does not know: what it is used for.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flashfmt import BundlesInfo, FlashModel
from flashfmt.encodings import Encoding, decode, encode, part_layout
from flashfmt.errors import UnsupportedError
from flashfmt.layout import round_up
from reference_engine.backends import Matrix
from reference_engine.bundle_blocks import split_layer
from reference_engine.bundle_checksums import Verify, require_checksums
from reference_engine.flash_io import IO_ALIGNMENT, DirectFile, aligned_empty

Progress = Callable[[int], None]


def part_nbytes(info: BundlesInfo, encoding: Encoding | None = None) -> int:
    """DRAM that a copy of one part of all bundles of a layer takes.

    Parameters
    ----------
    encoding : of the copy; None for the bundles' own.

    Raises
    ------
    UnsupportedError
        If rows of the model's width cannot be encoded so.
    """
    try:
        layout = info.part if encoding is None else part_layout(encoding, info.d_model)
    except ValueError as error:
        raise UnsupportedError(str(error), path=info.extent.path) from None
    return round_up(info.geometry.n_neurons * layout.nbytes, IO_ALIGNMENT)


def load_parts(
    model: FlashModel,
    layer: int,
    parts: tuple[str, ...],
    *,
    encoding: Encoding | None = None,
    verify: Verify = "first",
    progress: Progress | None = None,
) -> dict[str, Matrix]:
    """Read some parts of all bundles of a layer, each as a matrix [n_neurons, d_model].

    Parameters
    ----------
    parts : of ``model.layers[layer].parts``.
    encoding : of the copies; None keeps the bundles' own bytes.
    progress : called with the bytes of each block of bundles read.

    Raises
    ------
    FlashReadError, ChecksumError, UnsupportedError
    """
    info = model.layers[layer]
    target = info.encoding if encoding is None else encoding
    room = {part: aligned_empty(part_nbytes(info, encoding)) for part in parts}
    layout = part_layout(target, info.d_model)
    copies = {
        part: memory[: info.geometry.n_neurons * layout.nbytes]
        .view(target.storage_dtype)
        .reshape(info.geometry.n_neurons, layout.storage_length)
        for part, memory in room.items()
    }
    checksums = model.bundles(layer).checksums
    with DirectFile(info.extent.path) as file:
        blocks = split_layer(info)
        buffer = aligned_empty(round_up(max(block.nbytes for block in blocks), IO_ALIGNMENT))
        for block in blocks:
            file.read_into(buffer, block.offset, block.nbytes)
            rows = buffer[: block.nbytes].reshape(block.n_neurons, info.geometry.stride)
            neurons = range(block.first, block.first + block.n_neurons)
            if verify != "never":
                require_checksums(info, neurons, rows, checksums)
            for part, copy in copies.items():
                start = info.parts.index(part) * info.part.nbytes
                stored = np.ascontiguousarray(rows[:, start : start + info.part.nbytes])
                values = stored.view(info.encoding.storage_dtype)
                if encoding is not None:
                    values = encode(decode(values, info.encoding, info.d_model), encoding)
                copy[neurons.start : neurons.stop] = values
            if progress is not None:
                progress(block.nbytes)
    return {
        part: Matrix(target, info.geometry.n_neurons, info.d_model, np.asarray(copy)) for part, copy in copies.items()
    }
