"""Evaluation: what leaving out neurons costs in perplexity, and what it saves.

text -> perplexity of each operating point -> recall, precision, shares -> simulated neuron windows -> report
"""

from reference_engine.evaluation.perform import EvaluationOptions, evaluate
from reference_engine.evaluation.results import Evaluation, LayerResult, PointResult, WindowResult

__all__ = ["Evaluation", "EvaluationOptions", "LayerResult", "PointResult", "WindowResult", "evaluate"]
