"""What the engine asks of a selector."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]


class Selector(Protocol):
    """Decides for one layer which neurons are computed; all others count as zero."""

    def select(self, x: F32) -> Ids:
        """Neurons active for any of the tokens in `x`.

        Parameters
        ----------
        x : float32 [n_tokens, d_model], the activation that the selector's input tap names.

        Returns
        -------
        int32, sorted, unique.
        """
        ...
