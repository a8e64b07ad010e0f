"""The model that keeps nothing: every weight is read from flash for every token (LLM in a flash, table 2, first row).

Attention matrices are read layer by layer into buffers that all layers share, the logits' matrix when it is due, the
FFN as many bundles at a time as there are slots for. Nothing overlaps: what is read is waited for, then computed with.
Only vectors (norms, biases) stay.

Knows: in which order tensors are needed. Does not know: arithmetic.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

import flashfmt
from flashfmt import FlashModel, TensorInfo
from flashfmt.errors import UnsupportedError
from flashfmt.layout import round_up
from flashfmt.manifest import InputTap
from reference_engine.active_bundles import OpenReader
from reference_engine.backends import Matrix, load_backend
from reference_engine.bench.nothing_kept import NothingKept
from reference_engine.engine import EngineOptions
from reference_engine.flash_io import IO_ALIGNMENT, DirectFile, IoCounters, aligned_empty
from reference_engine.kv_cache import KvCache
from reference_engine.models.decoder_stack import DecoderStack
from reference_engine.models.weights import BundleBlock, TapPoint, WithoutLookAhead
from reference_engine.resident_encoding import POSITIONS
from reference_engine.residents import (
    EMBEDDING,
    FlashTable,
    Residents,
    load_tensors,
    multiplied_encodings,
    resident_tensors,
)
from reference_engine.selectors import Everything, TappedSelector
from reference_engine.selectors.protocol import F32
from reference_engine.sparse_bundles import SparseBundles

SLOTS: Final = 1024  # of a layer: 16 MiB of OPT-6.7B's bundles are read at a time
_N_READERS: Final = 4
_PIECE_BYTES: Final = 16 << 20
_LAYER: Final = re.compile(r"^layers/(\d+)/")


class NaiveModel:
    """A model of which nothing but vectors is held. `close` it.

    Parameters
    ----------
    options : `context_tokens`, `kv_type`, `backend` and `n_threads` count.
    open_reader : opens a file of bundles for reading.

    Raises
    ------
    UnsupportedError
        If matrices are compressed.
    """

    def __init__(self, path: Path, options: EngineOptions, open_reader: OpenReader) -> None:
        self._model = model = flashfmt.open(path)
        try:
            backend = load_backend(options.backend, options.n_threads)
            backend.prepare(multiplied_encodings(model))
            everything = Everything(model.decoder.ffn.d_ff)
            self.tensors = StreamedTensors(model)
            self.bundles = SparseBundles(
                model,
                selectors=[
                    TappedSelector(InputTap(layer=layer), everything) for layer in range(model.decoder.n_layers)
                ],
                windows=[NothingKept() for _ in model.layers],
                capacities=[min(SLOTS, model.decoder.ffn.d_ff)] * len(model.layers),
                open_reader=open_reader,
                overlap=False,
                held_first=False,
                verify=options.verify,
            )
            self._rows = FlashTable(model.tensors[EMBEDDING], backend)
            context = options.context_tokens or model.decoder.context_tokens
            self._kv_cache = KvCache(model.decoder, context, options.kv_type)
            self._stack = DecoderStack(
                decoder=model.decoder,
                residents=self.tensors,
                layers=model.layers,
                tokens=self._rows,
                bundles=_ReadingAttention(self.bundles, self.tensors),
                backend=backend,
            )
        except BaseException:
            model.close()
            raise

    def restart(self) -> None:
        """Begin a new sequence."""
        self._kv_cache.truncate(0)

    def feed(self, token_ids: Sequence[int]) -> F32:
        """Append tokens; returns float32 [vocab_size], the logits behind the last of them."""
        hidden = self._stack.forward(np.asarray(token_ids, np.int64), self._kv_cache)
        logits: F32 = self._stack.logits(hidden[-1:])[0]
        return logits

    def counters(self) -> IoCounters:
        """What reading has cost so far."""
        return self.bundles.counters + self.tensors.counters + self._rows.counters

    def close(self) -> None:
        """Close all files."""
        self.bundles.close()
        self.tensors.close()
        self._rows.close()
        self._model.close()


class StreamedTensors:
    """`TensorSource` that reads matrices when they are due: a layer's by `load_layer`, others when they are asked for.

    Attributes
    ----------
    seconds : that reading has taken.
    """

    def __init__(self, model: FlashModel) -> None:
        self.seconds = 0.0
        self._model = model
        tensors = list(resident_tensors(model))
        vectors = [info.name for info in tensors if len(info.shape) == 1]
        self._vectors = Residents(model, load_tensors(model, vectors))
        self._matrices = {
            info.name: info for info in tensors if len(info.shape) > 1 and info.name not in (EMBEDDING, POSITIONS)
        }
        if model.decoder.logits.tied:
            self._matrices[EMBEDDING] = model.tensors[EMBEDDING]
        for info in (*self._matrices.values(), model.tensors[EMBEDDING]):
            if info.codec != "raw":
                raise UnsupportedError(f"{info.name} is compressed: it cannot be streamed", path=model.path)
        rooms: dict[str, int] = {}
        for info in self._matrices.values():
            rooms[_place(info.name)] = max(rooms.get(_place(info.name), 0), _span(info)[1])
        self._buffers = {place: aligned_empty(room) for place, room in rooms.items()}
        self._files = {path: DirectFile(path) for path in {info.extent.path for info in self._matrices.values()}}
        self._pool = ThreadPoolExecutor(_N_READERS, "flash-naive")

    @property
    def counters(self) -> IoCounters:
        """Bytes and requests so far, and the seconds that were waited."""
        parts = [file.counters for file in self._files.values()]
        return sum(parts, IoCounters(wait_seconds=self.seconds))

    def load_layer(self, layer: int) -> None:
        """Read a layer's matrices over those of the layer before."""
        prefix = f"layers/{layer}/"
        self._read([info for name, info in self._matrices.items() if name.startswith(prefix)])

    def matrix(self, name: str) -> Matrix:
        """A matrix in storage form; one that belongs to a layer is valid after its `load_layer`."""
        if name == POSITIONS:
            return _as_matrix(self._model.tensors[name], self._model.tensor(name).data)
        info = self._matrices[name]
        if not _LAYER.match(name):
            self._read([info])
        head = info.extent.offset % IO_ALIGNMENT
        raw = self._buffers[_place(name)][head : head + info.extent.nbytes]
        return _as_matrix(info, raw.view(info.encoding.storage_dtype).reshape(info.storage_shape))

    def vector(self, name: str) -> F32 | None:
        """A float32 vector, or None where the model has none of that name."""
        return self._vectors.vector(name)

    def close(self) -> None:
        """Close the files."""
        self._pool.shutdown()
        for file in self._files.values():
            file.close()

    def _read(self, infos: Iterable[TensorInfo]) -> None:
        began = time.perf_counter()
        for done in [self._pool.submit(read) for info in infos for read in self._pieces(info)]:
            done.result()
        self.seconds += time.perf_counter() - began

    def _pieces(self, info: TensorInfo) -> Iterator[Callable[[], None]]:
        file, buffer = self._files[info.extent.path], self._buffers[_place(info.name)]
        offset, nbytes = _span(info)
        end = info.extent.offset + info.extent.nbytes - offset
        for start in range(0, nbytes, _PIECE_BYTES):
            target = buffer[start : min(start + _PIECE_BYTES, nbytes)]
            yield partial(file.read_into, target, offset + start, min(target.nbytes, end - start))


class _ReadingAttention(WithoutLookAhead):
    """`BundleSource` that reads the attention matrices of a layer before they are needed."""

    def __init__(self, bundles: SparseBundles, tensors: StreamedTensors) -> None:
        self._bundles = bundles
        self._tensors = tensors

    def taps(self, layer: int) -> tuple[TapPoint, ...]:
        return ("attention_input",)

    def tap(self, layer: int, point: TapPoint, x: F32) -> None:
        self._tensors.load_layer(layer)

    def blocks(self, layer: int, x: F32) -> Iterator[BundleBlock]:
        return self._bundles.blocks(layer, x)


def _place(name: str) -> str:
    """Name of the buffer of a tensor: the same for all layers."""
    return _LAYER.sub("layers/*/", name)


def _span(info: TensorInfo) -> tuple[int, int]:
    """(offset, bytes) of the aligned range of the file that holds a tensor."""
    head = info.extent.offset % IO_ALIGNMENT
    return info.extent.offset - head, round_up(head + info.extent.nbytes, IO_ALIGNMENT)


def _as_matrix(info: TensorInfo, data: npt.NDArray[np.generic]) -> Matrix:
    return Matrix(info.encoding, info.shape[0], info.shape[1], data)
