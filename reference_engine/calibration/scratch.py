"""What a calibration has recorded and fitted so far, on disk: a Zarr store and a journal, both resumable.

`layers/{l}/inputs` float16 [n_tokens, d_model] and `layers/{l}/active` uint8 [n_tokens, ceil(d_ff / 8)] (neuron i is
bit ``7 - i % 8`` of byte ``i // 8``), in chunks of a few tokens that are written as they come, so that memory does not
grow with the text; `layers/{l}/sizes` float32 [n_chunks, d_ff], the sum of each neuron's ``|h|`` over a chunk. The
journal says what is complete; what it does not name is done again.

Knows: arrays of tokens by layer, and names of finished steps. Does not know: what they mean.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore

from flashfmt.errors import FlashWriteError
from reference_engine.calibration.division import Ranges

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_JOURNAL: Final = "journal.json"
_STORE: Final = "recorded.zarr"
_F16_LIMIT: Final = 65504.0


class Scratch:
    """Scratch folder of one calibration; an existing one is continued if its fingerprint is the same, else emptied.

    Parameters
    ----------
    fingerprint : says which model, text and options the content belongs to.
    n_tokens : tokens to record in all.
    chunk_tokens : tokens written together; recording advances by multiples of it.

    Raises
    ------
    FlashWriteError
        If the folder cannot be written, or is not a scratch folder.
    """

    def __init__(
        self, path: Path, fingerprint: str, *, n_layers: int, n_tokens: int, d_model: int, d_ff: int, chunk_tokens: int
    ) -> None:
        self.path = path
        self.n_tokens = n_tokens
        self.chunk_tokens = chunk_tokens
        self.d_model = d_model
        self.d_ff = d_ff
        self._journal: dict[str, Any] = {}
        self.resumed = self._continue(fingerprint)
        try:
            if not self.resumed:
                self._start(fingerprint)
            group = zarr.open_group(LocalStore(path / _STORE), mode="a")
            n_chunks = -(-n_tokens // chunk_tokens)
            shapes = {
                "inputs": (n_tokens, d_model, chunk_tokens, np.float16),
                "active": (n_tokens, -(-d_ff // 8), chunk_tokens, np.uint8),
                "sizes": (n_chunks, d_ff, 1, np.float32),
            }
            self._arrays = {
                (layer, name): group.require_array(
                    f"layers/{layer}/{name}",
                    shape=(length, width),
                    dtype=dtype,
                    chunks=(chunk, width),
                    compressors=None,
                )
                for layer in range(n_layers)
                for name, (length, width, chunk, dtype) in shapes.items()
            }
        except OSError as error:
            raise FlashWriteError(f"cannot keep recorded activations: {error}", path=path) from error

    def done(self, step: str) -> Any:
        """What the journal holds of a finished step, or None."""
        return self._journal.get(step)

    def finish(self, step: str, result: Any = True) -> None:
        """Note that a step is finished; `result` is anything JSON can hold."""
        self._journal[step] = result
        text = json.dumps(self._journal)
        draft = self.path / (_JOURNAL + ".new")
        try:
            draft.write_text(text)
            os.replace(draft, self.path / _JOURNAL)
        except OSError as error:
            raise FlashWriteError(f"cannot keep the journal: {error}", path=draft) from error

    def write(
        self,
        layer: int,
        first: int,
        *,
        inputs: F32 | None = None,
        active: Mask | None = None,
        sizes: F32 | None = None,
    ) -> None:
        """Store values of tokens from `first` on, a multiple of the chunk: [n, d_model], [n, d_ff] or sums [d_ff]."""
        try:
            if inputs is not None:
                half = np.clip(inputs, -_F16_LIMIT, _F16_LIMIT).astype(np.float16)
                self._arrays[layer, "inputs"][first : first + len(half)] = half
            if active is not None:
                self._arrays[layer, "active"][first : first + len(active)] = np.packbits(active, axis=1)
            if sizes is not None:
                self._arrays[layer, "sizes"][first // self.chunk_tokens] = sizes
        except OSError as error:
            raise FlashWriteError(f"cannot keep recorded activations: {error}", path=self.path) from error

    def inputs(self, layer: int, first: int, last: int) -> F32:
        """float32 [last - first, d_model], a copy."""
        return np.asarray(self._arrays[layer, "inputs"][first:last]).astype(np.float32)

    def active(self, layer: int, first: int, last: int) -> Mask:
        """bool [last - first, d_ff], a copy."""
        packed = np.asarray(self._arrays[layer, "active"][first:last])
        return np.unpackbits(packed, axis=1, count=self.d_ff).view(np.bool_)

    def sizes(self, layer: int, first: int, last: int) -> F64:
        """Sums of |h| over some tokens, float64 [d_ff]; whole chunks, the text's last one excepted."""
        chunks = slice(first // self.chunk_tokens, -(-last // self.chunk_tokens))
        sums: F64 = np.asarray(self._arrays[layer, "sizes"][chunks], np.float64).sum(axis=0)
        return sums

    def stored(
        self, tap_layer: int, layer: int, first: int, last: int
    ) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]:
        """(inputs of one layer, active sets of another) as they are stored, copies."""
        return (
            np.asarray(self._arrays[tap_layer, "inputs"][first:last]),
            np.asarray(self._arrays[layer, "active"][first:last]),
        )

    def save_arrays(self, name: str, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Keep some arrays under a name; a step that relies on them is finished after that."""
        path = self.path / f"{name}.npz"
        try:
            with path.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        except OSError as error:
            raise FlashWriteError(f"cannot keep what was fitted: {error}", path=path) from error

    def load_arrays(self, name: str) -> dict[str, npt.NDArray[Any]]:
        """Arrays kept under a name."""
        with np.load(self.path / f"{name}.npz") as stored:
            return dict(stored)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _continue(self, fingerprint: str) -> bool:
        """Read the journal of an earlier run, if it is one of the same calibration."""
        if not self.path.exists():
            return False
        try:
            journal = json.loads((self.path / _JOURNAL).read_text())
        except FileNotFoundError:
            if any(self.path.iterdir()):
                raise FlashWriteError("not a folder of recorded activations; move it away", path=self.path) from None
            return False
        except (OSError, ValueError):
            return False
        if not isinstance(journal, dict) or journal.get("fingerprint") != fingerprint:
            return False
        self._journal = journal
        return True

    def _start(self, fingerprint: str) -> None:
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        self.finish("fingerprint", fingerprint)


class Section:
    """Some tokens of a layer in a scratch store, as training data.

    Parameters
    ----------
    tap_layer : whose inputs are read; the active sets are those of `layer`.
    ranges : tokens ``[first, last)`` each.
    """

    def __init__(self, scratch: Scratch, layer: int, tap_layer: int, ranges: Ranges) -> None:
        self._scratch = scratch
        self._layer = layer
        self._tap_layer = tap_layer
        self._ranges = ranges
        chunk = scratch.chunk_tokens
        self._pieces = [(at, min(at + chunk, last)) for first, last in ranges for at in range(first, last, chunk)]

    @property
    def layer(self) -> int:
        """Whose active sets these are."""
        return self._layer

    @property
    def n_tokens(self) -> int:
        """Tokens in all."""
        return sum(last - first for first, last in self._pieces)

    @property
    def n_pieces(self) -> int:
        """Chunks in all."""
        return len(self._pieces)

    def piece(self, index: int) -> tuple[F32, Mask]:
        """(inputs float32 [n, d_model], active bool [n, d_ff]) of one chunk."""
        first, last = self._pieces[index]
        return self._scratch.inputs(self._tap_layer, first, last), self._scratch.active(self._layer, first, last)

    def sizes(self) -> F64:
        """Sums of |h| over all tokens, float64 [d_ff]; ranges begin and end with chunks."""
        sums: F64 = np.sum([self._scratch.sizes(self._layer, *bounds) for bounds in self._ranges], axis=0)
        return sums

    def in_memory(self, limit: int = 1 << 29) -> Section | HeldSection:
        """The same as it lies on disk, read once and held, if that takes at most `limit` bytes; else itself."""
        width = 2 * self._scratch.d_model + -(-self._scratch.d_ff // 8)
        if self.n_tokens * width > limit:
            return self
        stored = [self._scratch.stored(self._tap_layer, self._layer, *bounds) for bounds in self._ranges]
        return HeldSection(stored, self._scratch.chunk_tokens, self._scratch.d_ff)


class HeldSection:
    """Some tokens of a layer in memory, as they are stored: of each range (inputs float16, packed active sets)."""

    def __init__(
        self, stored: Sequence[tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]], chunk_tokens: int, d_ff: int
    ) -> None:
        self._d_ff = d_ff
        self._pieces = [
            (inputs[at : at + chunk_tokens], packed[at : at + chunk_tokens])
            for inputs, packed in stored
            for at in range(0, len(inputs), chunk_tokens)
        ]

    @property
    def n_pieces(self) -> int:
        """Chunks in all."""
        return len(self._pieces)

    def piece(self, index: int) -> tuple[F32, Mask]:
        """(inputs float32 [n, d_model], active bool [n, d_ff]) of one chunk; copies."""
        inputs, packed = self._pieces[index]
        return inputs.astype(np.float32), np.unpackbits(packed, axis=1, count=self._d_ff).view(np.bool_)
