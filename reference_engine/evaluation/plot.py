"""A picture of an evaluation, as PNG or SVG: what leaving out costs, and what neuron windows hold. Needs matplotlib."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashfmt.errors import FlashWriteError, MissingExtraError
from reference_engine.evaluation.results import Evaluation, PointResult

SUFFIXES = (".png", ".svg")


def require_matplotlib() -> Any:
    """matplotlib's figure module, for drawing without a display.

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    """
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError:
        raise MissingExtraError("plots need matplotlib; install flashfmt[plots]") from None


def plot(evaluation: Evaluation, path: Path) -> None:
    """Draw an evaluation.

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    FlashWriteError
        If the file cannot be written.
    """
    figure = require_matplotlib().Figure(figsize=(13, 4.2), layout="constrained")
    cost, layers, windows = figure.subplots(1, 3)
    _draw_cost(cost, evaluation)
    _draw_layers(layers, evaluation)
    _draw_windows(windows, evaluation)
    figure.suptitle(f"{evaluation.model}: {evaluation.n_scored_tokens} tokens of {evaluation.text}", fontsize=10)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise FlashWriteError(f"cannot be written: {error.strerror or error}", path=path) from error


def _draw_cost(axes: Any, evaluation: Evaluation) -> None:
    by_selector: dict[str, list[PointResult]] = {}
    for point in evaluation.points:
        kind = f"{point.selector} {point.setting.split(' ')[0]}" if point.selector == "lowbit" else point.selector
        by_selector.setdefault(kind, []).append(point)
    for selector, points in by_selector.items():
        points.sort(key=lambda point: point.computed_share)
        axes.plot(*_columns(points), marker="o", label=selector)
    axes.set(xlabel="neurons computed, % of the FFN", ylabel="perplexity", title="What leaving out costs")
    axes.legend(fontsize=8)


def _columns(points: Sequence[PointResult]) -> tuple[list[float], list[float]]:
    return [100 * point.computed_share for point in points], [point.perplexity for point in points]


def _draw_layers(axes: Any, evaluation: Evaluation) -> None:
    shown = [p for p in evaluation.points if p.layers and p.selector in ("file", "lowbit")][:1] or [
        p for p in evaluation.points if p.layers
    ][:1]
    for point in shown:
        numbers = [layer.layer for layer in point.layers]
        for name in ("recall", "precision", "computed_share", "active_share"):
            axes.plot(numbers, [getattr(layer, name) for layer in point.layers], marker=".", label=name)
        axes.set_title(f"Layers with {point.label}")
        axes.legend(fontsize=8)
    axes.set(xlabel="layer", ylim=(0, 1.05))


def _draw_windows(axes: Any, evaluation: Evaluation) -> None:
    for rule, label in (
        ("paper", "paper, last k tokens"),
        ("lru", "lru, by capacity"),
        ("frequency", "frequency, by capacity"),
    ):
        found = [window for window in evaluation.windows if window.rule == rule]
        axes.plot([100 * w.held_share for w in found], [100 * w.hit_rate for w in found], marker="o", label=label)
        for window in found if rule == "paper" else ():
            place = 100 * window.held_share, 100 * window.hit_rate
            axes.annotate(f"k={window.size:g}", place, (-6, 4), textcoords="offset points", ha="right", fontsize=7)
    axes.set(xlabel="neurons held, % of the FFN", ylabel="hits, %", title="Neuron windows", ylim=(0, 102))
    axes.legend(fontsize=8)
