"""Ways to fit a low-rank predictor, all to the same loss: with numpy alone, or with torch, on a GPU where there is one.

torch comes with the extra ``train``, and is imported when it is asked for.

One layer of OPT-6.7B's shape (4096 x 16384, rank 256, 20 000 tokens) on two cores with AVX-512 and AMX, by
``benchmarks/fit_predictor.py``: 15 s for the start, then 10.5 s an epoch with numpy, 5.6 s with torch in float32 and
4.5 s in bfloat16, with 1.0 GiB or less on top of the text (torch); all three predict the same share of the neurons at
the same recall. On a GPU it has not been run.
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
