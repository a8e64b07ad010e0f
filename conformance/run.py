#!/usr/bin/env python3
"""Run a reader against the suite: `python conformance/run.py [OPTIONS] -- CMD ...`. README.md is the protocol.

Needs the standard library only. Knows: cases, answers, processes. Does not know: the format.
"""

from __future__ import annotations

import argparse
import array
import base64
import concurrent.futures
import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

SUITE: Final = Path(__file__).resolve().parent
LEVELS: Final = ("structure", "values", "integrity", "selection", "window", "decode")
CLAIMS: Final = ("levels", "containers", "encodings", "codecs", "rules")
EXIT_REJECT: Final = 65
MAX_SHOWN: Final = 160

Json = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What became of a case: `outcome` is passed, failed or skipped; `detail` says why, unless it passed."""

    id: str
    level: str
    outcome: str
    detail: str = ""


class Reader:
    """The program under test."""

    def __init__(self, command: Sequence[str], timeout: float) -> None:
        self.command = list(command)
        self.timeout = timeout

    def ask(self, request: Json) -> tuple[int, bytes]:
        """Exit status and standard output. A reader that hangs, or dies of a signal, has a negative status."""
        text = json.dumps(request, separators=(",", ":"), sort_keys=True) + "\n"
        try:
            done = subprocess.run(
                self.command,
                input=text.encode("ascii"),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=self.timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return -1000, b""
        return done.returncode, done.stdout

    def capabilities(self) -> Json:
        """What the reader claims; one that does not answer this request claims everything."""
        status, output = self.ask({"level": "capabilities"})
        if status != 0:
            return {}
        try:
            claims = json.loads(output)
        except ValueError:
            return {}
        return claims if isinstance(claims, dict) else {}


class Suite:
    """The cases below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: list[Json] = json.loads((folder / "cases.json").read_text(encoding="ascii"))["cases"]

    def run(self, entry: Json, reader: Reader) -> Result:
        """Ask one question and judge the answer."""
        case = json.loads((self.folder / f"{entry['id']}.json").read_text(encoding="ascii"))
        with tempfile.TemporaryDirectory(prefix="conformance-") as scratch:
            request = dict(case["request"])
            if "recipe" in case:
                request["path"] = str(self._make(case["recipe"], Path(scratch)))
            elif "path" in request:
                request["path"] = str(self.folder / request["path"])
            status, output = reader.ask(request)
        detail = judge_rejection(status, output, case["rules"]) if "rules" in case else judge(status, output, case)
        return Result(entry["id"], entry["level"], "failed" if detail else "passed", detail)

    def _make(self, recipe: Json, scratch: Path) -> Path:
        """A model that no repository can hold, made from a sound one."""
        target = scratch / "model"
        shutil.copytree(self.folder / recipe["copy"], target)
        for operation, *arguments in recipe["operations"]:
            path = target / arguments[0]
            match operation:
                case "symlink":
                    path.symlink_to(arguments[1])
                case "mkdir":
                    path.mkdir()
                case "mkfifo":
                    os.mkfifo(path)
                case "rename":
                    path.rename(target / arguments[1])
                case _:
                    raise ValueError(f"unknown operation {operation}")
        return target


def canonical(value: object) -> bytes:
    """Canonical JSON: sorted keys, no white space, ASCII."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=True, allow_nan=False).encode()


def judge(status: int, output: bytes, case: Json) -> str:
    """What is wrong with the answer to a valid case; empty where nothing is."""
    if status != 0:
        return f"{_status(status)}: {_shown(output)}"
    try:
        answer = json.loads(output)
    except ValueError:
        return f"the answer is not JSON: {_shown(output)}"
    if not isinstance(answer, dict):
        return f"the answer is not an object: {_shown(output)}"
    expected = dict(case["expected"])
    for name, tolerance in case.get("approximate", {}).items():
        problem = _distance(answer.pop(name, None), expected.pop(name), tolerance)
        if problem:
            return f"{name}: {problem}"
    return _difference(answer, expected, "answer")


def judge_rejection(status: int, output: bytes, rules: Sequence[str]) -> str:
    """What is wrong with the answer to an invalid case; empty where nothing is."""
    wanted = " or ".join(rules)
    if status == 0:
        return f"accepted, wanted {wanted}"
    if status != EXIT_REJECT:
        return f"{_status(status)}, wanted {wanted}"
    try:
        rule = json.loads(output)["rule"]
    except (ValueError, KeyError, TypeError):
        return f"rejected without a rule: {_shown(output)}"
    return "" if rule in rules else f"rejected for {rule}, wanted {wanted}"


def skip_reason(entry: Json, claims: Mapping[str, Any]) -> str:
    """Why a case is beyond what the reader claims; empty where it is not."""
    levels = claims.get("levels", LEVELS)
    if entry["level"] not in levels:
        return f"level {entry['level']}"
    for need, values in entry["needs"].items():
        lacking = sorted(set(values) - set(claims.get(need, values)))
        if lacking:
            return f"{need}: {', '.join(lacking)}"
    prefixes = claims.get("rules")
    rules = entry.get("rules", [])
    if prefixes is not None and not all(rule.startswith(tuple(prefixes)) for rule in rules):
        return f"rule {' or '.join(rules)}"
    return ""


def _distance(answer: object, expected: str, tolerance: float) -> str:
    want = _floats(expected)
    try:
        have = _floats(answer)
    except (ValueError, TypeError):
        return "not base64 of float32"
    if len(have) != len(want):
        return f"{len(have)} numbers, wanted {len(want)}"
    largest = max((abs(value) for value in want), default=0.0)
    for index, (a, b) in enumerate(zip(have, want, strict=True)):
        if not abs(a - b) <= tolerance * largest:  # also where a is NaN
            return f"number {index} is {a!r}, wanted {b!r}, within {tolerance * largest:.3g}"
    return ""


def _floats(text: object) -> array.array[float]:
    if not isinstance(text, str):
        raise TypeError("not a string")
    values = array.array("f", base64.b64decode(text, validate=True))
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _difference(answer: Any, expected: Any, place: str) -> str:
    """The first place where two JSON values differ, or nothing."""
    if type(answer) is not type(expected):
        return f"{place} is {_shown(canonical(answer))}, wanted {_shown(canonical(expected))}"
    if isinstance(expected, dict):
        for key in sorted(answer.keys() | expected.keys()):
            if key not in answer:
                return f"{place}.{key} is missing"
            if key not in expected:
                return f"{place}.{key} is not expected"
            problem = _difference(answer[key], expected[key], f"{place}.{key}")
            if problem:
                return problem
        return ""
    if isinstance(expected, list):
        if len(answer) != len(expected):
            return f"{place} has {len(answer)} elements, wanted {len(expected)}"
        problems = (_difference(a, e, f"{place}[{i}]") for i, (a, e) in enumerate(zip(answer, expected, strict=True)))
        return next(filter(None, problems), "")
    return "" if answer == expected else f"{place} is {_shown(canonical(answer))}, wanted {_shown(canonical(expected))}"


def _status(status: int) -> str:
    if status == -1000:
        return "no answer in time"
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


def _shown(text: bytes) -> str:
    shown = text[:MAX_SHOWN].decode("utf-8", "backslashreplace").strip()
    return "".join(c if c.isprintable() else "?" for c in shown) + ("..." if len(text) > MAX_SHOWN else "")


def report(results: Sequence[Result], verbose: bool) -> None:
    """Failures, the table of levels, and the closing line."""
    for result in results:
        if result.outcome == "failed" or (verbose and result.outcome == "skipped"):
            print(f"{result.outcome} {result.id}: {result.detail}")
    counts = Counter((result.level, result.outcome) for result in results)
    print(f"{'level':<12}{'passed':>8}{'failed':>8}{'skipped':>8}")
    for level in LEVELS:
        row = [counts[level, outcome] for outcome in ("passed", "failed", "skipped")]
        if any(row):
            print(f"{level:<12}" + "".join(f"{count:>8}" for count in row))
    total = Counter(result.outcome for result in results)
    skipped = f", {total['skipped']} skipped" if total["skipped"] else ""
    print(f"{total['passed']} passed, {total['failed']} failed{skipped}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; 0 where all that is claimed passed, 1 otherwise or where nothing is, 2 for wrong usage."""
    parser = argparse.ArgumentParser(description="Run a reader against the conformance suite of flashfmt.")
    parser.add_argument("--only", metavar="PATTERN", action="append", help="cases whose id, level or rule matches")
    parser.add_argument("--json", action="store_true", help="write the results as JSON")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="readers at once (default: processors)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds a reader has for a case (default: 60)")
    parser.add_argument("--suite", type=Path, default=SUITE, help=argparse.SUPPRESS)
    parser.add_argument("--verbose", action="store_true", help="list skipped cases too")
    parser.add_argument("command", nargs="+", metavar="CMD", help="the reader and its arguments")
    options = parser.parse_args(arguments)
    if shutil.which(options.command[0]) is None:
        parser.error(f"there is no program {options.command[0]}")
    suite, reader = Suite(options.suite), Reader(options.command, options.timeout)
    entries = [entry for entry in suite.index if _selected(entry, options.only)]
    if not entries:
        parser.error("no case matches")
    claims = {name: value for name, value in reader.capabilities().items() if name in CLAIMS}

    def run(entry: Json) -> Result:
        reason = skip_reason(entry, claims)
        return Result(entry["id"], entry["level"], "skipped", reason) if reason else suite.run(entry, reader)

    with concurrent.futures.ThreadPoolExecutor(max(1, options.jobs)) as pool:
        results = list(pool.map(run, entries))
    if options.json:
        totals = Counter(result.outcome for result in results)
        print(json.dumps({"claims": claims, "totals": totals, "results": [asdict(r) for r in results]}, indent=1))
    else:
        report(results, options.verbose)
    outcomes = {result.outcome for result in results}
    return 1 if "failed" in outcomes or "passed" not in outcomes else 0


def _selected(entry: Json, patterns: Sequence[str] | None) -> bool:
    names = [entry["id"], entry["id"].rpartition("/")[2], entry["level"], *entry.get("rules", [])]
    return patterns is None or any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


if __name__ == "__main__":
    sys.exit(main())
