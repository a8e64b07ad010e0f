"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re
from typing import Final

_UNITS: Final = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000 ** (i + 1) for i, prefix in enumerate("kmgt")},
    **{f"{prefix}ib": 1024 ** (i + 1) for i, prefix in enumerate("kmgt")},
    **{prefix: 1024 ** (i + 1) for i, prefix in enumerate("kmgt")},
}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)")


def parse_size(text: str) -> int:
    """Bytes in a size such as ``6GiB``, ``1.5 GB``, ``512M`` (binary, as in other tools) or ``1048576``.

    Raises
    ------
    ValueError
        If the text is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write for example 6GiB, 1.5GB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_size(nbytes: float) -> str:
    """Binary size with one decimal: ``3.4 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
