"""Fuzz `flashfmt.open`, verification and every way of reading: see README.md.

    python tests/fuzz/fuzz_open.py --seconds 600 --engine mutate --seed 1
    python tests/fuzz/fuzz_open.py --replay finding-0123456789.flash

Inputs are examined in a child process, which is started again after a crash or a hang. Exit status 1 with findings.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import itertools
import multiprocessing
import os
import pickle
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from minimise import minimised
from mutations import Mutator
from probe import Probe, Report
from seeds import load_builder, seeds

import flashfmt

HERE = Path(__file__).parent
HANG_SECONDS = 60.0
DIRECTORY_SHARE = 0.1
REPORT_EVERY = 200


@dataclass
class Tally:
    """What a run has seen so far."""

    n_inputs: int = 0
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    findings: dict[str, Path] = field(default_factory=dict)
    coverage: str = ""

    def add(self, report: Report, folder: Path) -> None:
        """Keep the first reproducer of each signature."""
        if report.signature not in self.findings:
            self.findings[report.signature] = report.write(folder)
            print(f"finding: {report.signature}: {report.message}\n  {self.findings[report.signature]}", flush=True)


def main() -> int:
    options = _options()
    if options.replay:
        return _replay(options.replay, options.directory)
    tally = Tally()
    started = time.monotonic()
    run = _run_mutations if options.engine == "mutate" else _run_atheris
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:
        run(options, Path(scratch), tally)
    seconds = time.monotonic() - started
    rules = sorted(tally.outcomes.keys() & flashfmt.RULES.keys())
    print(f"{tally.n_inputs} inputs in {seconds:.0f} s, {tally.n_inputs / seconds:.0f} a second")
    if tally.outcomes:
        print(f"{tally.outcomes['accepted']} accepted; {len(rules)} of {len(flashfmt.RULES)} rules broken")
        print("rules never broken:", *sorted(flashfmt.RULES.keys() - rules))
    if tally.coverage:
        print(tally.coverage)
    print(f"{len(tally.findings)} findings")
    return 1 if tally.findings else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--engine", choices=("mutate", "atheris"), default="mutate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path(".cache/fuzz"), help="where reproducers go")
    parser.add_argument("--replay", type=Path, help="examine one file in this process and show what it does")
    parser.add_argument("--directory", action="store_true", help="replay the file as a directory")
    return parser.parse_args()


def _replay(path: Path, as_directory: bool) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        result = Probe(Path(scratch)).outcomes(path.read_bytes(), as_directory=as_directory)
    print(result.details if isinstance(result, Report) else sorted(result))
    return 1 if isinstance(result, Report) else 0


def _run_mutations(options: argparse.Namespace, scratch: Path, tally: Tally) -> None:
    """Own engine: input n of a seed is always the same, so that a child that died can be asked again."""
    context = multiprocessing.get_context("spawn")
    stop_at = time.monotonic() + options.seconds
    while time.monotonic() < stop_at:
        current = context.Value("Q", tally.n_inputs)
        ours, theirs = context.Pipe(duplex=False)
        enough = context.Event()
        arguments = (options.seed, tally.n_inputs, scratch, current, enough, theirs)
        child = context.Process(target=_mutations_in_child, args=arguments, daemon=True)
        child.start()
        theirs.close()
        died = _watch(child, ours, current, stop_at, tally, options.findings)
        enough.set()
        if died is None:
            _drain(ours, tally, options.findings)
            child.join(HANG_SECONDS)
            tally.n_inputs = current.value + 1
        else:
            child.kill()
            child.join()
            died += f", exit code {child.exitcode}"
            mutator = _mutator()
            raw, _ = _input(mutator, options.seed, current.value)
            tally.add(Report(died, died, f"input {current.value} of seed {options.seed}", raw), options.findings)
            tally.n_inputs = current.value + 1


def _watch(
    child: Any, connection: Connection, current: Any, stop_at: float, tally: Tally, findings: Path
) -> str | None:
    """Collect what a child reports until time is over; says how the child died, if it did."""
    last, since = current.value, time.monotonic()
    while time.monotonic() < stop_at:
        if not _collect(connection, tally, findings):
            child.join()
            return "crash"
        now = time.monotonic()
        if current.value != last:
            last, since = current.value, now
        elif now - since > HANG_SECONDS:
            return f"hang: no end after {HANG_SECONDS:.0f} s"
    return None


def _collect(connection: Connection, tally: Tally, findings: Path) -> bool:
    """Take one message, if there is one soon; False where the child has closed the connection."""
    try:
        if connection.poll(0.5):
            message = connection.recv()
            if isinstance(message, Report):
                tally.add(message, findings)
            else:
                tally.outcomes.update(message)
    except EOFError:
        return False
    return True


def _drain(connection: Connection, tally: Tally, findings: Path) -> None:
    while _collect(connection, tally, findings):
        pass


def _mutations_in_child(
    seed: int, first: int, scratch: Path, current: Any, enough: Any, connection: Connection
) -> None:
    faulthandler.enable()
    mutator = _mutator()
    probe = Probe(scratch)
    outcomes: collections.Counter[str] = collections.Counter()
    seen: set[str] = set()
    for number in itertools.count(first):
        if enough.is_set():
            break
        current.value = number
        raw, as_directory = _input(mutator, seed, number)
        result = probe.outcomes(raw, as_directory=as_directory)
        if not isinstance(result, Report):
            outcomes.update(result)
        elif result.signature not in seen:
            seen.add(result.signature)
            connection.send(minimised(result, mutator, probe))
        if number % REPORT_EVERY == 0:
            connection.send(outcomes)
            outcomes = collections.Counter()
    connection.send(outcomes)


def _mutator() -> Mutator:
    builder = load_builder()
    return Mutator(builder, seeds(builder))


def _input(mutator: Mutator, seed: int, number: int) -> tuple[bytes, bool]:
    """Input `number` of a seed, and whether it is to be written as a directory."""
    rng = random.Random(f"{seed}:{number}")
    return mutator.generate(rng), rng.random() < DIRECTORY_SHARE


def _run_atheris(options: argparse.Namespace, scratch: Path, tally: Tally) -> None:
    """libFuzzer in a child; it ends at a crash or hang, is started again, and goes on from its corpus."""
    corpus = scratch / "corpus"
    corpus.mkdir()
    for number, raw in enumerate(seeds()):
        (corpus / f"seed-{number}").write_bytes(raw)
    stop_at = time.monotonic() + options.seconds
    while (left := stop_at - time.monotonic()) > 1:
        command = [
            sys.executable, str(HERE / "atheris_engine.py"), str(scratch), str(corpus),
            f"-max_total_time={int(left)}", f"-seed={options.seed + tally.n_inputs}", "-max_len=1048576",
            f"-artifact_prefix={scratch}/artifact-", "-print_final_stats=1", "-rss_limit_mb=0",
            f"-timeout={HANG_SECONDS:.0f}",
        ]  # fmt: skip
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
        executed = re.findall(r"(?:stat::number_of_executed_units:\s+|^#)(\d+)", result.stderr, re.MULTILINE)
        tally.n_inputs += int(executed[-1]) if executed else 0
        for line in re.findall(r"^#\d+\s.*cov: \d+ ft: \d+", result.stderr, re.MULTILINE)[-1:]:
            tally.coverage = "coverage: " + line.split("cov:")[1].strip().replace("ft:", "edges, features")
        for stored in sorted(scratch.glob("*.report")):
            tally.add(pickle.loads(stored.read_bytes()), options.findings)
            stored.unlink()
        artifacts = sorted(scratch.glob("artifact-*"))
        for artifact in artifacts:
            kind = artifact.name.split("-")[1]
            tally.add(
                Report(f"{kind} {artifact.name[-8:]}", kind, result.stderr[-4000:], artifact.read_bytes()),
                options.findings,
            )
            artifact.unlink()
        if result.returncode and not artifacts:
            raise RuntimeError(f"the engine failed:\n{result.stderr[-2000:]}")


if __name__ == "__main__":
    sys.exit(main())
