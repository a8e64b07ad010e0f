"""Carries out a plan: reads, checks and re-encodes weights block by block, while the writer stores earlier blocks.

The writer checksums and writes in a thread of its own, so reading overlaps with writing. At most one whole source
tensor, one resident array and the few blocks that wait in the writer are held at a time.

Knows: checkpoints, plans and the writer's calls. Does not know: families, the file's bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from flashfmt.convert.checkpoint import Array, Checkpoint, SourceTensor
from flashfmt.convert.plan import Plan, PlannedTensor
from flashfmt.convert.translation import FfnSources
from flashfmt.convert.weights import check_finite, encode_rows, interleave
from flashfmt.encodings import part_layout
from flashfmt.errors import CheckpointError
from flashfmt.manifest import bundles_name
from flashfmt.writer import FlashWriter

_ROWS_NBYTES: Final = 16 << 20
_BLOCK_NBYTES: Final = 4 << 20


def check_copies(checkpoint: Checkpoint, plan: Plan) -> None:
    """Refuse a second copy of a tied tensor that differs from the first; reads both where there is one."""
    for copy, original in plan.mapping.copies.items():
        if copy not in checkpoint.tensors:
            continue
        for (_, first), (_, second) in zip(
            _row_blocks(checkpoint, copy), _row_blocks(checkpoint, original), strict=True
        ):
            if first.encoding is not second.encoding or not np.array_equal(first.data, second.data):
                raise CheckpointError(
                    f"differs from {original}, though the config ties them; set tie_word_embeddings to false",
                    path=checkpoint.path,
                    where=copy,
                )


def write_weights(
    checkpoint: Checkpoint, plan: Plan, writer: FlashWriter, progress: Callable[[int], None] | None = None
) -> None:
    """Write every tensor and bundle that the writer does not hold yet, in the order of a forward pass.

    Parameters
    ----------
    progress : called with the number of payload bytes written since the last call.

    Raises
    ------
    CheckpointError
        If a weight is not finite or does not fit its encoding, or the source is truncated.
    FlashReadError, FlashWriteError
        If the system fails to read the source or to store the result.
    """
    report = progress or (lambda _nbytes: None)
    try:
        for tensor in plan.tensors:
            if not writer.is_done(tensor.name):
                data = _prepare_tensor(checkpoint, plan, tensor)
                writer.write_tensor(tensor.name, data)
                report(data.nbytes)
        for layer, sources in enumerate(plan.ffn):
            if not writer.is_done(bundles_name(layer)):
                with writer.bundles(layer) as sink:
                    for block in _prepare_bundles(checkpoint, plan, sources):
                        sink.append(block)
                        report(block.nbytes)
    except CheckpointError as error:
        if error.path is None:
            error.path = checkpoint.path
        raise


def payload_nbytes(plan: Plan) -> int:
    """Bytes that a whole conversion reports to `progress`."""
    decoder, encoding = plan.decoder, plan.bundle_encoding
    bundles = len(decoder.ffn.parts) * decoder.ffn.d_ff * part_layout(encoding, decoder.d_model).nbytes
    tensors = (
        int(np.prod(tensor.shape[:-1])) * part_layout(tensor.encoding, tensor.shape[-1]).nbytes
        for tensor in plan.tensors
    )
    return sum(tensors) + bundles * decoder.n_layers


def _prepare_tensor(checkpoint: Checkpoint, plan: Plan, tensor: PlannedTensor) -> Array:
    if tensor.source is None:
        return plan.mapping.computed[tensor.name]
    info = checkpoint.tensors[tensor.source]
    if info.encoding is tensor.encoding:
        whole = checkpoint.read(tensor.source)
        check_finite(whole, tensor.source)
        return whole.data
    layout = part_layout(tensor.encoding, tensor.shape[-1])
    out = np.empty((*tensor.shape[:-1], layout.storage_length), tensor.encoding.storage_dtype)
    for start, block in _row_blocks(checkpoint, tensor.source):
        check_finite(block, tensor.source, start)
        out[start : start + len(block.data)] = encode_rows(block, tensor.encoding, tensor.source)
    return out


def _prepare_bundles(checkpoint: Checkpoint, plan: Plan, sources: FfnSources) -> Iterator[Array]:
    decoder, names = plan.decoder, sources.by_part
    down = checkpoint.read(sources.down)
    check_finite(down, sources.down)
    row_nbytes = len(names) * part_layout(plan.bundle_encoding, decoder.d_model).nbytes
    n_block = max(1, _BLOCK_NBYTES // row_nbytes)
    for start in range(0, decoder.ffn.d_ff, n_block):
        rows = []
        for part, name in names.items():
            if part != "down":
                rows.append((name, checkpoint.read(name, start, start + n_block)))
                check_finite(rows[-1][1], name, start)
        yield interleave(rows, sources.down, down, start, plan.bundle_encoding)


def _row_blocks(checkpoint: Checkpoint, name: str) -> Iterator[tuple[int, SourceTensor]]:
    """A tensor in blocks of rows of about 16 MiB, each with the number of its first row."""
    info = checkpoint.tensors[name]
    row_nbytes = int(np.prod(info.shape[1:])) * info.encoding.storage_dtype.itemsize
    n_block = max(1, _ROWS_NBYTES // row_nbytes)
    for start in range(0, info.shape[0], n_block):
        yield start, checkpoint.read(name, start, start + n_block)
