"""One comparison carried out: models made, contenders run in turn, results kept as they come.

Knows: the order of things. Does not know: how a contender works, what the figures mean.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from comparison.cases import Case, disk_groups, memory_limit, shape_of, tokens_of
from comparison.contenders import CONTENDERS, Contender, Tools
from comparison.figures import Run, per_token, summarise
from comparison.model_store import ModelStore, files_of, nominal_nbytes

_CASE_FIELDS: Final = ("shape", "encoding", "residents", "limit", "basis", "targets")
_BENCHMARKS: Final = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Settings:
    """How a comparison is carried out.

    Attributes
    ----------
    n_rounds : times that every contender of a group runs, in turn.
    room : bytes that the models may take on the disk.
    prefix : command that every run is started with.
    timeout : seconds that a run may take.
    prepare_only : make the models and run nothing.
    """

    n_rounds: int
    room: int
    prefix: tuple[str, ...]
    timeout: float
    tools: Tools
    prepare_only: bool = False


class Results:
    """Runs so far, in a JSON file if there is a path; runs of other sessions in it stay."""

    def __init__(self, path: Path | None, machine: dict[str, Any]) -> None:
        self._path = path
        known = json.loads(path.read_text()) if path is not None and path.exists() else {}
        self._machine = machine
        self._cases: dict[str, dict[str, Any]] = {name: case["case"] for name, case in known.get("cases", {}).items()}
        self.runs: list[Run] = known.get("runs", [])

    def begin(self, case: Case, *, fresh: bool) -> None:
        """Take up a case; with `fresh`, forget what is known of it."""
        self._cases[case.name] = {name: value for name, value in asdict(case).items() if name in _CASE_FIELDS}
        if fresh:
            self.runs = [run for run in self.runs if run["case"] != case.name]

    def add(self, run: Run) -> None:
        """Keep a run."""
        self.runs.append(run)
        if self._path is None:
            return
        document = {
            "machine": self._machine,
            "cases": {name: {"case": case, **self.summary(name)} for name, case in self._cases.items()},
            "runs": self.runs,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(document, indent=1) + "\n")
        unfinished.rename(self._path)

    def summary(self, name: str) -> dict[str, Any]:
        """Figures of a case."""
        return summarise([run for run in self.runs if run["case"] == name], self._cases[name]["targets"])


def compare(
    case: Case, store: ModelStore, settings: Settings, results: Results, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run a case; returns its summary."""
    chosen = [CONTENDERS[name] for name in case.contenders]
    session = time.strftime("%Y-%m-%dT%H:%M:%S")
    able = []
    for contender in chosen:
        reason = contender.unavailable(settings.tools)
        if reason is None:
            able.append(contender)
        elif not settings.prepare_only:
            results.add(_labels(case, contender, session, 0) | {"failure": reason, "limit": None})
    forms = {contender.name: contender.form_for(case.encoding, case.residents) for contender in able}
    sizes = {form: nominal_nbytes(shape_of(case), form) for form in forms.values()}
    for group in disk_groups(forms, sizes, settings.room) if forms else []:
        wanted = {forms[name] for name in group}
        for form in sorted(wanted):
            say(f"{case.name}: making {form}")
            store.make_room(shape_of(case), form, keep=wanted, room=settings.room)
            store.require(shape_of(case), form)
        for form in wanted:
            _compile(store.path(shape_of(case), form))
        for number in range(0 if settings.prepare_only else settings.n_rounds):
            for name in group:
                run = _run(case, CONTENDERS[name], store.path(shape_of(case), forms[name]), settings)
                results.add(_labels(case, CONTENDERS[name], session, number) | run)
                say(f"{case.name}: {name}: " + _shown(run))
    return results.summary(case.name)


def _run(case: Case, contender: Contender, path: Path, settings: Settings) -> Run:
    files = files_of(path)
    model_nbytes = sum(file.stat().st_size for file in files)
    basis = model_nbytes if case.basis == "own" else nominal_nbytes(shape_of(case), "flash-f16-f16")
    limit = memory_limit(case.limit, basis)
    n_warm, n_tokens = tokens_of(case, contender.name)
    spec = {
        "command": contender.command(path, limit, n_warm + n_tokens, settings.tools),
        "limit": limit,
        "files": [str(file) for file in files],
        "timeout": settings.timeout,
    }
    command = [*settings.prefix, sys.executable, "-m", "comparison.limited_run", json.dumps(spec)]
    code, output, complaint = _outcome(command)
    if code != 0:
        return {"failure": f"exit code {code}: {complaint.strip()[-300:]}", "limit": limit}
    run: Run = json.loads(output.splitlines()[-1])
    run |= {"limit": limit, "model_bytes": model_nbytes, "n_warm": n_warm}
    return run if "failure" in run else run | per_token(run, n_warm)


def _compile(path: Path) -> None:
    """Have our kernels compiled for a model ahead of its runs, as they are only once in an installation."""
    if path.suffix == ".flash":
        spec = {"path": str(path), "mode": "compile", "tokens": 0}
        code, _, complaint = _outcome([sys.executable, "-m", "comparison.run_ours", json.dumps(spec)])
        if code != 0:
            raise RuntimeError(f"the kernels do not compile: {complaint.strip()[-300:]}")


def _outcome(command: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and error of a command; it and what it started end when this program has to."""
    paths = [str(_BENCHMARKS), str(_BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        output, complaint = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    return process.returncode, output, complaint


def _labels(case: Case, contender: Contender, session: str, number: int) -> Run:
    return {
        "case": case.name,
        "contender": contender.name,
        "what": contender.text,
        "is_ours": contender.is_ours,
        "session": session,
        "round": number,
    }


def _shown(run: Run) -> str:
    if "failure" in run:
        return str(run["failure"])
    return f"{run['seconds_per_token']:.4f} s a token, first after {run['first_token_seconds']:.1f} s"
