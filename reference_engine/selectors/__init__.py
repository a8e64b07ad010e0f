"""Selectors: from an activation to the neurons of a layer that will be active."""

from reference_engine.selectors.choice import (
    SelectorChoice,
    TappedSelector,
    load_selectors,
    parse_selector,
    selectors_load_nbytes,
    selectors_nbytes,
)
from reference_engine.selectors.exact import Oracle, Threshold
from reference_engine.selectors.predictors import LowBitGate, LowRankPredictor, selector_from_file
from reference_engine.selectors.protocol import Selector
from reference_engine.selectors.simple import Everything, Trace

__all__ = [
    "Everything",
    "LowBitGate",
    "LowRankPredictor",
    "Oracle",
    "Selector",
    "SelectorChoice",
    "TappedSelector",
    "Threshold",
    "Trace",
    "load_selectors",
    "parse_selector",
    "selector_from_file",
    "selectors_load_nbytes",
    "selectors_nbytes",
]
