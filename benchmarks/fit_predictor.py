"""Fitting the predictor of one layer: ``python benchmarks/fit_predictor.py [--fit numpy|torch]``.

Made-up activity of the shape of OPT-6.7B's layers: a neuron is active where a planted low-rank map of z, with noise,
passes the neuron's own cut. Seconds of the start and of the epochs, memory on top of the data, and what the predictor
reaches on other tokens of the same kind.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from reference_engine.calibration.scratch import HeldSection
from reference_engine.machine import peak_resident_nbytes, resident_nbytes
from reference_engine.predictor_training import TrainingOptions, cut_curve
from reference_engine.sizes import format_size
from reference_engine.training import load_fitter

F32 = npt.NDArray[np.float32]
PLANTED_RANK = 64
PIECE_TOKENS = 128


class Planted:
    """Where the activity of a layer comes from."""

    def __init__(self, d_model: int, d_ff: int, active: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._rng, self._d_model = rng, d_model
        self._mixing = rng.standard_normal((d_model, 256), np.float32) / 16  # z has strong directions and weak ones
        self._down = rng.standard_normal((PLANTED_RANK, d_model), np.float32)
        self._up = rng.standard_normal((d_ff, PLANTED_RANK), np.float32)
        shares = np.clip(active * rng.lognormal(-0.5, 1.0, d_ff), 1e-3, 0.6)
        logits = self._logits(self._inputs(2048))
        self._cuts = np.array([np.quantile(column, 1 - share) for column, share in zip(logits.T, shares, strict=True)])

    def section(self, n_tokens: int) -> HeldSection:
        """New tokens, as a calibration holds them."""
        stored = []
        for first in range(0, n_tokens, 1024):
            z = self._inputs(min(1024, n_tokens - first)).astype(np.float16)
            stored.append((z, np.packbits(self._logits(z.astype(np.float32)) > self._cuts, axis=1)))
        return HeldSection(stored, PIECE_TOKENS, len(self._up))

    def _inputs(self, n: int) -> F32:
        strong = self._rng.standard_normal((n, self._mixing.shape[1]), np.float32) @ self._mixing.T
        return strong + 0.3 * self._rng.standard_normal((n, self._d_model), np.float32)

    def _logits(self, z: F32) -> F32:
        logits = cast(F32, (z @ self._down.T) @ self._up.T)
        logits += np.float32(0.3 * logits.std()) * self._rng.standard_normal(logits.shape, np.float32)
        return logits


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", choices=["numpy", "torch"], default="numpy")
    parser.add_argument("--bfloat16", action="store_true", help="products in bfloat16; with torch on a CPU")
    parser.add_argument("--d-model", type=int, default=4096)
    parser.add_argument("--d-ff", type=int, default=16384)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--active", type=float, default=0.05, help="share of active neurons, about [%(default)s]")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    planted = Planted(options.d_model, options.d_ff, options.active, seed=0)
    train, validation = planted.section(options.tokens), planted.section(2048)
    others: dict[str, Any] = {}
    if options.bfloat16:
        import torch

        others["dtype"] = torch.bfloat16
    fitter = load_fitter(options.fit)
    held = resident_nbytes()
    began = time.perf_counter()
    fits = fitter(train, validation, options.rank, TrainingOptions(epochs=options.epochs), **others)
    started = time.perf_counter()
    fit = fits.fit(options.rank)
    ended = time.perf_counter()
    peak = peak_resident_nbytes()
    curve = cut_curve(fit, validation)
    recall, predicted = curve.at(curve.cut_for_recall(0.95))
    found = {
        **{name: getattr(options, name) for name in ("fit", "bfloat16", "d_model", "d_ff", "rank", "tokens", "epochs")},
        "start_seconds": started - began,
        "fit_seconds": ended - started,
        "peak_bytes_over_data": peak - held,
        "recall": recall,
        "predicted_share": predicted,
        "active_share": float(np.mean([validation.piece(i)[1].mean() for i in range(validation.n_pieces)])),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    print(
        f"{options.fit}{' bfloat16' * options.bfloat16}: {options.d_model} x {options.d_ff}, rank {options.rank}, "
        f"{options.tokens} tokens: start {found['start_seconds']:.1f} s, {options.epochs} epochs at most "
        f"{found['fit_seconds']:.1f} s, {format_size(peak - held)} on top of the data; recall {recall:.3f} predicting "
        f"{predicted:.1%} where {found['active_share']:.1%} are active (load {found['load']:.1f})"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
