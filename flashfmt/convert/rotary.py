"""Rotary tables from a checkpoint's config: inverse frequencies in float32, as transformers computes them.

Both forms of the config are read: the older `rope_theta` + `rope_scaling` and `rope_parameters` of transformers 5.
Formulas: transformers 5.23, `modeling_rope_utils.py`; YaRN: arXiv:2309.00071.

Knows: scaling rules. Does not know: tensors, layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flashfmt.convert.config import MAX_NUMBER, Config
from flashfmt.manifest import Rotary

F32Array = npt.NDArray[np.float32]

MAIN_TABLE = "main"
MAX_ROTARY_DIMS = 1 << 16
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """A rotary description and its inverse frequencies, float32 [n_dims / 2]."""

    description: Rotary
    frequencies: F32Array


def rotary_table(config: Config, head_dim: int, default_theta: float = 10_000.0) -> RotaryTable:
    """The table of all rotated layers of a model.

    Parameters
    ----------
    head_dim : dimensions of a head, all of which turn.
    default_theta : base where the config names none.

    Raises
    ------
    CheckpointError
        For an unknown rope type, or one whose frequencies depend on the length of the text.
    """
    options = _Options(config, default_theta)
    if head_dim % 2 or head_dim > MAX_ROTARY_DIMS:
        expected = f"an even number up to {MAX_ROTARY_DIMS}"
        config.refuse("head_dim", "rotary positions need an even head dimension", expected=expected)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    periods = np.power(np.float32(options.number("rope_theta", default_theta)), exponents)  # (head_dim / 2,)
    frequencies = np.float32(1) / periods
    attention_factor = 1.0
    if options.kind == "linear":
        frequencies = frequencies / np.float32(options.number("factor"))
    elif options.kind == "llama3":
        frequencies = _llama3(options, frequencies)
    elif options.kind == "yarn":
        frequencies, attention_factor = _yarn(options, periods)
    elif options.kind == "longrope":
        frequencies, attention_factor = _longrope(options, periods)
    description = Rotary(name=MAIN_TABLE, n_dims=head_dim, attention_factor=attention_factor)
    return RotaryTable(description, frequencies.astype(np.float32))


class _Options:
    """The rope options of either config form, with the refusals they need."""

    def __init__(self, config: Config, default_theta: float) -> None:
        self.config = config
        self.key = next((key for key in ("rope_scaling", "rope_parameters") if config.values.get(key)), "rope_theta")
        nested = config.values.get(self.key) if self.key != "rope_theta" else {}
        if not isinstance(nested, Mapping) or any(isinstance(value, Mapping) for value in nested.values()):
            config.refuse(self.key, "rotary options per layer type are not supported", expected="one flat object")
        theta = config.values.get("rope_theta")
        self.values: dict[str, Any] = {"rope_theta": default_theta if theta is None else theta, **nested}
        self.kind = self.values.get("rope_type") or self.values.get("type") or "default"
        if self.kind not in ROPE_TYPES:
            config.refuse(self.key, f"unknown rope type {self.kind!r}", expected="one of " + ", ".join(ROPE_TYPES))
        if self.values.get("partial_rotary_factor") not in (None, 1):
            config.refuse(self.key, "partial rotary positions are not supported", expected="partial_rotary_factor 1")
        if self.values.get("mrope_section") is not None:
            config.refuse(self.key, "multimodal rotary positions are not supported", expected="no mrope_section")

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None:
            value = default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= MAX_NUMBER:
            self.config.refuse(self.key, f"rope option {key} is missing or not a positive number")
        return float(value)

    @property
    def original_context(self) -> float:
        """Context length of pretraining; a value beside the options goes before one inside them."""
        if self.config.has("original_max_position_embeddings"):
            context = float(self.config.count("original_max_position_embeddings"))
        else:
            context = self.number("original_max_position_embeddings", self.config.count("max_position_embeddings"))
        if context < 2:
            self.config.refuse(self.key, "original_max_position_embeddings is too small", expected="at least 2")
        return context

    def factor_list(self, key: str, length: int) -> F32Array:
        values = self.values.get(key)
        if not isinstance(values, list) or len(values) != length:
            self.config.refuse(self.key, f"rope option {key} is not a list of {length} numbers")
        if not all(isinstance(value, int | float) and 0 < value <= MAX_NUMBER for value in values):
            self.config.refuse(self.key, f"rope option {key} holds something else than positive numbers")
        return np.array(values, np.float32)


def _llama3(options: _Options, frequencies: F32Array) -> F32Array:
    factor, context = options.number("factor"), options.original_context
    low, high = options.number("low_freq_factor"), options.number("high_freq_factor")
    if high <= low:
        options.config.refuse(options.key, "high_freq_factor is not above low_freq_factor", expected="low < high")
    wavelengths = np.float32(2 * math.pi) / frequencies
    smooth = (np.float32(context) / wavelengths - np.float32(low)) / np.float32(high - low)
    slowed = frequencies / np.float32(factor)
    blended = (1 - smooth) * slowed + smooth * frequencies
    scaled = np.where(wavelengths > context / low, slowed, np.where(wavelengths < context / high, frequencies, blended))
    return scaled.astype(np.float32)


def _yarn(options: _Options, periods: F32Array) -> tuple[F32Array, float]:
    n_dims, base = 2 * len(periods), options.number("rope_theta")
    context = options.original_context
    if options.values.get("factor") is None:
        factor = options.config.count("max_position_embeddings") / context
    else:
        factor = options.number("factor")

    def correction_dim(n_rotations: float) -> float:
        return n_dims * math.log(context / (n_rotations * 2 * math.pi)) / (2 * math.log(base))

    if base <= 1:
        options.config.refuse(options.key, "yarn needs a rope_theta above 1", expected="rope_theta > 1")
    low, high = correction_dim(options.number("beta_fast", 32)), correction_dim(options.number("beta_slow", 1))
    if options.values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n_dims - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(n_dims // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    keep = 1 - ramp.astype(np.float32)
    frequencies = 1 / (np.float32(factor) * periods) * (1 - keep) + 1 / periods * keep
    return frequencies.astype(np.float32), _yarn_attention_factor(options, factor)


def _yarn_attention_factor(options: _Options, factor: float) -> float:
    if options.values.get("attention_factor") is not None:
        return options.number("attention_factor")

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if options.values.get("mscale") and options.values.get("mscale_all_dim"):
        return mscale(options.number("mscale")) / mscale(options.number("mscale_all_dim"))
    return mscale(1.0)


def _longrope(options: _Options, periods: F32Array) -> tuple[F32Array, float]:
    short = options.factor_list("short_factor", len(periods))
    long = options.factor_list("long_factor", len(periods))
    context = options.original_context
    if not np.array_equal(short, long) and context < options.config.count("max_position_embeddings"):
        options.config.refuse(
            options.key,
            "longrope frequencies that change with the length of the text are not supported",
            expected="equal short_factor and long_factor",
        )
    frequencies = (np.float32(1) / (short * periods)).astype(np.float32)
    if options.values.get("attention_factor") is not None:
        return frequencies, options.number("attention_factor")
    if options.values.get("factor") is None:
        factor = options.config.count("max_position_embeddings") / context
    else:
        factor = options.number("factor")
    attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
    return frequencies, attention_factor
