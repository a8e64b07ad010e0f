"""Statistics of active sets (SPEC.md section "Statistics"): firing frequencies and the aggregated window curve.

Pure; fed a few tokens at a time, with memory that does not grow with the text.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


class ActivityStatistics:
    """Activity of one layer.

    Parameters
    ----------
    window_tokens : length of the aggregated window curve.
    """

    def __init__(self, n_neurons: int, window_tokens: int) -> None:
        self._counts = np.zeros(n_neurons, np.int64)
        self._last_active = np.full(n_neurons, -window_tokens, np.int64)  # as if longer ago than any window reaches
        self._unions = np.zeros(window_tokens, np.int64)  # summed over tokens, by window length - 1
        self._n_tokens = 0

    @property
    def n_tokens(self) -> int:
        """Tokens seen."""
        return self._n_tokens

    def add(self, active: Mask) -> None:
        """Take the next tokens, bool [n_tokens, n_neurons]."""
        self._counts += active.sum(axis=0)
        longest = len(self._unions)
        for now in active:
            self._last_active[now] = self._n_tokens
            age = np.minimum(self._n_tokens - self._last_active, longest)  # in every window of more tokens than that
            union = np.bincount(age, minlength=longest + 1)[:longest].cumsum()
            n_complete = min(longest, self._n_tokens + 1)
            self._unions[:n_complete] += union[:n_complete]
            self._n_tokens += 1

    def firing_frequency(self) -> F32:
        """Share of tokens for which each neuron was active, float32 [n_neurons]."""
        return (self._counts / max(self._n_tokens, 1)).astype(np.float32)

    def aggregated_window(self) -> F32:
        """s_agg(1), s_agg(2), ...: float32 [window_tokens], as shares of all neurons; never decreasing.

        Raises
        ------
        ValueError
            If fewer tokens were seen than the longest window has.
        """
        lengths = np.arange(1, len(self._unions) + 1)
        if self._n_tokens < len(lengths):
            raise ValueError(f"{self._n_tokens} tokens do not fill a window of {len(lengths)}")
        curve = self._unions / (self._n_tokens - lengths + 1) / len(self._counts)
        # the means are over different tokens, so their order is not quite certain at the end of the text
        return np.minimum(np.maximum.accumulate(curve), 1.0).astype(np.float32)
