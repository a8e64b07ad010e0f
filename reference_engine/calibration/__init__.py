"""Calibration: what a model does on a text becomes predictors and statistics in its file.

    text -> record activity (scratch store) -> fit or choose predictors -> measure on held-out text -> new file

Each step is noted in the scratch store's journal, so an interrupted calibration goes on where it stopped.
"""

from reference_engine.calibration.options import CalibrationOptions, CalibrationReport, Target
from reference_engine.calibration.perform import calibrate

__all__ = ["CalibrationOptions", "CalibrationReport", "Target", "calibrate"]
