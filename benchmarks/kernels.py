"""Speed of the kernels against the memory bandwidth of the same run: ``python benchmarks/kernels.py [--json FILE]``.

Every figure of one token is stored bytes read a second over what a plain read of 1 GiB reaches with as many threads;
matrices are cycled through so that none is found in a cache. Each is given twice: of the kernel alone, which is how
compiled code calls it for a whole layer, and of the backend's function, with what Python adds. Several tokens are given
in GFLOP/s. Nothing else should run on the machine: the load average is reported with the results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np

from flashfmt.encodings import Encoding, encode, part_layout
from flashfmt.manifest import Activation
from reference_engine.backends import Backend, FfnShape, Matrix, load_backend
from reference_engine.backends.activations import ACTIVATION_CODES
from reference_engine.backends.numba_kernels import ffn_one, matmul_one
from reference_engine.backends.numba_weights import TAGS

WIDTH = 4096
WORKING_SET_BYTES = 600 << 20
READ_BYTES = 1 << 30
ENCODINGS = (Encoding.F32, Encoding.F16, Encoding.BF16, Encoding.Q8, Encoding.Q4)
ONE_TOKEN = ("gemv", "ffn gated", "ffn sparse 500")
SILU, IDENTITY = Activation(kind="silu"), Activation(kind="identity")


@numba.njit(parallel=True, fastmath=True)
def _read(words: Any, n_threads: int) -> Any:
    total = 0
    for c in numba.prange(n_threads):
        part = 0
        for i in range(c * words.size // n_threads, (c + 1) * words.size // n_threads):
            part += words[i]
        total += part
    return total


def median_seconds(call: Callable[[int], object], repeats: int = 30) -> float:
    """Median time of ``call(i)`` for i = 0, 1, ...; two calls before the first that counts."""
    times = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        call(i)
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:]))


def bandwidth(words: Any, n_threads: int) -> float:
    """Bytes a second of the fastest of several reads."""
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        _read(words, n_threads)
        best = max(best, words.nbytes / (time.perf_counter() - start))
    return best


def measure(backend: Backend, encoding: Encoding) -> dict[str, float]:
    """Seconds and bytes of each function for one encoding, with `WIDTH` columns."""
    rng = np.random.default_rng(0)
    stored = encode(rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 64, encoding)
    copies = [stored.copy() for _ in range(max(2, WORKING_SET_BYTES // stored.nbytes))]
    matrices = [Matrix(encoding, WIDTH, WIDTH, data) for data in copies]
    part = part_layout(encoding, WIDTH)
    x, out = rng.standard_normal((1, WIDTH)).astype(np.float32), np.zeros((1, WIDTH), np.float32)
    tag, n_threads = TAGS[encoding], backend.n_threads
    bases = [data.ctypes.data for data in copies]
    xa, oa = x.ctypes.data, out.ctypes.data

    def bundles(parts: tuple[str, ...]) -> tuple[FfnShape, list[Any]]:
        stride = len(parts) * part.nbytes
        n = stored.nbytes // stride
        shape = FfnShape(encoding, parts, WIDTH, part, stride, SILU if len(parts) == 3 else IDENTITY, IDENTITY)
        return shape, [data.view(np.uint8).reshape(-1)[: n * stride].reshape(n, stride) for data in copies]

    def add_bundles(shape: FfnShape, base: int, slots: int, n: int) -> None:
        code, up_code = (ACTIVATION_CODES[function.kind] for function in (shape.activation, shape.up_activation))
        ffn_one(
            tag, base, shape.stride, slots, n, WIDTH, part.nbytes, int(shape.is_gated), 0, 0, code, 0.0, up_code, 0.0,
            xa, oa, n_threads,
        )  # fmt: skip

    gated, gated_rows = bundles(("gate", "up", "down"))
    plain, plain_rows = bundles(("up", "down"))
    chosen = [np.sort(ids).astype(np.int32) for ids in np.split(rng.permutation(len(plain_rows[0]))[:2000], 4)]
    nbytes = dict(zip(ONE_TOKEN, (stored.nbytes, gated_rows[0].nbytes, 500 * plain.stride), strict=True))
    n = len(copies)

    def slots(i: int) -> Any:
        """Other bundles in each round of the copies: those of one round alone would stay in a large cache."""
        return chosen[i // n % len(chosen)]

    calls: dict[str, Callable[[int], object]] = {
        "gemv": lambda i: backend.matmul(matrices[i % n], x, out),
        "gemv kernel": lambda i: matmul_one(
            tag, bases[i % n], copies[0].strides[0], WIDTH, xa, WIDTH, oa, 0, n_threads
        ),
        "ffn gated": lambda i: backend.ffn(gated, gated_rows[i % n], None, x, out),
        "ffn gated kernel": lambda i: add_bundles(gated, bases[i % n], 0, len(gated_rows[0])),
        "ffn sparse 500": lambda i: backend.ffn(plain, plain_rows[i % n], slots(i), x, out),
        "ffn sparse 500 kernel": lambda i: add_bundles(plain, bases[i % n], slots(i + 2 * n).ctypes.data, 500),
    }
    result = {}
    for name, call in calls.items():
        seconds = median_seconds(call, 90)
        result[f"{name} us"] = seconds * 1e6
        result[f"{name} bytes/s"] = nbytes[name.removesuffix(" kernel")] / seconds

    for n_tokens in (16, 128):
        many = rng.standard_normal((n_tokens, WIDTH)).astype(np.float32)
        flops = 2 * n_tokens * WIDTH * WIDTH
        y = np.zeros((n_tokens, WIDTH), np.float32)
        t = median_seconds(lambda i, a=many, b=y: backend.matmul(matrices[i % len(copies)], a, b), 8)  # type: ignore[misc]
        result[f"matmul {n_tokens} GFLOP/s"] = flops / t / 1e9
        t = median_seconds(
            lambda i, a=many, b=y: backend.ffn(gated, gated_rows[i % len(copies)], None, a, b),  # type: ignore[misc]
            8,
        )
        result[f"ffn {n_tokens} GFLOP/s"] = 2 * n_tokens * 3 * WIDTH * len(gated_rows[0]) / t / 1e9
    return result


def measure_attention(backend: Backend) -> dict[str, float]:
    """Attention of 32 heads of 128 over 8 key/value heads at 4096 positions, float16, in microseconds."""
    rng = np.random.default_rng(0)
    cache = rng.standard_normal((2, 8, 4096, 128)).astype(np.float16)
    result = {}
    for n_tokens in (1, 128):
        q = rng.standard_normal((n_tokens, 32, 128)).astype(np.float32)
        t = median_seconds(lambda _, a=q: backend.attend(a, *cache, n_past=4096 - len(a), scale=0.09), 5)  # type: ignore[misc]
        result[f"attend {n_tokens} us"] = t * 1e6
    return result


def main() -> None:
    """Measure, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--threads", type=int, help="threads (default: usable cores)")
    arguments = parser.parse_args()
    backend = load_backend("numba", arguments.threads)
    load = os.getloadavg()[0]
    words = np.ones(READ_BYTES // 8, np.int64)
    ceilings = [bandwidth(words, backend.n_threads)]
    kernels = {str(encoding): measure(backend, encoding) for encoding in ENCODINGS}
    attention = measure_attention(backend)
    ceilings.append(bandwidth(words, backend.n_threads))
    ceiling = max(ceilings)

    write = sys.stdout.write
    write(f"{backend.n_threads} threads, load average {load:.2f} at start; reads at ")
    write(" and ".join(f"{c / 1e9:.1f}" for c in ceilings) + " GB/s before and after\n\n")
    write("        one token: us (share of bandwidth), the kernel alone | through the backend\n")
    write("        gemv                          ffn gated                     ffn sparse 500\n")
    for encoding, figures in kernels.items():
        cells = [
            " | ".join(
                f"{figures[f'{call} us']:6.0f} ({figures[f'{call} bytes/s'] / ceiling:.2f})"
                for call in (f"{name} kernel", name)
            )
            for name in ONE_TOKEN
        ]
        write(f"{encoding:5}" + " ".join(cells) + "\n")
    write("\n        several tokens: GFLOP/s\n        matmul 16    128   ffn 16    128\n")
    for encoding, figures in kernels.items():
        rates = [figures[f"{name} GFLOP/s"] for name in ("matmul 16", "matmul 128", "ffn 16", "ffn 128")]
        write(f"{encoding:9}" + "".join(f"{rate:8.0f}" for rate in rates) + "\n")
    write("\nattention, 4096 positions: " + ", ".join(f"{k} {v:.0f}" for k, v in attention.items()) + "\n")
    if arguments.json:
        machine = {"processor": platform.processor(), "cores": os.cpu_count(), "load_average": load}
        report = {"machine": machine, "bandwidth": ceilings, "kernels": kernels, "attention": attention}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
