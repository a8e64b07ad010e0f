"""The verb bench of the command `flashfmt`: how fast a model runs under a ceiling, and what each idea brings.

The answer goes to stdout, progress and what is written where to stderr. Errors are left to the command itself.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource
from rich.console import Console

from flashfmt.encodings import Encoding
from flashfmt.errors import MissingExtraError
from reference_engine.bench.ablation import ROW_NAMES, RowName
from reference_engine.bench.output import document, write_plots, write_results
from reference_engine.bench.perform import Ceiling, Request, perform
from reference_engine.bench.progress import shown
from reference_engine.bench.results import Report
from reference_engine.bench.synthetic_files import SyntheticFiles
from reference_engine.bench.tables import tables
from reference_engine.cli import ENGINE_OPTIONS, engine_options
from reference_engine.flash_io.device_profile import cache_directory
from reference_engine.sizes import parse_size
from reference_engine.synthetic import SHAPES, Shape

_WEIGHTS: Final = ("f32", "f16", "bf16", "q8", "q4")
_FLOOR_SECONDS: Final = 0.25  # for each way to read the device
_WIDTH: Final = 180  # of the tables where there is no terminal


def _ceiling(ctx: click.Context, param: click.Parameter, value: str | None) -> Ceiling | None:
    """Bytes of a size, or a share of the model."""
    if value is None or value == "auto":
        return None if value is None else Ceiling()
    try:
        if not value.endswith("%"):
            return Ceiling(parse_size(value))
        share = float(value.removesuffix("%")) / 100
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None
    if not 0 < share < float("inf"):
        raise click.BadParameter(f"{value!r} is no share of a model, such as 50%", ctx, param)
    return Ceiling(share=share)


def _shape(ctx: click.Context, param: click.Parameter, value: str | None) -> Shape | None:
    if value is not None and value not in SHAPES:
        raise click.BadParameter(f"{value!r} is none of {', '.join(SHAPES)}", ctx, param)
    return None if value is None else SHAPES[value]


def _rows(ctx: click.Context, param: click.Parameter, value: str | None) -> list[RowName]:
    """Rows in their order, whatever the order they are named in."""
    asked = ROW_NAMES if value is None else [name.strip() for name in value.split(",")]
    for name in asked:
        if name not in ROW_NAMES:
            raise click.BadParameter(f"{name!r} is no row: {', '.join(ROW_NAMES)}", ctx, param)
    return [name for name in ROW_NAMES if name in asked]


@click.command(short_help="Measure how fast a model runs.")
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option(
    "--like",
    "shape",
    callback=_shape,
    metavar="NAME",
    help=f"Instead of MODEL: random weights in the shapes of a real one: {', '.join(SHAPES)}.",
)
@click.option(
    "--memory",
    "ceiling",
    callback=_ceiling,
    metavar="SIZE",
    help="Ceiling on everything the process holds: 6GiB, or a share of the model's bytes such as 50%, or auto: four "
    "fifths of what is free. [default: auto; 50% with --ablation]",
)
@click.option(
    "--ablation",
    is_flag=True,
    help="Run the rows of the paper's table 2 and what goes beyond, from reading the whole model for every token on.",
)
@click.option("--rows", callback=_rows, metavar="NAMES", help=f"With --ablation: some of {','.join(ROW_NAMES)}.")
@click.option("--compare", is_flag=True, help="Measure what this machine allows in the same run, and compare.")
@click.option("--text", type=click.Path(path_type=Path), metavar="FILE", help="Take the prompt from a UTF-8 text.")
@click.option("--prompt-tokens", type=click.IntRange(1), help="[default: 128; 1 with --ablation]")
@click.option(
    "--tokens", "n_tokens", type=click.IntRange(2), default=32, show_default=True, help="To measure in a sequence."
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    help="End a sequence after so long, with at least two tokens. [default: 60; 10 with --ablation]",
)
@click.option("--repeats", type=click.IntRange(1), default=1, show_default=True, help="Sequences, one after the other.")
@click.option("--exact", is_flag=True, help="With --like: compute all neurons; no synthetic activity.")
@click.option("--encoding", type=click.Choice(_WEIGHTS), default="f16", show_default=True, help="With --like: bundles.")
@click.option(
    "--residents",
    type=click.Choice(["auto", "stored", *_WEIGHTS]),
    help="With --like: encoding of the file's other matrices, f16 by default. With MODEL: what to hold them in; auto, "
    "stored (the default), q8 or q4.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="With --like: where synthetic models are kept. [default: flashfmt/bench in the user's cache]",
)
@click.option(
    "--keep/--no-keep", default=True, show_default=True, help="With --like: keep models that it had to write."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of random tokens and activity.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Also write results.json and tables.txt there, and pictures where matplotlib is installed (extra: plots).",
)
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
@ENGINE_OPTIONS
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    model: Path | None,
    *,
    shape: Shape | None,
    keep: bool,
    cache: Path | None,
    residents: str | None,
    as_json: bool,
    output: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure how fast MODEL, or random weights in the shapes of a real one (--like), run under a memory ceiling.

    Says how long a token takes, what it reads from flash, and where its time goes. With --like, the neurons that a
    token uses are drawn to have the statistics that the paper gives for OPT-6.7B, unless --selector or --exact say
    otherwise, or the activation is not sparse. The context is as long as prompt and tokens need, unless --context says
    otherwise.
    """
    _refuse(ctx, model, shape)
    encoding = Encoding(options.pop("encoding"))
    request = _request(ctx, shape, options | {"residents": "stored" if shape else residents or "stored"})
    with ExitStack() as stack:
        progress = stack.enter_context(shown(quiet=quiet))
        if shape is not None:
            files = SyntheticFiles(
                shape,
                cache or cache_directory() / "flashfmt" / "bench",
                residents=Encoding(residents or "f16"),
                keep=keep,
                say=lambda line: click.echo(line, err=True),
                report=progress,
            )
            report = perform(request, stack.enter_context(files), encoding, progress)
        elif model is not None:
            report = perform(request, model, encoding, progress)
    if output is not None:
        _write(report, output)
    if as_json:
        click.echo(document(report))
    else:
        _print(report)


def _refuse(ctx: click.Context, model: Path | None, shape: Shape | None) -> None:
    """Refuse combinations of options that mean nothing."""
    options = ctx.params
    if (model is None) == (shape is None):
        raise click.UsageError("give either MODEL or --like")
    if model is not None:
        for name in ("exact", "encoding", "cache", "keep"):
            if _is_given(ctx, name):
                raise click.UsageError(f"--{name} goes with --like")
    wanted = _WEIGHTS if model is None else ("auto", "stored", "q8", "q4")
    if options["residents"] not in (None, *wanted):
        place = "--like" if model is None else "MODEL"
        raise click.UsageError(f"--residents {options['residents']} does not go with {place}: {', '.join(wanted)}")
    if _is_given(ctx, "rows") and not options["ablation"]:
        raise click.UsageError("--rows goes with --ablation")
    if options["exact"] and (options["ablation"] or options["selector"] is not None):
        raise click.UsageError("--exact computes all neurons: it goes neither with --ablation nor with --selector")
    if options["device"] != "cpu" and (options["ablation"] or options["compare"]):
        raise click.UsageError("--ablation and --compare are for the CPU")


def _request(ctx: click.Context, shape: Shape | None, options: dict[str, Any]) -> Request:
    """The request that the options speak of; takes out what is not the engine's."""
    ablation, exact, rows = options.pop("ablation"), options.pop("exact"), options.pop("rows")
    if ablation and not _is_given(ctx, "verify"):
        options["verify"] = "never"  # the paper has no checksums, and a few tokens would be all first reads
    is_sparse = shape is not None and (shape.is_sparse or ablation)
    prompt_tokens, seconds, ceiling = (options.pop(name) for name in ("prompt_tokens", "seconds", "ceiling"))
    n_tokens, n_sequences, text = (options.pop(name) for name in ("n_tokens", "repeats", "text"))
    with_floor, seed, window = options.pop("compare"), options.pop("seed"), options["window"]
    engine = engine_options({**options, "memory": None})
    return Request(
        options=engine,
        ceiling=ceiling or Ceiling(share=0.5 if ablation else None),
        window=window,
        prompt_tokens=prompt_tokens or (1 if ablation else 128),
        n_tokens=n_tokens,
        seconds=seconds or (10.0 if ablation else 60.0),
        n_sequences=n_sequences,
        text=text,
        rows=rows if ablation else None,
        with_activity=is_sparse and engine.sparse is None and not exact,
        floor_seconds=_FLOOR_SECONDS if with_floor else None,
        seed=seed,
    )


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) not in (None, ParameterSource.DEFAULT)


def _write(report: Report, folder: Path) -> None:
    write_results(report, folder)
    try:
        write_plots(report, folder)
    except MissingExtraError as error:
        click.echo(f"no pictures: {error}", err=True)


def _print(report: Report) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    for part in tables(report):
        console.print(part)
