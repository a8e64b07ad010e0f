"""What keeping window and cache costs a token, reads and arithmetic apart: ``python benchmarks/cache_upkeep.py``.

At the geometry of OPT-6.7B (32 layers of 16384 neurons, a quarter of them held) synthetic activity goes through window
and cache. No byte is read; rows are one byte wide, so that what the paper's rule moves is counted but not timed. The
figure is set against the fastest that a token could be there: 216 ms for reading from memory, once, what it uses.

Nothing else should run on the machine: the load average is reported with the results.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from reference_engine.bundle_cache import BundleCache
from reference_engine.neuron_window import Ids, parse_window

N_LAYERS, N_NEURONS = 32, 16384


def activity(n_tokens: int, share: float, reuse: float, seed: int) -> list[Ids]:
    """Active sets of one layer: some stay from token to token, the others are drawn with a Zipf popularity."""
    rng = np.random.default_rng(seed)
    log_popularity = -0.6 * np.log(rng.permutation(N_NEURONS) + 1.0)
    n_active, previous, trace = int(share * N_NEURONS), np.empty(0, np.int64), []
    for _ in range(n_tokens):
        keys = log_popularity + rng.gumbel(size=N_NEURONS)  # the largest are a draw without replacement
        keys[previous[rng.random(len(previous)) < reuse]] = np.inf
        previous = np.argpartition(-keys, n_active)[:n_active]
        trace.append(np.sort(previous).astype(np.int32))
    return trace


def measure(rule: str, share: float, capacity: int, *, n_tokens: int, reuse: float) -> dict[str, float | str]:
    """Median milliseconds a token of all layers, after the caches have filled."""
    traces = [activity(n_tokens, share, reuse, seed) for seed in range(4)]
    window_choice = parse_window(rule)
    windows = [window_choice.build(N_NEURONS, capacity) for _ in range(N_LAYERS)]
    caches = [BundleCache(np.zeros((capacity, 1), np.uint8), N_NEURONS) for _ in range(N_LAYERS)]
    times, missing, moved = [], 0, 0
    for token in range(n_tokens):
        if token == n_tokens // 2:
            missing = 0
            moved = sum(cache.n_moved for cache in caches)
        began = time.perf_counter()
        for layer in range(N_LAYERS):
            step = windows[layer].step(traces[layer % len(traces)][token])
            caches[layer].apply(step)
            caches[layer].slots(step.hits)
            missing += len(step.missing)
        times.append(time.perf_counter() - began)
    n_measured = n_tokens - n_tokens // 2
    return {
        "rule": rule,
        "active": share,
        "milliseconds": 1e3 * float(np.median(times[n_tokens // 2 :])),
        "missing_share": missing / n_measured / N_LAYERS / N_NEURONS,
        "rows_moved": (sum(cache.n_moved for cache in caches) - moved) / n_measured,
    }


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacity", type=int, default=4000, help="slots of a layer [%(default)s]")
    parser.add_argument("--tokens", type=int, default=60, help="[%(default)s]")
    parser.add_argument("--reuse", type=float, default=0.6, help="share that stays active [%(default)s]")
    parser.add_argument("--token-ms", type=float, default=216.0, help="time of a token to compare with [%(default)s]")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {options.capacity} of {N_NEURONS} held")
    results = []
    for rule in ("frequency", "lru", "paper:4"):
        for share in (0.05, 0.1):
            result = measure(rule, share, options.capacity, n_tokens=options.tokens, reuse=options.reuse)
            results.append(result)
            print(
                f"{rule:>12} {share:4.0%} active {result['missing_share']:6.2%} missing: "
                f"{result['milliseconds']:6.2f} ms a token = {result['milliseconds'] / options.token_ms:5.2%} of "
                f"{options.token_ms:.0f} ms; {result['rows_moved']:.0f} rows moved"
            )
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
