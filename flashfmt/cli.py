"""The command `flashfmt`: convert, inspect, verify, diff, pack, unpack, conformance; entry points add further verbs.

Answers go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 failed or different, 2 wrong usage,
3 damaged or malformed file, 4 unsupported version, 130 interrupted.

Knows: options and messages. Does not know: how anything is done; each verb imports what it needs.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from flashfmt import __version__
from flashfmt.errors import EXIT_FAILURE, EXIT_OK, FlashError
from flashfmt.progress import byte_progress, format_bytes

if TYPE_CHECKING:
    from flashfmt.diff import Difference

PLUGIN_GROUP: Final = "flashfmt.commands"
EXIT_INTERRUPTED: Final = 130
_ENCODINGS: Final = ("auto", "f16", "bf16", "f32", "q8", "q4")

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
_model = click.Path(path_type=Path)
_json: _Decorator = click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
_quiet: _Decorator = click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
_overwrite: _Decorator = click.option("--overwrite", is_flag=True, help="Replace TARGET if it exists.")


class _Commands(click.Group):
    """The verbs here, and those that other packages add; a verb that cannot be loaded says so when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_plugins()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        plugin = _plugins().get(cmd_name)
        return own if own is not None or plugin is None else _load(plugin)


def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=PLUGIN_GROUP)}


def _load(plugin: EntryPoint) -> click.Command:
    try:
        command = plugin.load()
    except Exception as error:  # noqa: BLE001 - whatever is wrong with another package
        return _broken(plugin, f"{type(error).__name__}: {error}")
    if not isinstance(command, click.Command):
        return _broken(plugin, f"{plugin.value} is not a command")
    return command


def _broken(plugin: EntryPoint, reason: str) -> click.Command:
    """A command that says why it is not there."""

    def fail(**_: object) -> NoReturn:
        package = plugin.dist.name if plugin.dist is not None else plugin.value
        raise FlashError(f"the command {plugin.name!r} of {package} cannot be loaded: {reason}")

    anything = {"ignore_unknown_options": True, "allow_extra_args": True}
    return click.Command(
        plugin.name, context_settings=anything, callback=fail, add_help_option=False, short_help="(cannot be loaded)"
    )


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="flashfmt")
def cli() -> None:
    """Make, look at and check flash models: language models laid out to be run from flash."""


@cli.command(short_help="Make a flash model from a checkpoint.")
@click.argument("source")
@click.argument("target", type=_model)
@click.option(
    "--encoding",
    type=click.Choice(_ENCODINGS),
    default="auto",
    show_default=True,
    help="Of the FFN weights; auto keeps the source's.",
)
@click.option(
    "--residents",
    type=click.Choice(_ENCODINGS),
    default="auto",
    show_default=True,
    help="Of the other matrices; auto keeps the source's.",
)
@click.option(
    "--container",
    type=click.Choice(["file", "directory"]),
    help="[default: file if TARGET ends in .flash, else directory]",
)
@click.option("--name", help="The model's name. [default: the source's]")
@_overwrite
@_json
@_quiet
def convert(source: str, target: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Convert SOURCE, a Hugging Face checkpoint directory, a GGUF file or a hub id, into the flash model TARGET."""
    from flashfmt.convert import convert as perform

    with _resumable(target), byte_progress("converting", None, quiet=quiet) as shown:
        report = perform(source, target, progress=shown.update, **options)
    if as_json:
        _echo_json({**asdict(report), "target": str(report.target)})
        return
    rate = format_bytes(report.nbytes / max(report.seconds, 1e-9))
    click.echo(
        f"{report.target}: {report.n_parameters / 1e6:,.1f} M parameters, {format_bytes(report.nbytes)} "
        f"in {report.seconds:.1f} s ({rate}/s){', continued' if report.resumed else ''}"
    )
    residents = ", ".join(report.resident_encodings)
    click.echo(f"{report.architecture}: bundles {report.bundle_encoding}, residents {residents}")
    click.echo(f"files: {', '.join(report.files) or 'none'}")


@cli.command(short_help="Show what a model is and holds.")
@click.argument("path", type=_model)
@_json
@click.option("--arrays", "all_arrays", is_flag=True, help="Show every layer, also where they are alike.")
@click.option("--layer", type=click.IntRange(0), help="Show this layer alone.")
def inspect(path: Path, as_json: bool, all_arrays: bool, layer: int | None) -> None:
    """Show what the model PATH is and what it holds."""
    from flashfmt.inspection import as_json as everything
    from flashfmt.reader import open_model

    with open_model(path) as model:
        if layer is not None and layer >= len(model.layers):
            raise click.BadParameter(f"the model has layers 0 to {len(model.layers) - 1}", param_hint="--layer")
        if as_json:
            _echo_json(everything(model))
            return
        from rich.console import Console

        from flashfmt.inspect_view import view

        console = Console(highlight=False, soft_wrap=True)
        console.print(view(model, all_arrays=all_arrays, layer=layer))


@cli.command(short_help="Check every byte of a model.")
@click.argument("path", type=_model)
@_json
@_quiet
def verify(path: Path, as_json: bool, quiet: bool) -> None:
    """Read all of the model PATH and compare every byte with its checksums and rules."""
    from flashfmt.reader import open_model

    started = time.monotonic()
    with open_model(path) as model, byte_progress("verifying", model.verify_nbytes, quiet=quiet) as shown:
        model.verify(shown.advance)
        nbytes = model.verify_nbytes
    seconds = time.monotonic() - started
    if as_json:
        _echo_json({"path": str(path), "ok": True, "nbytes": nbytes, "seconds": seconds})
    else:
        rate = format_bytes(nbytes / max(seconds, 1e-9))
        click.echo(f"{path}: ok, {format_bytes(nbytes)} in {seconds:.1f} s ({rate}/s)")


@cli.command(short_help="Say in what two models differ.")
@click.argument("first", type=_model)
@click.argument("second", type=_model)
@_json
@_quiet
@click.pass_context
def diff(ctx: click.Context, first: Path, second: Path, as_json: bool, quiet: bool) -> None:
    """Say in what the models FIRST and SECOND differ, however they are stored. Exits with 1 if they do."""
    from flashfmt.diff import compared_nbytes, differences
    from flashfmt.reader import open_model

    with ExitStack() as stack:
        a, b = (stack.enter_context(open_model(path)) for path in (first, second))
        shown = stack.enter_context(byte_progress("comparing", compared_nbytes(a, b), quiet=quiet))
        found = list(differences(a, b, shown.advance))
    if as_json:
        _echo_json({"equal": not found, "differences": [_finite(asdict(difference)) for difference in found]})
    else:
        for difference in found:
            click.echo(_describe(difference))
        click.echo(f"{len(found)} differences" if found else "the models are equal")
    ctx.exit(EXIT_FAILURE if found else EXIT_OK)


@cli.command(short_help="Copy a model into one file.")
@click.argument("source", type=_model)
@click.argument("target", type=_model)
@_overwrite
@_quiet
def pack(source: Path, target: Path, overwrite: bool, quiet: bool) -> None:
    """Copy the model SOURCE, such as a directory, into the single file TARGET."""
    from flashfmt.pack import pack as perform

    _copy(perform, source, target, overwrite, quiet)


@cli.command(short_help="Copy a model into a directory.")
@click.argument("source", type=_model)
@click.argument("target", type=_model)
@_overwrite
@_quiet
def unpack(source: Path, target: Path, overwrite: bool, quiet: bool) -> None:
    """Copy the model SOURCE, such as a .flash file, into the directory TARGET."""
    from flashfmt.pack import unpack as perform

    _copy(perform, source, target, overwrite, quiet)


@cli.command(short_help="Run a reader against the conformance suite.")
@click.argument("command", nargs=-1, required=True)
@click.option("--only", multiple=True, metavar="PATTERN", help="Cases whose id, level or rule matches.")
@click.option("--jobs", type=click.IntRange(1), help="Readers at once. [default: one a processor]")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), help="Seconds a reader has for a case.")
@click.option("--suite", type=_model, help="Folder of the suite. [default: the checkout's]")
@_json
def conformance(
    command: tuple[str, ...],
    *,
    only: tuple[str, ...],
    jobs: int | None,
    timeout: float | None,
    suite: Path | None,
    as_json: bool,
) -> None:
    """Put the cases of the conformance suite to a reader in any language: `flashfmt conformance -- COMMAND ...`."""
    from flashfmt.conformance import run_suite

    options = [f"--only={pattern}" for pattern in only] + ["--json"] * as_json
    options += [f"--jobs={jobs}"] * (jobs is not None) + [f"--timeout={timeout}"] * (timeout is not None)
    click.get_current_context().exit(run_suite(command, options, suite))


def _copy(perform: Callable[..., None], source: Path, target: Path, overwrite: bool, quiet: bool) -> None:
    from flashfmt.reader import open_model

    with open_model(source) as model:
        total = model.verify_nbytes
    with _resumable(target), byte_progress("copying", total, quiet=quiet) as shown:
        perform(source, target, overwrite=overwrite, progress=shown.advance)
    click.echo(f"{target}: {format_bytes(total)}")


@contextmanager
def _resumable(target: Path) -> Iterator[None]:
    """Say what an interruption leaves."""
    try:
        yield
    except KeyboardInterrupt:
        partial = target.with_name(target.name + ".partial")
        click.echo(f"\ninterrupted: {partial} is kept, and the same command continues it", err=True)
        raise


def _describe(difference: Difference) -> str:
    """One line of text."""
    head = f"{difference.kind:<9}{difference.where}"
    if difference.kind in ("missing", "extra"):
        return f"{head}: only in the {'first' if difference.kind == 'missing' else 'second'} model"
    if difference.kind != "values":
        return f"{head}: {difference.first} -> {difference.second}"
    text = f"{head}: {difference.n_different} of {difference.n_values} differ"
    if difference.max_abs is not None and difference.relative is not None:
        text += f", by up to {difference.max_abs:.3g}; relative error {difference.relative:.3g}"
    return text


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """The same without infinities, which JSON has not."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _echo_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit; `arguments` are those of the process by default."""
    try:
        code = cli.main(arguments, prog_name="flashfmt", standalone_mode=False)
        sys.stdout.flush()
    except FlashError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        _close_stdout()
        code = EXIT_FAILURE
    sys.exit(code if isinstance(code, int) else EXIT_OK)


def _close_stdout() -> None:
    """Keep the interpreter from flushing into the broken pipe again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
