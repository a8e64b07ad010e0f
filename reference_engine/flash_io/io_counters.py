"""What reading from flash has cost, as values."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class IoCounters:
    """What flash reading has cost so far.

    `bytes_read` is what the system delivered, gaps that were read through included; `n_requests` is what it was asked
    for; `wait_seconds` is how long callers stood waiting.
    """

    bytes_read: int = 0
    n_requests: int = 0
    wait_seconds: float = 0.0

    def __add__(self, other: IoCounters) -> IoCounters:
        return IoCounters(
            self.bytes_read + other.bytes_read,
            self.n_requests + other.n_requests,
            self.wait_seconds + other.wait_seconds,
        )

    def __sub__(self, earlier: IoCounters) -> IoCounters:
        return IoCounters(
            self.bytes_read - earlier.bytes_read,
            self.n_requests - earlier.n_requests,
            self.wait_seconds - earlier.wait_seconds,
        )


class IoTally:
    """Counters that several threads add to; once a batch, never once a request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes_read = 0
        self._n_requests = 0
        self._wait_seconds = 0.0

    @property
    def counters(self) -> IoCounters:
        """The sum so far."""
        with self._lock:
            return IoCounters(self._bytes_read, self._n_requests, self._wait_seconds)

    def add(self, *, bytes_read: int = 0, n_requests: int = 0, wait_seconds: float = 0.0) -> None:
        """Add to the sum."""
        with self._lock:
            self._bytes_read += bytes_read
            self._n_requests += n_requests
            self._wait_seconds += wait_seconds
