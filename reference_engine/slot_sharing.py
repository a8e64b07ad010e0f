"""How many slots each layer gets. Pure; no I/O.

With stored activity (SPEC.md section "Statistics") the next slots always go to the layer where they avoid most reads: a
layer that holds the neurons of k tokens holds s_agg(k) of its neurons and misses s_agg(k + 1) - s_agg(k) at the next
token (LLM in a flash, section 3.1). Without, every layer gets the same share.

Knows: curves and sizes. Does not know: bundles, windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


def expected_misses(aggregated_window: npt.ArrayLike, n_neurons: int) -> tuple[F64, F64]:
    """Misses a token over slots held, from s_agg.

    Parameters
    ----------
    aggregated_window : s_agg(k) for k = 1, 2, ..., as shares of `n_neurons`; never decreasing.

    Returns
    -------
    slots, misses : float64; a convex curve through (0, all active neurons missing) and (n_neurons, none missing), to be
        interpolated linearly.
    """
    held = np.asarray(aggregated_window, np.float64) * n_neurons
    slots = np.concatenate(([0.0], held[:-1], [float(n_neurons)]))
    misses = np.concatenate((held[:1], np.diff(held), [0.0]))
    return _lower_hull(slots, misses)


def predicted_window(aggregated_window: npt.ArrayLike, predicted_share: float) -> F64:
    """s_agg of the neurons that a predictor names, from s_agg of those that are active.

    A predictor names more than are active. It is taken to do so as if each token counted for several, as many as make
    s_agg(1) the share that it names.

    Parameters
    ----------
    aggregated_window : s_agg(k) for k = 1, 2, ...
    predicted_share : of the neurons, that the predictor names for a token.
    """
    s = np.asarray(aggregated_window, np.float64)
    if not 0 < s[0] < predicted_share < 1:
        return s
    n_tokens = np.log1p(-predicted_share) / np.log1p(-s[0])
    return cast(F64, 1 - (1 - s) ** n_tokens)


def share_slots(
    n_slots: int, n_neurons: int, curves: Sequence[tuple[F64, F64]] | None, *, n_layers: int, minimum: int
) -> list[int]:
    """Split slots among layers of equal bundles.

    Parameters
    ----------
    n_slots : to be given away in all; at least ``n_layers * minimum``.
    n_neurons : most that a layer can use.
    curves : for each layer what `expected_misses` gives, or None to split evenly.
    minimum : least that every layer gets.

    Returns
    -------
    Slots of each layer.

    Raises
    ------
    ValueError
        If there are fewer slots than the minimum.
    """
    if n_slots < n_layers * minimum:
        raise ValueError(f"{n_slots} slots are too few for {n_layers} layers of at least {minimum}")
    if n_slots >= n_layers * n_neurons:
        return [n_neurons] * n_layers
    if curves is None:
        return [n_slots // n_layers + (layer < n_slots % n_layers) for layer in range(n_layers)]
    shares = [minimum] * n_layers
    left = n_slots - n_layers * minimum
    for _, layer, end in _segments(curves):
        given = min(left, max(min(end, n_neurons) - shares[layer], 0))
        shares[layer] += given
        left -= given
    return shares


def _segments(curves: Sequence[tuple[F64, F64]]) -> list[tuple[float, int, int]]:
    """(slope, layer, slots at its end) of all pieces of all curves, the most useful first.

    The curves are convex, so a layer's pieces come in their order.
    """
    pieces = []
    for layer, (slots, misses) in enumerate(curves):
        slopes = np.diff(misses) / np.diff(slots)
        ends = np.ceil(slots[1:]).astype(np.int64)
        pieces += [(float(slope), layer, int(end)) for slope, end in zip(slopes, ends, strict=True)]
    pieces.sort(key=lambda piece: (piece[0], piece[2], piece[1]))
    return pieces


def _lower_hull(x: F64, y: F64) -> tuple[F64, F64]:
    """Lower convex hull of points with rising x."""
    hull: list[tuple[float, float]] = []
    for point in zip(x.tolist(), y.tolist(), strict=True):
        if hull and point[0] <= hull[-1][0]:
            hull[-1] = (hull[-1][0], min(hull[-1][1], point[1]))
            continue
        while len(hull) >= 2 and _is_above(hull[-1], hull[-2], point):
            hull.pop()
        hull.append(point)
    return np.array([p[0] for p in hull]), np.array([p[1] for p in hull])


def _is_above(middle: tuple[float, float], left: tuple[float, float], right: tuple[float, float]) -> bool:
    """Whether `middle` lies on or above the line from `left` to `right`."""
    (x0, y0), (x1, y1), (x2, y2) = left, middle, right
    return (y1 - y0) * (x2 - x0) >= (y2 - y0) * (x1 - x0)
