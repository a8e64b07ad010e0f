"""What a family says about a checkpoint: the decoder, and which source tensor each of our arrays comes from.

Knows: the form of a mapping. Does not know: any family, files, bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flashfmt.convert.config import Config
from flashfmt.manifest import Decoder

F32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class FfnSources:
    """Source tensors of one layer's bundles: `up` and `gate` [d_ff, d_model], `down` [d_model, d_ff]."""

    up: str
    down: str
    gate: str | None = None

    @property
    def by_part(self) -> Mapping[str, str]:
        """Source tensor of each part, in the order of a bundle."""
        gate = {} if self.gate is None else {"gate": self.gate}
        return {**gate, "up": self.up, "down": self.down}


@dataclass(frozen=True, slots=True)
class TensorMap:
    """Where every array of the flash file comes from.

    Attributes
    ----------
    arrays : our array name -> source tensor of the same shape.
    ffn : per layer, the tensors that become bundles.
    computed : our array name -> float32 values made from the config.
    copies : source tensors that must equal another one (a tied output matrix stored twice) -> that other one.
    ignorable : source tensors that may be present and hold nothing the model needs.
    """

    arrays: Mapping[str, str]
    ffn: tuple[FfnSources, ...]
    computed: Mapping[str, F32Array] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    ignorable: Callable[[str], bool] = lambda _name: False


class Family(Protocol):
    """A module that translates the checkpoints of one or more architectures."""

    MODEL_TYPES: tuple[str, ...]

    def describe(self, config: Config) -> Decoder:
        """The decoder that a config stands for; CheckpointError where it cannot be expressed."""
        ...

    def tensor_map(self, config: Config, decoder: Decoder, names: Collection[str]) -> TensorMap:
        """Where the decoder's arrays come from, in a checkpoint that holds the tensors `names`."""
        ...
