"""The files of a benchmark: its figures as JSON, its tables, and pictures. Each appears whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich.console import Console

from flashfmt.errors import FlashWriteError
from reference_engine.bench.plot import plot
from reference_engine.bench.results import Report
from reference_engine.bench.tables import tables

RESULTS_NAME: Final = "results.json"
TABLES_NAME: Final = "tables.txt"
PLOT_NAMES: Final = ("latency.png", "latency.svg")
_WIDTH: Final = 120


def document(report: Report) -> str:
    """The report as JSON text."""
    return json.dumps(report.as_dict(), indent=1, allow_nan=False)


def write_results(report: Report, folder: Path) -> None:
    """Write figures and tables to `folder`, which is made if need be.

    Raises
    ------
    FlashWriteError
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlashWriteError(f"cannot be made: {error.strerror or error}", path=folder) from error
    with _replaced(folder / RESULTS_NAME) as partial:
        partial.write_text(document(report) + "\n", encoding="utf-8")
    with _replaced(folder / TABLES_NAME) as partial, partial.open("w", encoding="utf-8") as file:
        console = Console(file=file, width=_WIDTH, highlight=False)
        for part in tables(report):
            console.print(part)


def write_plots(report: Report, folder: Path) -> None:
    """Draw the figures into `folder`.

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    FlashWriteError
    """
    for name in PLOT_NAMES:
        with _replaced(folder / name) as partial:
            plot(report, partial)


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A sibling with the same ending to write, which gets the name of `path` when the block has gone well."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise FlashWriteError(f"cannot be written: {error.strerror or error}", path=path) from error
    finally:
        partial.unlink(missing_ok=True)
