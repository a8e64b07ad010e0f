"""Recorded activity: which neurons each pass of a run used, as JSON lines that can be replayed and simulated.

The first line describes the run. Each further line is a pass: a token, or a chunk of a prompt::

    {"flashfmt_trace": 1, "model": "...", "n_layers": 32, "n_neurons": 16384}
    {"n_tokens": 1, "layers": [{"active": [3, 17, ...], "n_hits": 11, ...}, ...]}

Knows: this file format. Does not know: who records, who replays.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from flashfmt.errors import FlashError, FlashWriteError
from reference_engine.neuron_window import Ids

TRACE_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """What a trace was recorded from."""

    model: str
    n_layers: int
    n_neurons: int


@dataclass(frozen=True, slots=True)
class RecordedPass:
    """Sorted active neurons of each layer, for `n_tokens` tokens together."""

    n_tokens: int
    active: tuple[Ids, ...]


class TraceWriter:
    """Writes a trace as it happens; a context manager.

    Raises
    ------
    FlashWriteError
        From every method, if the system does not take the bytes.
    """

    def __init__(self, path: Path, header: TraceHeader) -> None:
        self._path = path
        try:
            self._file = path.open("w", encoding="ascii")
        except OSError as error:
            raise FlashWriteError(f"cannot write: {error.strerror}", path=path) from error
        self._write({"flashfmt_trace": TRACE_VERSION, **{name: getattr(header, name) for name in header.__slots__}})

    def write(self, n_tokens: int, layers: Sequence[tuple[Ids, Mapping[str, int | float]]]) -> None:
        """Append a pass: for each layer its active neurons, and figures under their names."""
        self._write({"n_tokens": n_tokens, "layers": [{"active": ids.tolist(), **figures} for ids, figures in layers]})

    def close(self) -> None:
        """Write what is buffered."""
        try:
            self._file.close()
        except OSError as error:
            raise FlashWriteError(f"cannot write: {error.strerror}", path=self._path) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _write(self, document: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(document, separators=(",", ":")) + "\n")
        except OSError as error:
            raise FlashWriteError(f"cannot write: {error.strerror}", path=self._path) from error


def read_header(path: Path) -> TraceHeader:
    """Description of the recorded run.

    Raises
    ------
    FlashError
        If the file cannot be read or is no trace.
    """
    return _header(path, next(_lines(path), None))


def read_trace(path: Path) -> Iterator[RecordedPass]:
    """Passes in their order, read one by one.

    Raises
    ------
    FlashError
        If the file cannot be read, is no trace, or a line is damaged.
    """
    lines = _lines(path)
    header = _header(path, next(lines, None))
    for number, document in enumerate(lines, 2):
        try:
            active = tuple(np.asarray(layer["active"], np.int32) for layer in document["layers"])
            recorded = RecordedPass(int(document["n_tokens"]), active)
        except (KeyError, TypeError, ValueError) as error:
            raise _no_trace(path, number, "a pass has the fields n_tokens and layers") from error
        if len(active) != header.n_layers or not all(_is_sorted_below(ids, header.n_neurons) for ids in active):
            message = f"expected sorted ids below {header.n_neurons} in {header.n_layers} layers"
            raise _no_trace(path, number, message)
        yield recorded


def _lines(path: Path) -> Iterator[Any]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise _no_trace(path, number, "not a JSON document") from error
    except OSError as error:
        raise FlashError(f"cannot read the trace: {error.strerror}", path=path) from error
    except UnicodeDecodeError as error:
        raise FlashError("not a recorded trace: not text", path=path) from error


def _header(path: Path, document: Any) -> TraceHeader:
    if not isinstance(document, dict) or document.get("flashfmt_trace") != TRACE_VERSION:
        raise _no_trace(path, 1, f"the first line has no flashfmt_trace = {TRACE_VERSION}")
    try:
        return TraceHeader(str(document["model"]), int(document["n_layers"]), int(document["n_neurons"]))
    except (KeyError, TypeError, ValueError) as error:
        raise _no_trace(path, 1, "the header has the fields model, n_layers and n_neurons") from error


def _is_sorted_below(ids: Ids, n_neurons: int) -> bool:
    return not ids.size or bool(ids[0] >= 0 and ids[-1] < n_neurons and (np.diff(ids) > 0).all())


def _no_trace(path: Path, line: int, why: str) -> FlashError:
    return FlashError(f"not a recorded trace: {why}", path=path, where=f"line {line}")
