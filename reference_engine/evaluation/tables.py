"""Tables of an evaluation for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from reference_engine.evaluation.results import Evaluation, PointResult


def tables(evaluation: Evaluation) -> Iterator[RenderableType]:
    """Everything worth reading, in order."""
    held = "" if evaluation.residents == "stored" else f", resident matrices in {evaluation.residents}"
    yield Text(f"{evaluation.model} on {evaluation.text}{held}", style="bold")
    yield Text(
        f"{evaluation.n_scored_tokens} of {evaluation.n_tokens} tokens scored, windows of {evaluation.window} every "
        f"{evaluation.stride}"
    )
    yield _points(evaluation)
    for point in evaluation.points:
        if point.label == "file":
            yield _layers(point)
    if evaluation.windows:
        yield _windows(evaluation)


def _points(evaluation: Evaluation) -> Table:
    table = _table("selector", "operating points")
    for name in ("perplexity", "cost", "computed", "active", "recall", "precision"):
        table.add_column(name, justify="right")
    for point in evaluation.points:
        table.add_row(
            point.label,
            f"{point.perplexity:.4g}",
            f"{round(100 * point.cost, 2) + 0.0:+.2f} %",  # adding zero leaves no negative one
            _percent(point.computed_share),
            _percent(point.active_share),
            _percent(point.recall),
            _percent(point.precision),
        )
    return table


def _layers(point: PointResult) -> Table:
    table = _table("layer", f"layers with {point.label}")
    for name in ("computed", "active", "recall", "precision"):
        table.add_column(name, justify="right")
    for layer in point.layers:
        shares = (layer.computed_share, layer.active_share, layer.recall, layer.precision)
        table.add_row(str(layer.layer), *map(_percent, shares))
    return table


def _windows(evaluation: Evaluation) -> Table:
    title = f"neuron windows with {evaluation.simulated}, simulated on {evaluation.n_simulated_tokens} tokens"
    table = _table("window", title)
    for name in ("hits", "held", "loaded a token"):
        table.add_column(name, justify="right")
    for window in evaluation.windows:
        size = f"paper, last {window.size:g} tokens" if window.rule == "paper" else f"{window.rule}, {window.size:.0%}"
        table.add_row(size, _percent(window.hit_rate), _percent(window.held_share), _percent(window.missing_share))
    return table


def _table(first: str, title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"
