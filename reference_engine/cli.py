"""The engine's verbs of the command `flashfmt`: plan, run, chat.

Text goes to stdout as it comes; the plan, progress and statistics go to stderr. Errors are left to the command itself.
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
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from flashfmt import FlashModel
from flashfmt.errors import FlashError, PromptError
from reference_engine.backends import is_compiled
from reference_engine.chat_template import ChatTemplate, load_chat_template
from reference_engine.engine import Engine, EngineOptions, Session
from reference_engine.generate import Generation, generate
from reference_engine.neuron_window import parse_window
from reference_engine.plan import MemoryPlan
from reference_engine.sampler import SamplingOptions
from reference_engine.selectors import parse_selector
from reference_engine.sizes import format_size, parse_size
from reference_engine.sparse_mode import SparseOptions
from reference_engine.sparse_plan import SparsePlan
from reference_engine.sparse_view import print_layers, watching
from reference_engine.tokenizer import Tokenizer, load_tokenizer

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
Message = dict[str, str]


def _size(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    """Bytes of a size, or None for ``auto``."""
    if value == "auto":
        return None
    try:
        return parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


def _parsed(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """Callback that understands the value of an option by `parse`, which raises ValueError."""

    def understand(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        try:
            return None if value is None else parse(value)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from None

    return understand


def _grouped(*options: Decorator) -> Decorator:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


# All but the ceiling, which not every verb takes in the same way.
ENGINE_OPTIONS = _grouped(
    click.option(
        "--context",
        "context_tokens",
        type=click.IntRange(1),
        help="Tokens of context to make room for. [default: the model's own, at most 2048]",
    ),
    click.option("--kv", "kv_type", type=click.Choice(["f32", "f16"]), default="f32", show_default=True,
                 help="Type of the KV cache."),
    click.option("--backend", type=click.Choice(["auto", "numba", "numpy"]), default="auto", show_default=True),
    click.option("--threads", "n_threads", type=click.IntRange(1), help="[default: all usable cores]"),
    click.option(
        "--verify",
        type=click.Choice(["never", "first", "always"]),
        default="first",
        show_default=True,
        help="When to check the checksums of what is read.",
    ),
    click.option(
        "--selector",
        callback=_parsed(parse_selector),
        metavar="SELECTOR",
        help="Compute only the neurons that this names: file, threshold:T, lowbit:q4, oracle, all, trace:FILE; "
        "@previous or @attention_input at the end looks ahead. The output is then an approximation. [default: all "
        "neurons, exactly]",
    ),
    click.option(
        "--prefetch",
        callback=_parsed(parse_selector),
        metavar="SELECTOR",
        help="Read ahead what this names, beside the selector that decides; such as lowbit:q4@previous.",
    ),
    click.option(
        "--window",
        callback=_parsed(parse_window),
        metavar="RULE",
        default="frequency",
        show_default=True,
        help="Which bundles stay in memory with --selector: frequency:H (half-life of H tokens, 64), lru, or paper:K.",
    ),
    click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True),
    click.option(
        "--vram",
        callback=_size,
        metavar="SIZE",
        default="auto",
        show_default=True,
        help="With --device cuda: ceiling on everything the process holds there; auto: most of what is free.",
    ),
    click.option(
        "--host-memory",
        callback=_size,
        metavar="SIZE",
        default="0",
        show_default=True,
        help="With --device cuda and --selector: page-locked memory for bundles that left the device.",
    ),
)  # fmt: skip

_ENGINE_OPTIONS = _grouped(
    click.option(
        "--memory",
        callback=_size,
        metavar="SIZE",
        default="auto",
        show_default=True,
        help="Ceiling on everything the process holds, such as 6GiB; auto: four fifths of what is free.",
    ),
    click.option(
        "--residents",
        type=click.Choice(["auto", "stored", "q8", "q4"]),
        default="auto",
        show_default=True,
        help="Encoding to hold attention and the other resident matrices in; auto: as stored, but narrower with "
        "--selector where the ceiling has no room for the neuron window otherwise.",
    ),
    ENGINE_OPTIONS,
)

_TEXT_OPTIONS = _grouped(
    click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True),
    click.option("--temperature", type=float, default=0.8, show_default=True, help="0 takes the likeliest token."),
    click.option("--top-k", type=int, default=40, show_default=True),
    click.option("--top-p", type=float, default=0.95, show_default=True),
    click.option("--min-p", type=float, default=0.05, show_default=True),
    click.option("--repeat-penalty", type=float, default=1.0, show_default=True),
    click.option("--repeat-last-n", type=int, default=64, show_default=True),
    click.option("--seed", type=click.IntRange(0), help="Makes the text repeatable."),
    click.option("--stop", multiple=True, help="End the text before this string; may be given more than once."),
    click.option("--system", help="System message of the conversation."),
    click.option("--quiet", "-q", is_flag=True, help="Write the text alone."),
)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@_ENGINE_OPTIONS
@click.option("--json", "as_json", is_flag=True, help="Write the plan as JSON.")
def plan(model: Path, as_json: bool, **options: Any) -> None:
    """Say what of MODEL would be held where under a memory ceiling. Loads nothing."""
    with _engine(model, options, _tokenizer_if_any) as engine:
        if as_json:
            click.echo(json.dumps(_plan_dict(engine)))
        else:
            _print_plan(Console(), engine)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--chat", "as_chat", is_flag=True, help="Ask the prompt as a user's message, by the chat template.")
@click.option("--tokens", help="Prompt as token ids, separated by commas, for a file without a tokenizer.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the end of the text.")
@click.option("--json", "as_json", is_flag=True, help="Write text and statistics as one JSON object.")
@click.option("--stats", "with_layers", is_flag=True, help="With --selector: figures of each layer, on stderr.")
@click.option("--live", is_flag=True, help="With --selector: show on stderr what the layers do while they do it.")
@click.option(
    "--trace",
    "trace",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --selector: record active neurons and figures of each token in a file, as JSON lines.",
)
@_TEXT_OPTIONS
@_ENGINE_OPTIONS
def run(
    model: Path,
    prompt: str | None,
    *,
    tokens: str | None,
    as_chat: bool,
    as_json: bool,
    with_layers: bool,
    live: bool,
    trace: Path | None,
    **options: Any,
) -> None:
    """Continue PROMPT (or standard input, with -) with MODEL, and say on stderr what it cost."""
    if options["selector"] is None and (with_layers or live or trace is not None):
        raise click.UsageError("--stats, --live and --trace show what --selector does")
    text = _TextSettings(options)
    token_ids = _parse_tokens(tokens)
    if (prompt is None) == (token_ids is None):
        raise click.UsageError("give either PROMPT or --tokens")
    if prompt == "-":
        prompt = sys.stdin.read()
    speech = _Speech(text, needs_tokenizer=prompt is not None, as_chat=as_chat)
    with _engine(model, options, speech.load) as engine:
        ids = token_ids if prompt is None else speech.first_prompt(prompt)
        _load(engine, quiet=text.quiet or as_json)
        generation = text.generate(engine, speech.tokenizer, ids or [])
        with watching(engine, trace=trace, live=live):
            for piece in generation:
                if not as_json:
                    sys.stdout.write(_shown(piece.token_id, piece.text, speech.tokenizer))
                    sys.stdout.flush()
        if as_json:
            click.echo(json.dumps(_report(engine, generation)))
            return
        click.echo()
        if not text.quiet:
            _print_statistics(generation)
        if with_layers:
            print_layers(Console(stderr=True), engine)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@_TEXT_OPTIONS
@_ENGINE_OPTIONS
def chat(model: Path, **options: Any) -> None:
    """Talk with MODEL. An empty line or the end of the input leaves."""
    text = _TextSettings(options)
    speech = _Speech(text, needs_tokenizer=True, as_chat=True)
    with _engine(model, options, speech.load) as engine:
        _load(engine, quiet=text.quiet)
        conversation = _Conversation(engine, speech)
        while (message := _ask(quiet=text.quiet)) is not None:
            generation = conversation.answer(message)
            for piece in generation:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
            click.echo()
            conversation.remember(generation)
            if not text.quiet:
                statistics = generation.statistics
                click.echo(
                    f"[{statistics.generated_tokens} tokens, {statistics.tokens_per_second:.1f} tokens/s, "
                    f"{conversation.n_tokens} of {engine.context_tokens} tokens of context]",
                    err=True,
                )


class _TextSettings:
    """The options of text generation, taken out of a command's options."""

    def __init__(self, options: dict[str, Any]) -> None:
        names = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n", "seed")
        self.sampling = SamplingOptions(**{name: options.pop(name) for name in names})
        self.max_tokens: int = options.pop("max_tokens")
        self.stop: tuple[str, ...] = options.pop("stop")
        self.system: str | None = options.pop("system")
        self.quiet: bool = options.pop("quiet")
        self.ignore_eos: bool = options.pop("ignore_eos", False)

    def generate(
        self, engine: Engine, tokenizer: Tokenizer | None, ids: list[int], session: Session | None = None
    ) -> Generation:
        """A generation by these settings."""
        return generate(
            engine,
            tokenizer,
            ids,
            sampling=self.sampling,
            max_tokens=self.max_tokens,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            tokens=engine.model.manifest.tokens,
            session=session,
        )


class _Speech:
    """Tokenizer and chat template, loaded between opening a model and planning its memory."""

    def __init__(self, text: _TextSettings, *, needs_tokenizer: bool, as_chat: bool) -> None:
        self.text = text
        self.tokenizer: Tokenizer | None = None
        self._needs_tokenizer = needs_tokenizer
        self._as_chat = as_chat
        self._template: ChatTemplate | None = None

    def load(self, model: FlashModel) -> None:
        """Load what the command needs."""
        self.tokenizer = load_tokenizer(model) if self._needs_tokenizer else _tokenizer_if_any(model)
        if self._as_chat and self.tokenizer is not None:
            self._template = load_chat_template(model, self.tokenizer)

    def first_prompt(self, prompt: str) -> list[int]:
        """Token ids of a prompt, rendered as a user's message in chat."""
        if self._as_chat:
            return self.conversation([{"role": "user", "content": prompt}])
        return self._encode(prompt, add_special_tokens=True)

    def conversation(self, messages: list[Message]) -> list[int]:
        """Token ids of a conversation that the model is to go on with."""
        if self._template is None:
            raise PromptError("the chat template is not loaded")
        if self.text.system is not None:
            messages = [{"role": "system", "content": self.text.system}, *messages]
        return self._encode(self._template.render(messages), add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self.tokenizer is None:
            raise PromptError("the tokenizer is not loaded")
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)


class _Conversation:
    """Messages so far, and a session that keeps the tokens that they share with the next prompt."""

    def __init__(self, engine: Engine, speech: _Speech) -> None:
        self._engine = engine
        self._speech = speech
        self._messages: list[Message] = []
        self._session = engine.start()
        self._fed: list[int] = []

    @property
    def n_tokens(self) -> int:
        """Tokens of the context in use."""
        return self._session.n_tokens

    def answer(self, message: str) -> Generation:
        """Generation of the answer to a user's message."""
        self._messages.append({"role": "user", "content": message})
        ids = self._speech.conversation(self._messages)
        shared = 0
        while shared < min(len(self._fed), len(ids) - 1) and self._fed[shared] == ids[shared]:
            shared += 1
        self._session.truncate(shared)
        self._fed = ids
        return self._speech.text.generate(self._engine, self._speech.tokenizer, ids[shared:], self._session)

    def remember(self, generation: Generation) -> None:
        """Take the finished answer into the conversation."""
        self._messages.append({"role": "assistant", "content": generation.text})
        self._fed = [*self._fed, *generation.token_ids][: self._session.n_tokens]


def _tokenizer_if_any(model: FlashModel) -> Tokenizer | None:
    return load_tokenizer(model) if "tokenizer" in model.files else None


def _parse_tokens(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 1,15,7", param_hint="--tokens") from None


def _shown(token_id: int | None, text: str, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None and token_id is not None:
        return f"{token_id} "
    return text


def _ask(*, quiet: bool) -> str | None:
    """Next message, or None to leave."""
    try:
        line = click.prompt("", prompt_suffix="" if quiet else "> ", default="", show_default=False, err=True)
    except (click.Abort, EOFError):
        return None
    return str(line) or None


def _engine(model: Path, options: dict[str, Any], loaded_before_plan: Callable[[FlashModel], object]) -> Engine:
    return Engine(model, engine_options(options), loaded_before_plan=loaded_before_plan)


def engine_options(options: dict[str, Any]) -> EngineOptions:
    """What `ENGINE_OPTIONS` and a ``memory`` in bytes say; announces a compilation that is due."""
    if options["device"] == "cpu" and not is_compiled(options["backend"]):
        click.echo("compiling kernels for this processor; this happens once and takes about a minute", err=True)
    selector, prefetch, window = (options.pop(name) for name in ("selector", "prefetch", "window"))
    if selector is None and prefetch is not None:
        raise click.UsageError("--prefetch reads ahead for a --selector")
    sparse = None if selector is None else SparseOptions(selector, prefetch, window)
    return EngineOptions(**options, sparse=sparse)


def _load(engine: Engine, *, quiet: bool) -> None:
    if quiet:
        engine.load()
        return
    _print_plan(Console(stderr=True), engine)
    with _progress("loading", engine.load_nbytes) as advance:
        engine.load(advance)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


def _plan_dict(engine: Engine) -> dict[str, Any]:
    way = engine.device_way
    return engine.plan.as_dict() | ({} if way is None else {"way_to_device": way.as_dict()})


def _print_plan(console: Console, engine: Engine) -> None:
    plan = engine.plan
    table = Table(title=f"memory plan for a ceiling of {format_size(plan.ceiling)}", title_justify="left")
    table.add_column("what")
    table.add_column("bytes", justify="right")
    for what, nbytes in plan.rows():
        table.add_row(what, format_size(nbytes))
    table.add_section()
    table.add_row("planned", format_size(plan.planned))
    table.add_row("smallest ceiling that works", format_size(plan.floor))
    read = plan.streamed if isinstance(plan, MemoryPlan) else plan.expected_read
    table.add_row("read from flash for each token", "as the text needs" if read is None else format_size(read))
    notes = []
    if isinstance(plan, SparsePlan):
        notes.append("what the selector leaves out counts as zero: the output is an approximation")
    if plan.fixed.resident_encoding is not None:
        held_in = plan.fixed.resident_encoding
        notes.append(f"resident matrices are held in {held_in}, unless --residents stored is given")
    if plan.floor > plan.planned:
        notes.append(f"loading the kernels takes {format_size(plan.fixed.at_start)} for a moment")
    if notes:
        table.caption = "; ".join(notes)
    console.print(table)
    if engine.device_way is not None:
        console.print(f"bundles to the device: {engine.device_way.name} ({engine.device_way.reason})", highlight=False)


def _print_statistics(generation: Generation) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for label, value in (*generation.statistics.rows(), ("ended by", str(generation.finish_reason))):
        table.add_row(label, value)
    Console(stderr=True).print(table)


def _report(engine: Engine, generation: Generation) -> dict[str, Any]:
    if generation.finish_reason is None:
        raise FlashError("the generation did not finish")
    return {
        "text": generation.text,
        "token_ids": generation.token_ids,
        "finish_reason": generation.finish_reason,
        "statistics": generation.statistics.as_dict(),
        "plan": _plan_dict(engine),
        **({} if engine.sparse is None else {"sparse": engine.sparse.totals.as_dict()}),
    }
