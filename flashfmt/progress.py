"""Progress of long work on stderr: a bar on a terminal, now and then a line elsewhere, nothing for short work.

Knows: bytes done and in all. Does not know: the work.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from rich.progress import Progress

DELAY_SECONDS: Final = 2.0
LINE_SECONDS: Final = 10.0


class ByteProgress:
    """Takes what has been done; the base class shows nothing."""

    def advance(self, nbytes: int) -> None:
        """Note `nbytes` more bytes."""

    def update(self, done: int, total: int) -> None:
        """Note that `done` of `total` bytes are done."""


@contextmanager
def byte_progress(label: str, total: int | None, *, quiet: bool) -> Iterator[ByteProgress]:
    """Show the progress of the work done in the block.

    Parameters
    ----------
    total : bytes in all; None where the work itself says so.
    """
    if quiet:
        yield ByteProgress()
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as Speed

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), Speed(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            yield _Bar(bar, label, total)
    else:
        yield _Lines(label, total)


class _Bar(ByteProgress):
    """A bar of rich."""

    def __init__(self, bar: Progress, label: str, total: int | None) -> None:
        self._bar = bar
        self._task = bar.add_task(label, total=total)

    def advance(self, nbytes: int) -> None:
        self._bar.advance(self._task, nbytes)

    def update(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)


class _Lines(ByteProgress):
    """Plain lines, the first after two seconds."""

    def __init__(self, label: str, total: int | None) -> None:
        self._label = label
        self._done = 0
        self._total = total
        self._next = time.monotonic() + DELAY_SECONDS

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        self._show()

    def update(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if now >= self._next and self._total:
            self._next = now + LINE_SECONDS
            share = 100 * self._done // self._total
            click.echo(f"{self._label}: {share} % of {format_bytes(self._total)}", err=True)


def format_bytes(nbytes: float) -> str:
    """A size for people: 3 digits or so, and a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} TiB"
