"""The text of the CUDA kernels: the .cu files of this folder, joined into one translation unit.

Knows: files. Does not know: who compiles them. Imports nothing of CUDA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

_FILES: Final = ("cuda_weights.cu", "cuda_linear.cu", "cuda_ffn.cu", "cuda_attention.cu", "cuda_bundles.cu")
COMPILER_OPTIONS: Final = ("--std=c++17",)


def kernel_source() -> str:
    """CUDA C++ of all kernels, for NVRTC or nvcc; includes nothing."""
    folder = Path(__file__).parent
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in _FILES)
