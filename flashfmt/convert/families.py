"""The supported families, by the model type or architecture that a config names.

Knows: which module translates which model type. Does not know: what the modules do.
"""

from __future__ import annotations

from flashfmt.convert import llama, opt
from flashfmt.convert.config import Config
from flashfmt.convert.translation import Family
from flashfmt.errors import CheckpointError

FAMILIES: tuple[Family, ...] = (opt, llama)

_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.MODEL_TYPES}


def family_of(config: Config) -> Family:
    """The module for a config; CheckpointError naming the supported model types for any other."""
    model_type = config.text("model_type")
    if model_type not in _BY_TYPE:
        raise CheckpointError(
            "unsupported architecture",
            path=config.path,
            where="model_type",
            expected="one of " + ", ".join(sorted(_BY_TYPE)),
            actual=f"{model_type} {config.values.get('architectures') or ''}".strip(),
        )
    return _BY_TYPE[model_type]
