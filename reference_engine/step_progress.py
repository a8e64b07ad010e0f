"""Progress of work in named steps, and bars for it on stderr.

Knows: rich's bars. Does not know: what the steps are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn

StepProgress = Callable[[str, int, int], None]
"""Told the step, how much of it is done, and how much there is."""


@contextmanager
def step_bars(*columns: ProgressColumn, keep_full: bool) -> Iterator[StepProgress]:
    """Gives what shows the progress of the work in the block: the bar of the newest step.

    Parameters
    ----------
    keep_full : show a bar that is full until the next step begins.
    """
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for task in tasks.values():
                    bars.update(task, visible=False)
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total, visible=keep_full or done < total)

        yield report
