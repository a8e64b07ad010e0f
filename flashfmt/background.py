"""A thread that carries out the writer's steps in order, a few ahead of which the caller may run.

Checksums and writes of one block overlap with the caller's making of the next. What a step raises, the next call of
the caller raises.

Knows: callables. Does not know: files.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Final

Step = Callable[[], None]

_STOP: Final = None


class Background:
    """Runs steps one after the other; at most `n_ahead` wait, so that memory stays bounded."""

    def __init__(self, n_ahead: int) -> None:
        self._steps: queue.Queue[Step | None] = queue.Queue(n_ahead)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="flashfmt-writer", daemon=True)
        self._thread.start()

    def submit(self, step: Step) -> None:
        """Queue a step; waits while the queue is full.

        Raises
        ------
        BaseException
            What an earlier step raised. No step runs after that.
        """
        if self._error is not None:
            raise self._error
        self._steps.put(step)

    def finish(self) -> None:
        """Run what is queued, end the thread, and raise what a step raised."""
        self.close()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Run what is queued, unless a step has failed, and end the thread; raises nothing."""
        if self._thread.is_alive():
            self._steps.put(_STOP)
            self._thread.join()

    def _run(self) -> None:
        while (step := self._steps.get()) is not _STOP:
            if self._error is None:
                try:
                    step()
                except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
                    self._error = error
