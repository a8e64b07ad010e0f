"""What fills the slots before the first token: the neurons that fire most often, by the statistics of a file.

A window learns from tokens, so it is shown a made-up text in which every neuron is active about as often as the
statistics say, the most frequent ones last: they stay longest, whether the window goes by recency or by frequency.

Pure. Knows: frequencies. Does not know: windows, bundles, files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from reference_engine.neuron_window import Ids

_N_TOKENS: Final = 32  # frequencies are told apart in as many steps


def likely_tokens(firing_frequency: npt.ArrayLike, capacity: int) -> Iterator[Ids]:
    """Active sets of the made-up text, sorted int32 ids.

    The first has the `capacity` neurons that fire most often, fewer where the others never did; all others are parts
    of it.
    """
    frequency = np.asarray(firing_frequency)
    order = np.argsort(-frequency, kind="stable")[:capacity]
    likely = np.sort(order[frequency[order] > 0]).astype(np.int32)
    yield likely
    for token in range(_N_TOKENS):
        yield likely[frequency[likely] > (token + 0.5) / _N_TOKENS]
