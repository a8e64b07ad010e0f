"""A checkpoint's config.json, read strictly: missing keys, wrong types and unknown maths are refused by name.

Knows: how a config value is looked up and refused. Does not know: what a value means to a family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from flashfmt.errors import CheckpointError
from flashfmt.layout import MAX_DIMENSION
from flashfmt.manifest import Activation, ActivationKind

MAX_NUMBER: Final = 3.4e38

_ACTIVATIONS: Mapping[str, ActivationKind] = {
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "fatrelu": "fatrelu",
}

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "dim_model_base": (),
    "embedding_multiplier": (1,),
    "embedding_scale": (1,),
    "final_logit_softcapping": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "partial_rotary_factor": (1,),
    "qk_layernorm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rotary_pct": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    "use_qk_norm": (False,),
}
"""Keys that change the arithmetic in other families, with the values (beside null) that leave it alone."""


class Config:
    """A view of config.json whose lookups raise CheckpointError naming the key."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.values = values
        self.path = path

    @property
    def architecture(self) -> str:
        """The model class that the config names first, or else its model type."""
        named = self.values.get("architectures")
        if isinstance(named, list) and named and isinstance(named[0], str):
            return named[0]
        return self.text("model_type")

    def refuse(self, key: str, reason: str, *, expected: object = "a supported value") -> NoReturn:
        """Raise CheckpointError for a key's value."""
        raise CheckpointError(reason, path=self.path, where=key, expected=expected, actual=repr(self.values.get(key)))

    def has(self, key: str) -> bool:
        """Whether the key is present and not null."""
        return self.values.get(key) is not None

    def count(self, key: str, default: int | None = None, limit: int = MAX_DIMENSION) -> int:
        """A positive integer, at most `limit`."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            self.refuse(key, "not a positive integer within the format's limit", expected=f"an integer in 1..{limit}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= MAX_NUMBER:
            self.refuse(key, "not a number, or beyond float32", expected="a number")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.number(key, default)
        if value <= 0:
            self.refuse(key, "not a positive number", expected="a number > 0")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false; null counts as absent."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "not a boolean", expected="true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._value(key, default)
        if not isinstance(value, str):
            self.refuse(key, "not a string", expected="a string")
        return value

    def activation(self, key: str, default: str | None = None) -> Activation:
        """The activation a key names; `fatrelu` takes its threshold from `hidden_act_param`."""
        name = self.text(key, default)
        kind = _ACTIVATIONS.get(name)
        if kind is None:
            self.refuse(key, "unknown activation", expected="one of " + ", ".join(sorted((*_ACTIVATIONS, "drelu"))))
        if kind == "fatrelu":
            return Activation(kind=kind, threshold=self.number("hidden_act_param"))
        return Activation(kind=kind)

    def refuse_unless_neutral(self, handled: Iterable[str] = ()) -> None:
        """Refuse keys that would change the arithmetic and that the family, but for `handled`, does not have."""
        for key, allowed in _NEUTRAL.items():
            if key not in handled and self.has(key) and self.values[key] not in allowed:
                self.refuse(key, "this option changes the model and is not supported", expected=_words(allowed))

    def _value(self, key: str, default: object) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError("config.json lacks a required key", path=self.path, where=key)
        return default


def _words(allowed: tuple[object, ...]) -> str:
    return " or ".join(("absent", *(repr(value) for value in allowed)))
