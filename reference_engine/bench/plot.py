"""A picture of a benchmark: where the time of a token goes, in one run or row by row. Needs matplotlib."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, Final

from reference_engine.bench.results import AblationRow, Report, RunResult
from reference_engine.evaluation.plot import require_matplotlib

_CLOSER: Final = 1.6  # how much of the median row the second panel shows
_PARTS: Final = ("I/O", "memory management", "compute")


def plot(report: Report, path: Path) -> None:
    """Draw a report into a .png or .svg.

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    OSError
        If the file cannot be written.
    """
    figure = require_matplotlib().Figure(figsize=(14, 0.45 * max(len(report.rows), 6) + 1.6), layout="constrained")
    if report.rows:
        latency, closer, amounts = figure.subplots(1, 3, sharey=True, width_ratios=(3, 3, 2))
        _draw_rows(latency, report.rows)
        _draw_rows(closer, report.rows)
        closer.set(xlim=(0, _CLOSER * statistics.median(row.run.seconds_per_token for row in report.rows)))
        closer.set_title("Closer")
        latency.legend(fontsize=8)
        _draw_amounts(amounts, report.rows)
        amounts.invert_yaxis()
    elif report.run is not None:
        tokens, split = figure.subplots(1, 2)
        _draw_tokens(tokens, report)
        _draw_split(split, report.run)
    kind = "synthetic weights and activity" if report.activity is not None else report.settings["summary"]
    figure.suptitle(f"{report.model}: {kind}", fontsize=10)
    figure.savefig(path, dpi=150)


def _draw_rows(axes: Any, rows: tuple[AblationRow, ...]) -> None:
    labels = [row.label for row in rows]
    left = [0.0] * len(rows)
    for name in _PARTS:
        values = [_part(row, name) for row in rows]
        axes.barh(labels, values, left=left, label=name)
        left = [a + b for a, b in zip(left, values, strict=True)]
    for row, end in zip(rows, left, strict=True):
        axes.annotate(f" {end:.3g} s", (end, row.label), va="center", fontsize=8, annotation_clip=True)
    floors = [(row.floor.seconds, row.label) for row in rows if row.floor is not None]
    if floors:
        axes.plot(*zip(*floors, strict=True), "k|", markersize=16, label="floor of this machine")
    axes.margins(x=0.2)
    axes.set(xlabel="seconds a token", title="Latency")


def _part(row: AblationRow, name: str) -> float:
    return {"I/O": row.io_seconds, "memory management": row.upkeep_seconds, "compute": row.compute_seconds}[name]


def _draw_amounts(axes: Any, rows: tuple[AblationRow, ...]) -> None:
    values = [row.run.bytes_per_token / 1e9 for row in rows]
    axes.barh([row.label for row in rows], values, color="tab:gray")
    axes.set(xscale="log", xlabel="GB", title="Read from flash for a token")


def _draw_tokens(axes: Any, report: Report) -> None:
    run = report.run
    if run is None:
        return
    axes.plot(range(1, run.n_tokens + 1), run.token_seconds, marker=".", linewidth=1)
    if report.floor is not None:
        axes.axhline(report.floor.seconds, color="k", linestyle=":", label="floor of this machine")
        axes.legend(fontsize=8)
    axes.set(xlabel="token", ylabel="seconds", title=f"{1 / run.seconds_per_token:.2f} tokens/s", ylim=(0, None))


def _draw_split(axes: Any, run: RunResult) -> None:
    split = run.split()
    axes.barh(list(split), list(split.values()))
    axes.invert_yaxis()
    axes.set(xlabel="seconds a token", title="Where the time goes")
