"""Speed of flash reads against fio in the same run: ``python benchmarks/flash_io.py [DIRECTORY] [--json FILE]``.

Random reads of 16 KiB: by every backend with a queue kept full, against fio with the same depth and its other options
at their defaults (it begins each read by itself, as soon as there is room); and n at a time, all begun at once and
waited for, as a layer's misses are, against fio told to do the same. A line tells what fio does when told to begin
reads by 16, with registered buffers and file. Sequential reads by `CyclicStream` (what exact mode uses) and by a
`RangeReader`. All cases take turns in every round, because a shared disk changes its speed from one second to the
next; figures are medians over the rounds, ratios are medians of the ratios within a round. Batches are planned by the
compiled functions, as in an engine that has loaded numba; "plain" cases by numpy's. Processor seconds count user and
system time of the whole process. Without fio, the ratios are left out. The load average is reported with the
results: other programs slow all of this down, and raise processor time too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reference_engine.flash_io import (
    BackendName,
    CyclicStream,
    DirectFile,
    IoTuning,
    StreamRange,
    aligned_empty,
    open_reader,
)
from reference_engine.flash_io.device_measurement import Case, measure_case, temporary_file

ROW = 16 << 10
STREAM_BLOCK = 2 << 20
DEPTHS = (32, 128, 512)
BATCHES = (16, 64, 256, 400)
STREAM_DEPTH = 2
N_DRAWN = 64  # batches of rows that are drawn before the clock runs
FIO_ENGINES: dict[BackendName, str] = {"uring": "io_uring", "aio": "libaio", "pread": "io_uring"}
FIO_TUNED = {"fixedbufs": 1, "registerfiles": 1, "iodepth_batch_submit": 16, "iodepth_batch_complete_max": 512}
GIB = 2**30

Figures = tuple[float, float]  # bytes a second, processor seconds per GiB


def fio(path: Path, engine: str, seconds: float, **options: Any) -> Figures:
    """One run of fio with direct reads; `options` are fio's own."""
    command = ["fio", "--name=read", f"--filename={path}", f"--ioengine={engine}", "--output-format=json"]
    command += ["--direct=1", "--readonly", "--time_based", f"--runtime={round(1000 * seconds)}ms"]
    command += [f"--{name}={value}" for name, value in options.items()]
    job = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["jobs"][0]
    cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["read"]["runtime"] / 1000
    return float(job["read"]["bw_bytes"]), cpu / (job["read"]["io_bytes"] / GIB)


def ranges(path: Path, case: Case, seconds: float) -> Figures:
    """A `RangeReader`, with two batches under way."""
    measured = measure_case(path, case, seconds=seconds, rng=np.random.default_rng(time.time_ns()))
    return measured.bytes_per_second, measured.cpu_seconds_per_gib


def kept_full(path: Path, backend: BackendName, depth: int, seconds: float, *, compiled: bool) -> Figures:
    """A `RangeReader` with two batches under way, so that always `depth` random rows are in flight.

    Both land in one buffer, whose bytes nobody looks at: fio reads into `depth` buffers over and over, and memory that
    is still in a cache is quicker to read into.
    """
    n_rows = 2 * depth
    reader = open_reader(path, backend=backend, tuning=IoTuning(gap_bytes=0, depth=depth), compiled=compiled)
    buffer = aligned_empty(n_rows * ROW)
    buffer[:: 4 << 10] = 0
    positions = np.arange(n_rows) * ROW
    batches = draw(path, n_rows)
    cpu, started, n = time.process_time(), time.perf_counter(), 0
    pending = None
    while time.perf_counter() - started < seconds:
        following = reader.submit(batches[n % N_DRAWN], ROW, buffer, positions)
        if pending is not None:
            pending.wait()
        pending, n = following, n + 1
    if pending is not None:
        pending.wait()
    elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu
    reader.close()
    nbytes = n * n_rows * ROW
    return nbytes / elapsed, cpu / (nbytes / GIB)


def draw(path: Path, n_rows: int) -> list[npt.NDArray[np.int64]]:
    """Sorted offsets of random rows, `N_DRAWN` batches of them, so that drawing is not timed."""
    rng = np.random.default_rng(time.time_ns())
    n_all = path.stat().st_size // ROW
    return [np.sort(rng.choice(n_all, n_rows, replace=False, shuffle=False)) * ROW for _ in range(N_DRAWN)]


def batches_of(path: Path, n_rows: int, seconds: float, *, compiled: bool) -> Figures:
    """One batch of 16 KiB rows after the other, each waited for: what a layer's misses look like."""
    reader = open_reader(path, tuning=IoTuning(gap_bytes=0), compiled=compiled)
    buffer = aligned_empty(n_rows * ROW)
    buffer[:: 4 << 10] = 0
    positions = np.arange(n_rows) * ROW
    batches = draw(path, n_rows)
    cpu, started, n = time.process_time(), time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        reader.submit(batches[n // (n_rows * ROW) % N_DRAWN], ROW, buffer, positions).wait()
        n += n_rows * ROW
    elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu
    reader.close()
    return n / elapsed, cpu / (n / GIB)


def stream(path: Path, seconds: float) -> Figures:
    """Exact mode's ring of four buffers, consumed as fast as it fills."""
    n = 0
    with DirectFile(path) as file:
        blocks = [StreamRange(file, i * STREAM_BLOCK, STREAM_BLOCK) for i in range(path.stat().st_size // STREAM_BLOCK)]
        ring = CyclicStream(blocks, n_slots=4)
        cpu, started = time.process_time(), time.perf_counter()
        while time.perf_counter() - started < seconds:
            n += ring.take()[1].nbytes
            ring.give_back()
        elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu
        ring.close()
    return n / elapsed, cpu / (n / GIB)


def plan_cases(path: Path, seconds: float, *, with_fio: bool) -> list[tuple[str, str | None, Callable[[], Figures]]]:
    """(name, name of its baseline, call)."""
    found: list[tuple[str, str | None, Callable[[], Figures]]] = []
    for depth in DEPTHS:
        label = f"random 16 KiB, depth {depth}"
        random = {"rw": "randread", "bs": ROW, "iodepth": depth}
        if with_fio:
            found += [
                (f"{label}: fio {engine}", None, partial(fio, path, engine, seconds, **random))
                for engine in dict.fromkeys(FIO_ENGINES.values())
            ]
            found.append((f"{label}: fio, tuned", None, partial(fio, path, "io_uring", seconds, **random, **FIO_TUNED)))
        found += [
            (
                f"{label}: {name}",
                f"{label}: fio {engine}",
                partial(kept_full, path, name, depth, seconds, compiled=True),
            )
            for name, engine in FIO_ENGINES.items()
        ]
    for n in BATCHES:
        label = f"random 16 KiB, {n} at a time, waited for"
        baseline = f"{label}: fio io_uring"
        if with_fio:
            together = dict.fromkeys(("iodepth", "iodepth_batch_submit", "iodepth_batch_complete_min"), n)
            options = {"rw": "randread", "bs": ROW, "iodepth_batch_complete_max": n, "iodepth_low": 0, **together}
            found.append((baseline, None, partial(fio, path, "io_uring", seconds, **options)))
        found.append((f"{label}: auto", baseline, partial(batches_of, path, n, seconds, compiled=True)))
        found.append((f"{label}: auto, plain", baseline, partial(batches_of, path, n, seconds, compiled=False)))
    label = f"sequential 2 MiB, depth {STREAM_DEPTH}"
    baseline = f"{label}: fio io_uring"
    if with_fio:
        sizes = {"rw": "read", "bs": STREAM_BLOCK, "iodepth": STREAM_DEPTH}
        found.append((baseline, None, partial(fio, path, "io_uring", seconds, **sizes)))
    found.append((f"{label}: CyclicStream", baseline, partial(stream, path, seconds)))
    queues: tuple[BackendName, ...] = ("uring", "aio")
    found += [
        (f"{label}: {name}", baseline,
         partial(ranges, path, Case(name, "sequential", STREAM_BLOCK, STREAM_DEPTH), seconds))
        for name in queues
    ]  # fmt: skip
    return found


def main() -> None:
    """Measure, print a table, and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=Path())
    parser.add_argument("--gib", type=float, default=4.0, help="size of the temporary file")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="of the cases those that have this text in their names")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with_fio = shutil.which("fio") is not None
    if not with_fio:
        sys.stderr.write("fio is not installed: no ratios\n")
    loads = [os.getloadavg()[0]]
    with temporary_file(options.directory, int(options.gib * GIB)) as path:
        found = [case for case in plan_cases(path, options.seconds, with_fio=with_fio) if options.only in case[0]]
        rounds: dict[str, list[Figures]] = {name: [] for name, _, _ in found}
        for _ in range(options.rounds):
            for name, _, call in found:
                rounds[name].append(call())
            loads.append(os.getloadavg()[0])
    results: list[dict[str, Any]] = []
    for name, baseline, _ in found:
        speed, cpu = np.median(np.array(rounds[name]), axis=0).tolist()
        row: dict[str, Any] = {"case": name, "bytes_per_second": speed, "cpu_seconds_per_gib": cpu}
        if baseline in rounds:
            ratios = [mine[0] / other[0] for mine, other in zip(rounds[name], rounds[baseline], strict=True)]
            row |= {"baseline": baseline, "ratio": float(np.median(ratios)), "ratios": ratios}
        results.append(row)
    machine = {
        "cpu": platform.processor() or platform.machine(), "n_cpus": os.cpu_count(), "kernel": platform.release(),
        "load_average": [min(loads), max(loads)], "rounds": options.rounds, "seconds": options.seconds,
    }  # fmt: skip
    print(f"{'case':<58} {'GiB/s':>6} {'CPU-s/GiB':>9} {'x fio':>6}  range of the ratio")
    for row in results:
        ratio = f"{row['ratio']:6.2f}  {min(row['ratios']):.2f} to {max(row['ratios']):.2f}" if "ratio" in row else ""
        print(f"{row['case']:<58} {row['bytes_per_second'] / GIB:6.2f} {row['cpu_seconds_per_gib']:9.3f} {ratio}")
    print(f"load average {min(loads):.1f} to {max(loads):.1f} on {os.cpu_count()} processors")
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
