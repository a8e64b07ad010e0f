"""Sparse mode's figures for people, and for a file: the table of layers, the live view, the recorded trace.

Everything for people goes to the console that is handed in, or to stderr.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from reference_engine.activity_trace import TraceHeader, TraceWriter
from reference_engine.engine import Engine
from reference_engine.sizes import format_size
from reference_engine.telemetry import PassRecord

_BAR_WIDTH = 24
_UNLIMITED_WIDTH = 10_000


@contextmanager
def watching(engine: Engine, *, trace: Path | None, live: bool) -> Iterator[None]:
    """Record or show every pass of a loaded engine in sparse mode, until the context ends.

    Parameters
    ----------
    trace : file to record active neurons and figures in, or None.
    live : show a line for each layer on stderr.

    Raises
    ------
    FlashWriteError
        If the trace cannot be written.
    """
    with ExitStack() as stack:
        if engine.sparse is not None and trace is not None:
            decoder = engine.model.decoder
            header = TraceHeader(engine.model.manifest.name, decoder.n_layers, decoder.ffn.d_ff)
            writer = stack.enter_context(TraceWriter(trace, header))
            engine.sparse.watch(
                lambda record: writer.write(
                    record.n_tokens, [(step.active, step.figures.as_dict()) for step in record.layers]
                )
            )
        if engine.sparse is not None and live:
            view = stack.enter_context(Live(console=Console(stderr=True), refresh_per_second=8, transient=True))
            n_neurons = engine.model.decoder.ffn.d_ff
            engine.sparse.watch(lambda record: view.update(_live_table(record, n_neurons)))
        yield


def print_layers(console: Console, engine: Engine) -> None:
    """Figures of each layer, means of the tokens that were generated one by one; uncut where nobody has a width."""
    if engine.sparse is None:
        return
    totals = engine.sparse.decode_totals
    title = f"each layer, mean of {totals.n_passes} tokens; times in microseconds"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    for heading in totals.columns():
        table.add_column(heading, justify="right", no_wrap=True)
    for row in totals.rows(engine.model.decoder.ffn.d_ff):
        table.add_row(*row)
    if not console.is_terminal:
        console = Console(file=console.file, width=_UNLIMITED_WIDTH)
    console.print(table)


def _live_table(record: PassRecord, n_neurons: int) -> Table:
    table = Table(box=None, padding=(0, 1))
    for heading in ("layer", "active", "", "held", "missing", "read"):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for layer, step in enumerate(record.layers):
        f = step.figures
        held = round(_BAR_WIDTH * f.n_hits / n_neurons)
        read = round(_BAR_WIDTH * f.n_active / n_neurons) - held
        bar = f"[green]{'█' * held}[/][red]{'█' * read}[/][dim]{'·' * (_BAR_WIDTH - held - read)}[/]"
        table.add_row(str(layer), str(f.n_active), bar, str(f.n_hits), str(f.n_missing), format_size(f.bytes_read))
    return table
