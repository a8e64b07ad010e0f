"""What a calibration is asked for, and what it reports."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from flashfmt.encodings import Encoding
from flashfmt.manifest import Predictor
from reference_engine.models.weights import TapPoint
from reference_engine.training import FitChoice

KindChoice = Literal["auto", "low_rank", "low_bit_gate"]
RANKS: Final = (16, 32, 64, 128, 256)

_TARGET: Final = re.compile(r"(recall|perplexity)=(\d*\.?\d+)(%?)")


@dataclass(frozen=True, slots=True)
class Target:
    """What a predictor must reach on validation text.

    ``recall``: this share of the active neurons of every layer, each counting as one; which ones are missed goes by
    what they add (`reference_engine.neuron_weights`). ``perplexity``: at most this relative loss, with as few neurons
    as that allows; with a margin, so that held-out text keeps it with 95 % confidence.
    """

    metric: Literal["recall", "perplexity"] = "recall"
    value: float = 0.95

    @classmethod
    def parse(cls, text: str) -> Target:
        """From ``recall=0.95``, ``recall=95%``, ``perplexity=1%`` or ``perplexity=0.01``.

        Raises
        ------
        ValueError
            If the text says none of these.
        """
        match = _TARGET.fullmatch(text.strip())
        value = float(match[2]) / (100 if match[3] else 1) if match else 0.0
        if match is None or not 0 < value < 1:
            raise ValueError(f"{text!r} is not a target such as recall=0.95 or perplexity=1%")
        return cls("recall" if match[1] == "recall" else "perplexity", value)

    def __str__(self) -> str:
        return f"{self.metric}={self.value:g}"


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """How to calibrate.

    Parameters
    ----------
    kind : of predictor; ``auto`` is ``low_rank`` where the activation gives exact zeros, else ``low_bit_gate``.
    target : see `Target`.
    rank : of ``low_rank``; None chooses from `RANKS` for each layer.
    n_tokens : most tokens of text to use.
    held_out : share of the text, its last part, on which predictors are measured and statistics are made.
    active_share : for ``low_bit_gate`` with a recall target: which share of the neurons counts as active.
    tap, ahead : the activation that predictors read, and how many layers before their own.
    encoding : of low-rank matrices.
    fit : what low-rank predictors are fitted with: numpy, torch, or torch only where it finds a GPU.
    epochs, learning_rate, seed : of the fit.
    window : tokens of text computed from an empty context; None takes the model's context, at most 512.
    statistics_window : longest window of the aggregated window curve.
    """

    kind: KindChoice = "auto"
    target: Target = Target()
    rank: int | None = None
    n_tokens: int | None = 65536
    held_out: float = 0.2
    active_share: float = 0.5
    tap: TapPoint = "ffn_input"
    ahead: int = 0
    encoding: Encoding = Encoding.F16
    fit: FitChoice = "auto"
    epochs: int = 4
    learning_rate: float = 0.01
    seed: int = 0
    window: int | None = None
    statistics_window: int = 256


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """What a calibration made. Perplexities are of the held-out text; `seconds` of this run, without resumed work."""

    target: Path
    predictors: tuple[Predictor, ...]
    n_train_tokens: int
    n_held_out_tokens: int
    perplexity: float
    predicted_perplexity: float
    predictor_nbytes: int
    target_met: bool
    seconds: float
    resumed: bool

    @property
    def perplexity_cost(self) -> float:
        """Relative loss of perplexity by leaving out what is not predicted."""
        return self.predicted_perplexity / self.perplexity - 1

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        values = {name: getattr(self, name) for name in self.__slots__}
        predictors = [msgspec.to_builtins(predictor) for predictor in self.predictors]
        return {**values, "target": str(self.target), "predictors": predictors, "perplexity_cost": self.perplexity_cost}
