"""What every contender's program reports, in one form: a JSON object on the last line of its standard output.

    {"seconds": [...], "bytes_read": [...], "first_token_at": 1700000000.0, ...}

`seconds` has an entry for each token, the first included, and `bytes_read` what the process had read from the device
at the end of each; `first_token_at` is the time of day. Needs nothing but the standard library.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def device_bytes_read(pid: int | str = "self") -> int:
    """Bytes that a process has caused to be read from the device, page faults and reading ahead included."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        name, _, value = line.partition(": ")
        if name == "read_bytes":
            return int(value)
    raise OSError("the kernel does not count bytes read")


def time_tokens(feed: Callable[[int], object], n_tokens: int, vocab_size: int) -> dict[str, Any]:
    """Feed `n_tokens` tokens, one after the other; returns what is to be reported."""
    seconds, bytes_read, first_token_at = [], [], 0.0
    for i in range(n_tokens):
        began = time.perf_counter()
        feed(7919 * (i + 1) % vocab_size)
        seconds.append(time.perf_counter() - began)
        bytes_read.append(device_bytes_read())
        if i == 0:
            first_token_at = time.time()
    return {"seconds": seconds, "bytes_read": bytes_read, "first_token_at": first_token_at}


def report(figures: dict[str, Any]) -> None:
    """Write figures to standard output."""
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()
