"""What a sparse model loses in half of its memory, end to end: ``python benchmarks/sparse_report.py --tokens F.npy``.

A checkpoint with sparse activations is converted, calibrated, and run token by token as ``flashfmt run --selector
file`` runs it: the stored predictors choose, the neuron window keeps, what is missing is read from the file. Perplexity
is that of text which neither model nor predictors have seen, against the same checkpoint with every neuron and float16
weights.

The memory counted is what is held of the *model*: resident tensors in their encoding, predictors, slots for bundles and
their checksums, as a share of the bytes of the file that is run. Interpreter, kernels, KV cache and buffers come on
top; for a model of a few megabytes they are many times its size, so that the process as a whole tells nothing (ceilings
on the whole process are what tests/reference_engine/test_sparse_memory_ceiling.py checks).

The text is divided by documents: those of the last part are neither fitted to nor chosen on. With ``--tokens`` a
document begins with the token that ends a text; with ``--text`` at a form feed, or the whole file is one. Files are
made once for a checkpoint, a text and settings, in the folder that ``--cache`` names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt

import flashfmt
from flashfmt import FlashModel
from flashfmt.convert import convert
from flashfmt.manifest import bundle_checksums_name
from reference_engine.bench.machine_description import describe_machine
from reference_engine.calibration import CalibrationOptions, CalibrationReport, Target, calibrate
from reference_engine.calibration.costs import PairedScores
from reference_engine.calibration.division import divide
from reference_engine.engine import Engine, EngineOptions, Session
from reference_engine.perplexity import Score, TextWindow, score_windows
from reference_engine.selectors import parse_selector
from reference_engine.sizes import format_size
from reference_engine.slot_sharing import expected_misses, share_slots
from reference_engine.sparse_mode import SparseOptions
from reference_engine.sparse_plan import BundleSizes, SparsePlan
from reference_engine.token_text import TokenText
from reference_engine.tokenizer import load_tokenizer

F32 = npt.NDArray[np.float32]
ROOT = Path(__file__).parents[1]
WINDOW_TOKENS = 512
HELD_OUT = 0.2
MIN_SLOTS = 32
PLENTY = 1 << 34


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes of the model in DRAM."""

    residents: int
    predictors: int
    checksums: int
    slots: int

    @property
    def total(self) -> int:
        """Sum."""
        return self.residents + self.predictors + self.checksums + self.slots


class ByTokens:
    """An engine as scoring wants one: a window of text gives logits, some tokens at a time.

    Parameters
    ----------
    chunk : tokens computed together. Several share the union of their active neurons, so sparse mode is scored by one.
    """

    def __init__(self, engine: Engine, chunk: int) -> None:
        self._engine = engine
        self._chunk = chunk

    def hidden_states(self, token_ids: Sequence[int]) -> Iterator[tuple[int, F32]]:
        """(index of the first token, logits float32 [n, vocab_size]), from an empty context."""
        session: Session = self._engine.start()
        for first in range(0, len(token_ids), self._chunk):
            yield first, session.feed_all(token_ids[first : first + self._chunk])

    def logits(self, hidden: F32) -> F32:
        """What `hidden_states` gave."""
        return hidden


def documents(options: argparse.Namespace, model: Path) -> list[list[int]]:
    """Documents of the text as token ids, in its order."""
    with flashfmt.open(model) as opened:
        tokenizer, tokens = load_tokenizer(opened), opened.manifest.tokens
    if options.tokens is None:
        parts = options.text.read_text("utf-8").split("\f")
        return [tokenizer.encode(part, add_special_tokens=True) for part in parts if part.strip()]
    ids = np.load(options.tokens).astype(np.int64)
    starts = np.flatnonzero(np.isin(ids, [*tokens.eos]))
    return [part.tolist() for part in np.split(ids, starts[starts > 0]) if len(part)]


def shortened(parts: Sequence[Sequence[int]], n_tokens: int) -> list[list[int]]:
    """The beginnings of all documents, of the same share of each, that together have about `n_tokens`."""
    share = min(1.0, n_tokens / sum(map(len, parts)))
    return [list(part[: max(1, round(share * len(part)))]) for part in parts]


def in_parts(parts: Sequence[Sequence[int]], held_out: float) -> list[int]:
    """Documents in a row, those to be held out last, long and short ones on both sides.

    From the longest to the shortest, each goes to the side that lacks the larger share of its size.
    """
    sizes = (1 - held_out, held_out)
    sides: tuple[list[int], list[int]] = ([], [])
    n_tokens = [0, 0]
    for index in sorted(range(len(parts)), key=lambda i: (-len(parts[i]), i)):
        side = 0 if n_tokens[0] / sizes[0] <= n_tokens[1] / sizes[1] else 1
        sides[side].append(index)
        n_tokens[side] += len(parts[index])
    return [token for side in sides for index in sorted(side) for token in parts[index]]


def prepare(options: argparse.Namespace) -> tuple[Path, Path, TokenText, CalibrationReport | None]:
    """(file with every weight in float16, calibrated file, text, what the calibration reported if it ran now)."""
    fingerprint = hashlib.sha256(repr((options.residents, options.rank, options.target, options.text_tokens)).encode())
    for path in sorted([*options.model.iterdir(), options.tokens or options.text]):
        fingerprint.update(path.read_bytes() if path.is_file() else b"")
    folder = options.cache / fingerprint.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    exact, plain, calibrated = (folder / f"{name}.flash" for name in ("float16", "plain", "calibrated"))
    if not exact.exists():
        convert(options.model, exact, encoding="f16", residents="f16")
    if not plain.exists():
        convert(options.model, plain, encoding="f16", residents=options.residents)
    parts = shortened(documents(options, exact), options.text_tokens)
    text = TokenText((options.tokens or options.text).name, tuple(in_parts(parts, HELD_OUT)))
    report = None
    if not calibrated.exists():
        settings = CalibrationOptions(
            target=Target("perplexity", options.target),
            rank=options.rank,
            n_tokens=None,
            held_out=HELD_OUT,
        )
        report = calibrate(plain, text, calibrated, options=settings, progress=_say if options.verbose else None)
    return exact, calibrated, text, report


def windows_to_score(model: Path, text: TokenText, n_tokens: int) -> list[TextWindow]:
    """Windows of the held-out part, spread over all of it, as long as those of the calibration."""
    with flashfmt.open(model) as opened:
        window = min(WINDOW_TOKENS, opened.decoder.context_tokens)
    division = divide(len(text.token_ids), window, HELD_OUT)
    starts = np.arange(division.held_out, division.n_tokens, window)
    n = min(len(starts), max(2, n_tokens // window))
    chosen = starts[np.arange(n) * len(starts) // n].tolist()
    return [TextWindow(first, first + window, first + 1) for first in chosen]


def score_exact(path: Path, text: TokenText, windows: Sequence[TextWindow]) -> list[Score]:
    """With every neuron."""
    with Engine(path, EngineOptions(memory=PLENTY)) as engine:
        engine.load()
        return score_windows(ByTokens(engine, WINDOW_TOKENS), text.token_ids, windows)


def held_bytes(model: FlashModel, plan: SparsePlan, capacities: Sequence[int], sizes: BundleSizes) -> Held:
    """What is held of a model with so many slots in each layer."""
    checksums = sum(model.tensors[bundle_checksums_name(layer)].extent.nbytes for layer in range(sizes.n_layers))
    return Held(plan.fixed.residents, plan.fixed.selectors, checksums, sizes.slots_nbytes(capacities))


def within(model: FlashModel, plan: SparsePlan, share: float) -> tuple[list[int], Held]:
    """As many slots as fit in a share of the file's bytes, shared among layers as the engine shares them."""
    d, info = model.decoder, model.layers[0]
    sizes = BundleSizes(d.n_layers, d.ffn.d_ff, info.geometry.stride)
    none = held_bytes(model, plan, [0] * d.n_layers, sizes)
    page_loss = d.n_layers * 4096  # every layer's slots are whole pages
    n_slots = (int(share * model.nbytes) - none.total - page_loss) // sizes.stride
    if n_slots < MIN_SLOTS * d.n_layers:
        raise SystemExit(
            f"{share:.0%} of {format_size(model.nbytes)} leaves no room: {format_size(none.total)} is fixed"
        )
    curves = []
    for layer in range(d.n_layers):
        statistics = model.statistics(layer)
        if statistics is not None:
            curves.append(expected_misses(statistics["aggregated_window"], d.ffn.d_ff))
    capacities = share_slots(n_slots, d.ffn.d_ff, curves, n_layers=d.n_layers, minimum=MIN_SLOTS)
    return capacities, held_bytes(model, plan, capacities, sizes)


def run_sparse(
    path: Path, text: TokenText, windows: Sequence[TextWindow], share: float
) -> tuple[list[Score], dict[str, Any]]:
    """Token by token in sparse mode within a share of the file's bytes; scores, and what it took."""
    sparse = SparseOptions(parse_selector("file"))
    with Engine(path, EngineOptions(memory=PLENTY, sparse=sparse)) as engine:
        plan, model = cast(SparsePlan, engine.plan), engine.model
        capacities, held = within(model, plan, share)
        engine.plan = replace(plan, capacities=tuple(capacities), slots=held.slots)
        engine.load()
        if engine.sparse is None:
            raise RuntimeError("not in sparse mode")
        scores = score_windows(ByTokens(engine, 1), text.token_ids, windows)
        totals, d = engine.sparse.totals, model.decoder
        bundle_nbytes = sum(info.geometry.stride * info.geometry.n_neurons for info in model.layers)
        figures = {
            "held_bytes": {**{name: getattr(held, name) for name in held.__slots__}, "total": held.total},
            "slots": capacities,
            "slot_share": sum(capacities) / (d.n_layers * d.ffn.d_ff),
            "window_hit_rate": totals.hit_rate,
            "predicted_share": totals.total("n_active") / (totals.n_tokens * d.n_layers * d.ffn.d_ff),
            "flash_bytes_per_token": totals.total("bytes_read") / totals.n_tokens,
            "flash_requests_per_token": totals.total("n_requests") / totals.n_tokens,
            "ffn_bytes": bundle_nbytes,
        }
        return scores, figures


def report(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    exact_path, path, text, calibration = prepare(options)
    windows = windows_to_score(path, text, options.measure)
    exact = score_exact(exact_path, text, windows)
    resident = score_exact(path, text, windows)
    sparse, figures = run_sparse(path, text, windows, options.share)
    with flashfmt.open(path) as model:
        predictors = [msgspec.to_builtins(p) for p in model.manifest.predictors]
        nbytes, name = model.nbytes, model.manifest.name
    pairs = PairedScores(tuple(exact), tuple(sparse))
    losses = [s.nats / s.n_tokens - e.nats / e.n_tokens for e, s in zip(exact, sparse, strict=True)]
    return {
        "model": name,
        "checkpoint_sha256": hashlib.sha256((options.model / "model.safetensors").read_bytes()).hexdigest(),
        "file_bytes": nbytes,
        "float16_file_bytes": exact_path.stat().st_size,
        "residents_encoding": options.residents,
        "held_share": figures["held_bytes"]["total"] / nbytes,
        **figures,
        "text": text.name,
        "n_tokens": sum(score.n_tokens for score in exact),
        "perplexity_float16_exact": pairs.exact_perplexity,
        "perplexity_exact": PairedScores(tuple(exact), tuple(resident)).predicted_perplexity,
        "perplexity_sparse": pairs.predicted_perplexity,
        "loss": pairs.ratio - 1,
        "loss_standard_error": float(np.std(losses, ddof=1) / math.sqrt(len(losses))),
        "target": options.target,
        "predictors": predictors,
        "calibration_seconds": None if calibration is None else calibration.seconds,
        "machine": describe_machine(options.cache),
    }


def print_report(found: dict[str, Any]) -> None:
    """The figures for people."""
    held, nbytes = found["held_bytes"], found["file_bytes"]
    measured = [p["measured"] for p in found["predictors"]]
    ranks = ", ".join(sorted({str(p["rank"]) for p in found["predictors"]}))

    def line(what: str, value: str) -> None:
        print(f"{what:<44}{value:>14}")

    print(f"{found['model']}: {found['n_tokens']} held-out tokens of {found['text']}")
    line("file", format_size(nbytes))
    notes = {"residents": f" ({found['residents_encoding']})", "predictors": f" (rank {ranks})"}
    for part in ("residents", "predictors", "checksums", "slots"):
        line(f"  held: {part}{notes.get(part, '')}", format_size(held[part]))
    line("  held of the model", format_size(held["total"]))
    line("  as a share of the file", f"{found['held_share']:.1%}")
    line("neurons that there are slots for", f"{found['slot_share']:.1%}")
    line("perplexity, float16, every neuron", f"{found['perplexity_float16_exact']:.4f}")
    line("perplexity, file as it is, every neuron", f"{found['perplexity_exact']:.4f}")
    line("perplexity, sparse", f"{found['perplexity_sparse']:.4f}")
    line("loss (standard error)", f"{found['loss']:+.2%} ({found['loss_standard_error']:.2%})")
    line("neurons predicted for a token", f"{found['predicted_share']:.1%}")
    for name in ("recall", "precision"):
        line(f"{name}, mean of layers, by the calibration", f"{np.mean([m[name] for m in measured]):.3f}")
    line("found in the window", f"{found['window_hit_rate']:.1%}")
    line("read from flash for a token", format_size(found["flash_bytes_per_token"]))
    line("  as a share of the FFN", f"{found['flash_bytes_per_token'] / found['ffn_bytes']:.1%}")
    print("Memory is what is held of the model. Interpreter, kernels, KV cache and buffers are not in it.")


def main(arguments: list[str] | None = None) -> int:
    """Prepare, measure and print; returns 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, help="UTF-8 text that the model was not trained on")
    source.add_argument("--tokens", type=Path, help="the same as token ids, .npy")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "relu-opt-6m", help="checkpoint [%(default)s]")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "sparse-report", help="[%(default)s]")
    parser.add_argument("--residents", default="q8", help="encoding of resident matrices [%(default)s]")
    parser.add_argument("--rank", type=int, default=32, help="of predictors [%(default)s]")
    parser.add_argument("--target", type=float, default=0.008, help="loss to calibrate for [%(default)s]")
    parser.add_argument("--share", type=float, default=0.5, help="of the file's bytes to hold at most [%(default)s]")
    parser.add_argument("--loss", type=float, default=0.01, help="loss of perplexity allowed [%(default)s]")
    parser.add_argument("--measure", type=int, default=8192, help="tokens to score at most [%(default)s]")
    parser.add_argument("--text-tokens", type=int, default=100_000, help="tokens of text to use [%(default)s]")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--verbose", action="store_true", help="say on stderr what the calibration does")
    found = report(options := parser.parse_args(arguments))
    print_report(found)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["held_share"] <= options.share and found["loss"] <= options.loss else 1


def _say(what: str, done: int, total: int) -> None:
    if done == total:
        print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
