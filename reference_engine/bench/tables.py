"""Tables of a benchmark for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from reference_engine.bench.activity import ActivityStatistics
from reference_engine.bench.results import AblationRow, Floor, Report, RunResult
from reference_engine.sizes import format_size

_GB: Final = 1e9
_PART_NAMES: Final = {
    "select": "selecting",
    "issue": "beginning reads",
    "wait": "waiting for flash",
    "ffn": "FFN arithmetic on what is fetched",
    "upkeep": "windows and caches",
    "check": "checksums",
    "rest": "attention, norms, logits, FFNs held whole",
}


def tables(report: Report) -> Iterator[RenderableType]:
    """Everything worth reading, in order."""
    yield Text(f"{report.model}, {format_size(report.model_bytes)}; {report.settings['summary']}", style="bold")
    yield Text(_machine(report))
    yield from _disclosures(report)
    if report.run is not None:
        yield _run(report.run)
        yield _split(report.run)
        if report.floor is not None:
            yield _floor(report.floor, report.run)
    if report.rows:
        yield _amounts(report.rows)
        yield _latencies(report.rows)
        if any(row.published is not None for row in report.rows):
            yield _published(report.rows)
        if report.rows[0].floor is not None:
            yield _floors(report.rows)
    for line in report.notes:
        yield Text(line)


def _machine(report: Report) -> str:
    m = report.machine
    return (
        f"{m['processor']}, {m['cores']} cores, {format_size(m['memory_bytes'])}, disk: {m['disk']}, {m['system']}, "
        f"load {m['load_average']:.1f}"
    )


def _disclosures(report: Report) -> Iterator[Text]:
    if report.is_synthetic:
        yield Text("synthetic weights: sizes of the real model, random values; the text means nothing", style="yellow")
    if report.activity is not None:
        yield Text(
            "synthetic activity: sets drawn to have the paper's statistics replace what the predictors choose; these "
            f"are computed all the same. Achieved: {_shares(report.activity.achieved)}; published: "
            f"{_shares(report.activity.published)}",
            style="yellow",
        )


def _shares(s: ActivityStatistics) -> str:
    return (
        f"{s.active_share:.1%} active, {s.held_share:.1%} in {s.window_tokens} tokens, "
        f"{s.incremental_share:.2%} added by a token"
    )


def _run(run: RunResult) -> Table:
    table = _plain("decoding")
    n = len(run.first_token_seconds)
    first = float(sum(run.first_token_seconds) / n)
    table.add_row("speed", f"{1 / run.seconds_per_token:.2f} tokens/s over {run.n_tokens} tokens, {n} sequence(s)")
    table.add_row("latency p50, p99", f"{_ms(run.percentile(50))}, {_ms(run.percentile(99))} a token")
    table.add_row("first token after", f"{first:.2f} s ({run.prompt_tokens} tokens of prompt)")
    table.add_row(
        "read from flash", f"{format_size(run.bytes_per_token)} a token, {run.requests_per_token:.0f} requests"
    )
    if run.hit_rate is not None:
        table.add_row("active neurons held", f"{run.hit_rate:.1%}")
    table.add_row("peak memory", format_size(run.peak_memory_bytes))
    return table


def _split(run: RunResult) -> Table:
    table = _plain("where a token's time goes")
    for name, seconds in run.split().items():
        if seconds > 0:
            table.add_row(_PART_NAMES[name], f"{_ms(seconds):>10}  {seconds / run.seconds_per_token:5.1%}")
    return table


def _floor(floor: Floor, run: RunResult) -> Table:
    table = _plain("what this machine allows, measured in the same run")
    table.add_row(
        "reading",
        f"{format_size(floor.read_bytes)} a token at {floor.read_bandwidth / _GB:.2f} GB/s ({floor.pattern}, "
        f"{format_size(floor.request_bytes)}) = {_ms(floor.read_seconds)}",
    )
    table.add_row(
        "memory",
        f"{format_size(floor.memory_bytes)} a token at {floor.memory_bandwidth / _GB:.1f} GB/s = "
        f"{_ms(floor.memory_seconds)}",
    )
    table.add_row("floor", f"{_ms(floor.seconds)}, the longer of both")
    table.add_row("measured over floor", f"{run.seconds_per_token / floor.seconds:.2f}")
    return table


def _amounts(rows: tuple[AblationRow, ...]) -> Table:
    table = _table("", "one row on top of the other: what is kept, and what a token reads")
    for name in ("DRAM GB", "slots", "read", "requests", "GB/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.label,
            f"{row.kept_bytes / _GB:.2f}",
            "" if row.held_share is None else f"{row.held_share:.1%}",
            _amount(row.run.bytes_per_token),
            f"{row.run.requests_per_token:.0f}",
            "-" if row.bytes_per_second is None else f"{row.bytes_per_second / _GB:.2f}",
        )
    return _captioned(
        table,
        "DRAM: weights kept from token to token; slots: neurons there is room for. Every row has the same ceiling in "
        "bytes. Where reading overlaps computing, it has no speed of its own (-).",
    )


def _latencies(rows: tuple[AblationRow, ...]) -> Table:
    table = _table("", "one row on top of the other: milliseconds a token")
    for name in ("I/O", "memory", "compute", "total", "tokens/s", "measured"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.label,
            f"{1e3 * row.io_seconds:.0f}",
            f"{1e3 * row.upkeep_seconds:.1f}",
            f"{1e3 * row.compute_seconds:.0f}",
            f"{1e3 * row.run.seconds_per_token:.0f}",
            f"{1 / row.run.seconds_per_token:.2f}",
            str(row.run.n_tokens),
        )
    return _captioned(
        table,
        "I/O: computing stood still. memory: windows and caches. compute: all else, predictors included. measured: "
        "tokens, after the window has settled.",
    )


def _published(rows: tuple[AblationRow, ...]) -> Table:
    table = _table("", "the paper's table 2, for these shapes on an Apple M1 Max")
    for name in ("DRAM GB", "read", "GB/s", "I/O"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        p = row.published
        if p is not None:
            figures = (f"{p.dram_gb:g}", f"{p.transferred_gb:g} GB", f"{p.gb_per_second:.2f}", f"{p.io_ms:g}")
            table.add_row(row.label, *figures)
    return table


def _floors(rows: tuple[AblationRow, ...]) -> Table:
    table = _table("", "against what this machine allows: milliseconds a token")
    for name in ("to read", "GB/s", "reads", "memory", "floor", "measured", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row.floor is not None:
            f, measured = row.floor, row.run.seconds_per_token
            table.add_row(
                row.label,
                _amount(f.read_bytes),
                f"{f.read_bandwidth / _GB:.2f}",
                f"{1e3 * f.read_seconds:.0f}",
                f"{1e3 * f.memory_seconds:.0f}",
                f"{1e3 * f.seconds:.0f}",
                f"{1e3 * measured:.0f}",
                f"{measured / f.seconds:.2f}",
            )
    return table


def _amount(nbytes: float) -> str:
    return f"{nbytes / _GB:.2f} GB" if nbytes >= _GB else f"{nbytes / 1e6:.1f} MB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds >= 0.01 else f"{1e3 * seconds:.2f} ms"


def _plain(title: str) -> Table:
    return Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))


def _captioned(table: Table, caption: str) -> Table:
    table.caption, table.caption_justify = caption, "left"
    return table


def _table(first: str, title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, min_width=12)
    return table
