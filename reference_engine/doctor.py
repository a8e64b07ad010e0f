"""The verb ``flashfmt doctor``: measures a storage device, says how it will be read and why, and keeps that.

The answer goes to stdout, progress to stderr. Knows options and tables; measuring and choosing are `flash_io`'s.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from flashfmt.errors import FlashError, FlashWriteError
from reference_engine.flash_io.device_choice import choose_profile
from reference_engine.flash_io.device_measurement import (
    BACKEND_NAMES,
    BLOCKS,
    DEPTHS,
    cases,
    measure,
    temporary_file,
)
from reference_engine.flash_io.device_profile import (
    DeviceProfile,
    Measurement,
    device_name,
    load_profile,
    request_limit,
    save_profile,
)
from reference_engine.sizes import format_size, parse_size

_MIN_BYTES: Final = 64 << 20


def _size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    try:
        nbytes = parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None
    if nbytes < _MIN_BYTES:
        raise click.BadParameter(f"at least {format_size(_MIN_BYTES)}", ctx, param)
    return nbytes


@click.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True), default=".")
@click.option("--size", callback=_size, default="1GiB", show_default=True, help="Of the temporary file.")
@click.option(
    "--seconds",
    type=click.FloatRange(0.01),
    default=0.1,
    show_default=True,
    help="For each measurement; each is made twice, and the faster counts.",
)
@click.option("--show", is_flag=True, help="Show the profile there is; measure nothing.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
def doctor(path: Path, size: int, seconds: float, *, show: bool, as_json: bool, quiet: bool) -> None:
    """Measure the device that PATH lies on, choose how flash models on it are read, and remember it.

    Writes a temporary file next to PATH and deletes it. Nothing else should use the device meanwhile.
    """
    if show:
        profile, kept_in = load_profile(path), None
    else:
        profile = choose_profile(_measure(path, size, seconds, quiet=quiet or as_json))
        try:
            kept_in = save_profile(path, profile)
        except OSError as error:
            raise FlashWriteError(f"cannot keep the profile: {error.strerror}", path=error.filename) from error
    if as_json:
        click.echo(json.dumps(_report(path, profile, kept_in)))
    else:
        _print(Console(), path, profile, kept_in)


def _measure(path: Path, size: int, seconds: float, *, quiet: bool) -> list[Measurement]:
    directory = path if path.is_dir() else path.absolute().parent
    limit = request_limit(directory)
    wanted = cases(BACKEND_NAMES, BLOCKS, [depth for depth in DEPTHS if limit is None or depth <= limit])
    with Progress(console=Console(stderr=True), disable=quiet, transient=True) as progress:
        task = progress.add_task("writing the test file", total=2 * len(wanted))
        with temporary_file(directory, size) as file:
            progress.update(task, description="measuring")
            results = measure(file, wanted, seconds=seconds, progress=lambda: progress.advance(task))
    if all(m.backend == "mmap" for m in results):
        raise FlashError("nothing but mmap works here", path=directory)
    return results


def _report(path: Path, profile: DeviceProfile, kept_in: Path | None) -> dict[str, Any]:
    return {"device": device_name(path), "kept_in": kept_in and str(kept_in), **asdict(profile)}


def _print(console: Console, path: Path, profile: DeviceProfile, kept_in: Path | None) -> None:
    for pattern in dict.fromkeys(m.pattern for m in profile.measurements):
        console.print(_table(pattern, [m for m in profile.measurements if m.pattern == pattern]))
    console.print(f"device: {device_name(path)}", soft_wrap=True, highlight=False)
    for reason in profile.reasons:
        console.print(f"- {reason}", soft_wrap=True, highlight=False)
    if kept_in is not None:
        console.print(f"kept in {kept_in}", soft_wrap=True, highlight=False)


def _table(pattern: str, measurements: Sequence[Measurement]) -> Table:
    """A row for each backend and depth, a column for each block size: GiB/s, and processor seconds per GiB."""
    blocks = sorted({m.block_bytes for m in measurements})
    table = Table("backend", "depth", title=f"{pattern} reads: GiB/s (processor seconds per GiB)")
    for block in blocks:
        table.add_column(format_size(block).replace(".0", ""), justify="right")
    found = {(m.backend, m.depth, m.block_bytes): m for m in measurements}
    for backend, depth in dict.fromkeys((m.backend, m.depth) for m in sorted(measurements, key=_by_backend)):
        cells = (found.get((backend, depth, block)) for block in blocks)
        table.add_row(
            backend,
            "" if backend == "mmap" else str(depth),
            *(f"{m.bytes_per_second / 2**30:.2f} ({m.cpu_seconds_per_gib:.2f})" if m else "" for m in cells),
        )
    return table


def _by_backend(measurement: Measurement) -> tuple[int, int]:
    return [*BACKEND_NAMES].index(measurement.backend), measurement.depth  # type: ignore[arg-type]
