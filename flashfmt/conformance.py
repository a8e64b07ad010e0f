"""Running a reader against the conformance suite, which lies beside the packages in a checkout.

Knows: where the suite is. Does not know: its protocol, which is that of ``conformance/README.md``.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from flashfmt.errors import FlashError

_RUNNER = "run.py"
_INDEX = "cases.json"


def suite_folder(chosen: Path | None = None) -> Path:
    """The folder of the suite: `chosen`, or ``conformance/`` of the checkout that this package is used from.

    Raises
    ------
    FlashError
        If it is not there: an installed package does not hold the suite.
    """
    folder = Path(__file__).resolve().parents[1] / "conformance" if chosen is None else chosen
    for name in (_RUNNER, _INDEX):
        if not (folder / name).is_file():
            message = (
                "the conformance suite is not here; it is the folder conformance/ of the source distribution: "
                "name it with --suite"
            )
            raise FlashError(message, path=folder / name)
    return folder


def run_suite(command: Sequence[str], options: Sequence[str] = (), suite: Path | None = None) -> int:
    """Put the suite's cases to a reader.

    Parameters
    ----------
    command : the reader and its arguments.
    options : of ``conformance/run.py``.
    suite : see `suite_folder`.

    Returns
    -------
    0 where everything that the reader claims passed, 1 otherwise, 2 for wrong usage.

    Raises
    ------
    FlashError
        If the suite is not there.
    """
    runner = suite_folder(suite) / _RUNNER
    return subprocess.run([sys.executable, str(runner), *options, "--", *command], check=False).returncode
