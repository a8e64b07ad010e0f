"""Independent reads side by side: a device is fast with several requests under way, and checksums take the other cores.

Knows: jobs and threads. Does not know: what is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

N_THREADS: Final = 4


def run_side_by_side(jobs: Iterable[Callable[[], int]], progress: Callable[[int], None] | None = None) -> None:
    """Carry out jobs on a few threads, begun in their order.

    Parameters
    ----------
    jobs : each returns the bytes it has loaded.
    progress : called on this thread with what a job returned, in the order of the jobs.

    Raises
    ------
    Exception
        What the first job in order that failed has raised. Jobs that had not begun are then dropped, and none is
        running any more.
    """
    with ThreadPoolExecutor(N_THREADS, thread_name_prefix="flash-load") as pool:
        for nbytes in pool.map(lambda job: job(), jobs):
            if progress is not None:
                progress(nbytes)
