"""Runs an iterator in a thread of its own, ahead of its consumer by at most so many bytes.

Knows: threads and sizes. Does not know: what is produced.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


@contextmanager
def read_ahead(items: Iterator[T], size_of: Callable[[T], int], limit_nbytes: int) -> Iterator[Iterator[T]]:
    """An iterator over `items`, which a thread produces meanwhile.

    Parameters
    ----------
    size_of : bytes that an item holds.
    limit_nbytes : sum of the sizes of the items waiting; a single larger item waits alone.

    Errors of `items` are raised to the consumer in their place. Leaving the context stops and joins the thread.
    """
    queue = _Queue(size_of, limit_nbytes)
    thread = threading.Thread(target=queue.produce, args=(items,), name="flashfmt-read-ahead", daemon=True)
    thread.start()
    try:
        yield queue.consume()
    finally:
        queue.stop()
        thread.join()


class _Queue(Generic[T]):
    """The items that are ready, and how the two sides wait for each other."""

    def __init__(self, size_of: Callable[[T], int], limit_nbytes: int) -> None:
        self._size_of = size_of
        self._limit_nbytes = limit_nbytes
        self._ready: deque[T] = deque()
        self._ready_nbytes = 0
        self._finished = False
        self._stopped = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def produce(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer's thread
            self._error = error
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def consume(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._finished)
                if not self._ready:
                    break
                item = self._ready.popleft()
                self._ready_nbytes -= self._size_of(item)
                self._changed.notify_all()
            yield item
            del item
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()

    def _put(self, item: T) -> bool:
        nbytes = self._size_of(item)
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or not self._ready or self._ready_nbytes + nbytes <= self._limit_nbytes
            )
            if self._stopped:
                return False
            self._ready.append(item)
            self._ready_nbytes += nbytes
            self._changed.notify_all()
            return True
