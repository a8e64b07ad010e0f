"""Progress of a benchmark on stderr: a bar on a terminal, now and then a line elsewhere, nothing for short work."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import click
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from reference_engine.step_progress import StepProgress, step_bars

_DELAY_SECONDS: Final = 2.0
_LINE_SECONDS: Final = 10.0


@contextmanager
def shown(*, quiet: bool) -> Iterator[StepProgress]:
    """Gives what takes the progress of the work in the block."""
    if quiet:
        yield lambda what, done, total: None
    elif not sys.stderr.isatty():
        yield _lines()
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with step_bars(*columns, keep_full=False) as report:
            yield report


def _lines() -> StepProgress:
    following = time.monotonic() + _DELAY_SECONDS

    def report(what: str, done: int, total: int) -> None:
        nonlocal following
        now = time.monotonic()
        if now >= following and total:
            following = now + _LINE_SECONDS
            click.echo(f"{what}: {100 * done // total} %", err=True)

    return report
