"""Backends: the same functions on arrays, in several ways. `load_backend` chooses one.

Knows: which backends there are. Does not know: how they compute. numba is imported only when its backend is loaded.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

from reference_engine.backends.numpy_backend import NumpyBackend
from reference_engine.backends.protocol import (
    FFN_BLOCK_NEURONS,
    AttentionWeights,
    Backend,
    FfnShape,
    LayerRotation,
    LayerWeights,
    Matrix,
    NormWeights,
    Step,
    TokenPass,
)

BackendName = Literal["auto", "numba", "numpy"]

__all__ = [
    "FFN_BLOCK_NEURONS",
    "AttentionWeights",
    "Backend",
    "BackendName",
    "FfnShape",
    "LayerRotation",
    "LayerWeights",
    "Matrix",
    "NormWeights",
    "Step",
    "TokenPass",
    "is_compiled",
    "load_backend",
]


def is_compiled(name: BackendName = "auto") -> bool:
    """Whether loading a backend takes no compilation: its kernels are in the disk cache, or it has none."""
    if name == "numpy" or importlib.util.find_spec("numba") is None:
        return True
    from reference_engine.backends.numba_runtime import are_kernels_cached

    return are_kernels_cached()


def load_backend(name: BackendName = "auto", n_threads: int | None = None) -> Backend:
    """Load a backend. The first numba backend of an installation takes half a minute to compile, in a child process.

    Parameters
    ----------
    name : ``numpy``, ``numba``, or ``auto``: numba where it can be imported, else numpy.
    n_threads : threads that share the work of one call; the usable cores where None. numpy ignores it: its BLAS
        decides for itself.

    Raises
    ------
    ImportError
        If ``numba`` is asked for and cannot be imported.
    ValueError
        If the name is unknown or `n_threads` is not positive.
    """
    if n_threads is not None and n_threads < 1:
        raise ValueError(f"at least one thread is needed, not {n_threads}")
    if name not in ("auto", "numba", "numpy"):
        raise ValueError(f"unknown backend {name!r}: auto, numba or numpy")
    if name == "numpy" or (name == "auto" and importlib.util.find_spec("numba") is None):
        return NumpyBackend()
    from reference_engine.backends.warm_up import warm_up

    warm_up()
    from reference_engine.backends.numba_backend import NumbaBackend

    return NumbaBackend(n_threads)
