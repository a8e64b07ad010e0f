"""Progress of a benchmark on stderr: a bar on a terminal, now and then a line elsewhere, nothing for short work."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from reference_engine.bench.synthetic_files import Report

_DELAY_SECONDS: Final = 2.0
_LINE_SECONDS: Final = 10.0


@contextmanager
def shown(*, quiet: bool) -> Iterator[Report]:
    """Gives what takes the progress of the work in the block."""
    if quiet:
        yield lambda what, done, total: None
    elif not sys.stderr.isatty():
        yield _lines()
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            tasks: dict[str, Any] = {}

            def report(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    for task in tasks.values():
                        bars.update(task, visible=False)
                    tasks[what] = bars.add_task(what, total=total)
                bars.update(tasks[what], completed=done, total=total, visible=done < total)

            yield report


def _lines() -> Report:
    following = time.monotonic() + _DELAY_SECONDS

    def report(what: str, done: int, total: int) -> None:
        nonlocal following
        now = time.monotonic()
        if now >= following and total:
            following = now + _LINE_SECONDS
            click.echo(f"{what}: {100 * done // total} %", err=True)

    return report
