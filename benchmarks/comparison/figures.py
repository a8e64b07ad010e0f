"""Medians, ratios and tables of what was measured. Pure; no I/O.

A run is what `limited_run` wrote, with `case`, `contender`, `session` and `round`, which say what it may be compared
with: ratios are taken between runs of one session and round, so between neighbours in time.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Run = dict[str, Any]


def summarise(runs: Sequence[Run], targets: dict[str, float]) -> dict[str, Any]:
    """Figures of one case by contender.

    Parameters
    ----------
    runs : of one case.
    targets : see `Case`.
    """
    names = list(dict.fromkeys(run["contender"] for run in runs))
    rows = {name: _row([run for run in runs if run["contender"] == name]) for name in names}
    ours = [name for name in names if any(run["is_ours"] for run in runs if run["contender"] == name)]
    ratios = []
    for own in ours:
        for other in names:
            found = _ratios(runs, own, other) if other not in ours else []
            if found:
                ratio = statistics.median(found)
                target = targets.get(other)
                ratios.append(
                    {
                        "ours": own,
                        "against": other,
                        "ratio": ratio,
                        "range": [min(found), max(found)],
                        "target": target,
                        "is_met": None if target is None else ratio >= target,
                    }
                )
    return {"contenders": rows, "ratios": ratios}


def _row(runs: Sequence[Run]) -> dict[str, Any]:
    done = [run for run in runs if "failure" not in run]
    if not done:
        return {"failure": runs[-1]["failure"], "limit": runs[-1].get("limit")}
    medians = [run["seconds_per_token"] for run in done]
    reads = [run["bytes_read_per_token"] for run in done if run["bytes_read_per_token"] is not None]
    return {
        "seconds_per_token": statistics.median(medians),
        "range": [min(medians), max(medians)],
        "first_token_seconds": statistics.median(run["first_token_seconds"] for run in done),
        "bytes_read_per_token": statistics.median(reads) if reads else None,
        "peak_process_bytes": max(run["peak_process_bytes"] for run in done),
        "peak_cgroup_bytes": max((run["peak_cgroup_bytes"] or 0 for run in done), default=0) or None,
        "limit": done[-1]["limit"],
        "model_bytes": done[-1]["model_bytes"],
        "n_runs": len(done),
        "n_failed": len(runs) - len(done),
    }


def _ratios(runs: Sequence[Run], own: str, other: str) -> list[float]:
    by_place = {
        (run["session"], run["round"], run["contender"]): run["seconds_per_token"]
        for run in runs
        if "failure" not in run
    }
    places = dict.fromkeys((session, number) for session, number, _ in by_place)
    pairs = [(by_place.get((*place, own)), by_place.get((*place, other))) for place in places]
    return [theirs / mine for mine, theirs in pairs if mine is not None and theirs is not None]


def per_token(reported: dict[str, Any], n_warm: int) -> dict[str, Any]:
    """Median seconds and mean bytes read of the tokens behind the first `n_warm`."""
    seconds, reads = reported["seconds"], reported["bytes_read"]
    counted = reads[n_warm - 1 :]
    return {
        "seconds_per_token": statistics.median(seconds[n_warm:]),
        "bytes_read_per_token": (counted[-1] - counted[0]) / (len(counted) - 1) if len(counted) > 1 else None,
    }


def table(name: str, summary: dict[str, Any]) -> list[str]:
    """Lines for people."""
    lines = [
        name,
        f"  {'contender':18} {'s/token':>9} {'range':>17} {'first token':>12} {'read/token':>11} {'peak':>9} "
        f"{'limit':>9}  runs",
    ]
    for contender, row in summary["contenders"].items():
        if "failure" in row:
            lines.append(f"  {contender:18} {row['failure']}")
            continue
        low, high = row["range"]
        peak = row["peak_cgroup_bytes"] or row["peak_process_bytes"]
        lines.append(
            f"  {contender:18} {row['seconds_per_token']:9.4f} {f'{low:.4f}-{high:.4f}':>17} "
            f"{row['first_token_seconds']:10.2f} s {_size(row['bytes_read_per_token']):>11} "
            f"{_size(peak):>9} {_size(row['limit']):>9}  {row['n_runs']}"
            + (f", {row['n_failed']} failed" if row["n_failed"] else "")
        )
    for ratio in summary["ratios"]:
        target = (
            "" if ratio["target"] is None else f", aim {ratio['target']:g}: {'met' if ratio['is_met'] else 'missed'}"
        )
        low, high = ratio["range"]
        lines.append(
            f"  {ratio['ours']} is {ratio['ratio']:.2f} times ({low:.2f}-{high:.2f}) as fast as "
            f"{ratio['against']}{target}"
        )
    return lines


def _size(nbytes: float | None) -> str:
    if nbytes is None:
        return "-"
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
