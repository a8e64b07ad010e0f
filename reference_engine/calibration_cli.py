"""The verbs calibrate and eval of the command `flashfmt`.

Answers go to stdout, progress and warnings to stderr. Errors are left to the command itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from flashfmt.errors import FlashWriteError
from reference_engine.sizes import format_size, parse_size
from reference_engine.step_progress import StepProgress, step_bars

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_SHARE = click.FloatRange(0, 1, min_open=True, max_open=True)


def _size(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    if value == "auto":
        return None
    try:
        return parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


def _rank(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither auto nor a number of at least 1", ctx, param)
    return int(value)


_MODEL = click.argument("model", type=click.Path(path_type=Path))
_TEXT = click.option(
    "--text",
    "texts",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    metavar="FILE",
    help="A UTF-8 text; may be given more than once.",
)
_MEMORY = click.option(
    "--memory",
    callback=_size,
    metavar="SIZE",
    default="auto",
    show_default=True,
    help="Ceiling on what running the model takes, such as 6GiB; auto: four fifths of what is free.",
)
_BACKEND = click.option("--backend", type=click.Choice(["auto", "numba", "numpy"]), default="auto", show_default=True)
_THREADS = click.option("--threads", "n_threads", type=click.IntRange(1), help="[default: all usable cores]")
_QUIET = click.option("--quiet", "-q", is_flag=True, help="Show no progress.")


@click.command(short_help="Add predictors and statistics to a model.")
@_MODEL
@_TEXT
@click.option("--output", type=click.Path(path_type=Path), help="[default: MODEL with -calibrated in its name]")
@click.option(
    "--target",
    default="recall=0.95",
    show_default=True,
    help="What predictors must reach: in each layer (recall=0.95), or all together, on other text with 95 % confidence "
    "(perplexity=1%).",
)
@click.option(
    "--kind",
    type=click.Choice(["auto", "low_rank", "low_bit_gate"]),
    default="auto",
    show_default=True,
    help="auto: low_rank where the activation gives exact zeros, else low_bit_gate.",
)
@click.option("--rank", callback=_rank, default="auto", show_default=True, help="Of low-rank predictors.")
@click.option(
    "--tokens", "n_tokens", type=click.IntRange(1), default=65536, show_default=True, help="Most tokens to use."
)
@click.option(
    "--held-out", type=_SHARE, default=0.2, show_default=True, help="Share of the text, its end, to measure on."
)
@click.option(
    "--active",
    "active_share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    help="Share of neurons to count as active, for low_bit_gate with a recall target.",
)
@click.option(
    "--tap",
    type=click.Choice(["ffn_input", "attention_input", "attention_output"]),
    default="ffn_input",
    show_default=True,
    help="Activation that predictors read.",
)
@click.option("--ahead", type=click.IntRange(0), default=0, show_default=True, help="Read it so many layers earlier.")
@click.option(
    "--encoding",
    type=click.Choice(["f16", "f32", "bf16"]),
    default="f16",
    show_default=True,
    help="Of low-rank matrices.",
)
@click.option(
    "--fit",
    type=click.Choice(["auto", "numpy", "torch"]),
    default="auto",
    show_default=True,
    help="Low-rank predictors with numpy or torch; auto: torch where it finds a GPU.",
)
@click.option("--epochs", type=click.IntRange(0), default=4, show_default=True, help="Most passes over the text.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@click.option("--keep-scratch", is_flag=True, help="Leave the recorded activations beside the output.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
@_MEMORY
@_BACKEND
@_THREADS
@_QUIET
def calibrate(model: Path, texts: tuple[Path, ...], output: Path | None, as_json: bool, **options: Any) -> None:
    """Run MODEL over text and write a copy with predictors, statistics and what they are worth on held-out text.

    The last part of the text is never fitted to. An interrupted calibration is continued by the same command.
    """  # fmt: skip
    from flashfmt.encodings import Encoding
    from reference_engine.calibration import CalibrationOptions, Target
    from reference_engine.calibration import calibrate as perform
    from reference_engine.engine import EngineOptions

    try:
        target = Target.parse(options.pop("target"))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--target") from None
    output = output or model.with_name(f"{model.stem}-calibrated{model.suffix}")
    engine = EngineOptions(
        memory=options.pop("memory"), backend=options.pop("backend"), n_threads=options.pop("n_threads")
    )
    overwrite, keep, quiet = options.pop("overwrite"), options.pop("keep_scratch"), options.pop("quiet")
    settings = CalibrationOptions(target=target, encoding=Encoding(options.pop("encoding")), **options)
    with _resumable(output), _progress(quiet=quiet) as progress:
        report = perform(
            model,
            texts,
            output,
            options=settings,
            engine=engine,
            overwrite=overwrite,
            keep_scratch=keep,
            progress=progress,
        )
    if not report.target_met:
        surely = "reached on" if target.metric == "recall" else "sure to be kept, going by the"
        click.echo(f"warning: {target} is not {surely} validation text; this is the closest", err=True)
    elif target.metric == "perplexity" and report.perplexity_cost > target.value:
        click.echo(f"warning: {target} is kept on validation text, but not on the held-out one; ask for less", err=True)
    if as_json:
        click.echo(json.dumps(report.as_dict()))
        return
    kinds = sorted({f"{p.kind} {p.rank or ''}".strip() for p in report.predictors})
    click.echo(f"{report.target}: predictors {', '.join(kinds)}, {format_size(report.predictor_nbytes)}")
    measured = [p.measured for p in report.predictors if p.measured is not None]
    for name in ("recall", "precision", "predicted_fraction"):
        values = [getattr(m, name) for m in measured]
        mean = sum(values) / len(values)
        click.echo(f"  {name.replace('_', ' '):<19}{mean:.3f}  ({min(values):.3f} to {max(values):.3f} by layer)")
    click.echo(
        f"  perplexity         {report.perplexity:.4g}, {report.predicted_perplexity:.4g} with predictors "
        f"({100 * report.perplexity_cost:+.2f} %), on {report.n_held_out_tokens} held-out tokens"
    )


@click.command(name="eval", short_help="Say what leaving out neurons costs.")
@_MODEL
@_TEXT
@click.option(
    "--selectors",
    help="Names separated by commas: dense, exact, file, file:sweep, oracle, threshold, lowbit:q4; with a cut as in "
    "threshold:0.1, or with the share to keep as in lowbit:q4:40%. [default: what is worth comparing in MODEL]",
)
@click.option("--window", type=click.IntRange(2), help="Tokens of a window. [default: the context, at most 1024]")
@click.option("--stride", type=click.IntRange(1), help="Tokens from one window to the next. [default: half a window]")
@click.option(
    "--tokens", "n_tokens", type=click.IntRange(2), default=8192, show_default=True, help="Most tokens to run."
)
@click.option("--held-out", "last_share", type=_SHARE, help="Run only this share of the text, its end.")
@click.option(
    "--simulate",
    "simulated_tokens",
    type=click.IntRange(0),
    default=1024,
    show_default=True,
    help="Tokens to simulate neuron windows on; 0 for none.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write all figures there; - for stdout.",
)
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), metavar="FILE", help="Draw to a .png or .svg.")
@click.option(
    "--residents",
    type=click.Choice(["stored", "q8", "q4"]),
    default="stored",
    show_default=True,
    help="Encoding to hold attention and the other resident matrices in.",
)
@_MEMORY
@_BACKEND
@_THREADS
@_QUIET
def evaluate(
    model: Path,
    texts: tuple[Path, ...],
    selectors: str | None,
    json_path: Path | None,
    plot_path: Path | None,
    **options: Any,
) -> None:
    """Measure perplexity on text with all neurons of MODEL, and with those that selectors choose."""
    from reference_engine.engine import EngineOptions
    from reference_engine.evaluation import EvaluationOptions
    from reference_engine.evaluation import evaluate as perform
    from reference_engine.evaluation.plot import SUFFIXES, plot, require_matplotlib
    from reference_engine.evaluation.points import check_names
    from reference_engine.evaluation.tables import tables

    if plot_path is not None:
        if plot_path.suffix not in SUFFIXES:
            raise click.BadParameter(f"{plot_path.name!r} ends neither in .png nor in .svg", param_hint="--plot")
        require_matplotlib()
    names = tuple(name.strip() for name in selectors.split(",")) if selectors is not None else ()
    try:
        check_names(names)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--selectors") from None
    window, stride = options["window"], options["stride"]
    if window is not None and stride is not None and stride > window:
        raise click.BadParameter(f"{stride} tokens skip over text between windows of {window}", param_hint="--stride")
    names_of_engine = ("memory", "backend", "n_threads", "residents")
    engine = EngineOptions(**{name: options.pop(name) for name in names_of_engine})
    with _progress(quiet=options.pop("quiet")) as progress:
        settings = EvaluationOptions(selectors=names, **options)
        evaluation = perform(model, texts, options=settings, engine=engine, progress=progress)
    document = json.dumps(evaluation.as_dict(), indent=2)
    if json_path == Path("-"):
        click.echo(document)
    else:
        console = Console(highlight=False, soft_wrap=True)
        for part in tables(evaluation):
            console.print(part)
        if json_path is not None:
            _write(json_path, document + "\n")
    if plot_path is not None:
        plot(evaluation, plot_path)


@contextmanager
def _resumable(output: Path) -> Iterator[None]:
    """Say what an interruption leaves."""
    try:
        yield
    except KeyboardInterrupt:
        kept = output.with_name(output.name + ".calibration")
        click.echo(f"\ninterrupted: {kept} is kept, and the same command continues it", err=True)
        raise


@contextmanager
def _progress(*, quiet: bool) -> Iterator[StepProgress]:
    """One bar a step on a terminal, nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield lambda *_: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with step_bars(*columns, keep_full=True) as report:
        yield report


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise FlashWriteError(f"cannot be written: {error.strerror or error}", path=path) from error
