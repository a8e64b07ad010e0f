"""Selectors: from an activation to the neurons of a layer that will be active."""

from reference_engine.selectors.predictors import LowBitGate, LowRankPredictor, selector_from_file
from reference_engine.selectors.protocol import Selector
from reference_engine.selectors.simple import Everything, Trace

__all__ = ["Everything", "LowBitGate", "LowRankPredictor", "Selector", "Trace", "selector_from_file"]
