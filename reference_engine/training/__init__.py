"""Ways to fit a low-rank predictor, all to the same loss: with numpy alone, or with torch, on a GPU where there is one.

torch comes with the extra ``train``, and is imported when it is asked for.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

from flashfmt.errors import MissingExtraError
from reference_engine.predictor_training import Fitter
from reference_engine.training.numpy_fit import NumpyFit

FitChoice = Literal["auto", "numpy", "torch"]

__all__ = ["FitChoice", "NumpyFit", "load_fitter"]


def load_fitter(choice: FitChoice) -> Fitter:
    """What fits: ``auto`` is torch where it is installed and finds a GPU, else numpy.

    Raises
    ------
    MissingExtraError
        If torch is asked for and not installed.
    """
    if choice == "numpy" or (choice == "auto" and importlib.util.find_spec("torch") is None):
        return NumpyFit
    try:
        from reference_engine.training.torch_fit import TorchFit, has_gpu
    except ImportError:
        raise MissingExtraError("fitting with torch needs torch; install flashfmt[train]") from None
    return TorchFit if choice == "torch" or has_gpu() else NumpyFit
