"""Train the small OPT-style ReLU decoder that flashfmt embeds, on CPU, inside a time budget.

Knows the optimisers, the schedule and how activations are made sparse. Takes its text from `text_corpus.py` and its
model from `relu_decoder.py`; `measure_relu_opt.py` measures the result.

Run as `python tools/train_relu_opt.py CORPUS RUN --minutes 60`; RUN receives `state.pt` every few minutes and
`log.jsonl`. `--resume` goes on from `state.pt` with what is left of the budget, if anything. `--export FOLDER` writes
the checkpoint at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from relu_decoder import Decoder, Shape, export
from text_corpus import END_OF_TEXT
from torch import Tensor, nn

LONGEST_STEP_S = 10.0


@dataclass(frozen=True)
class Recipe:
    """What the run depends on besides the text and the time.

    Parameters
    ----------
    batch_windows
        Windows of `n_context` tokens in a step.
    matrix_rate, other_rate
        Peak learning rates of Muon (matrices of the blocks) and AdamW (embeddings, norms, biases).
    warmup_steps, constant_share
        The rates rise linearly over the first, stay until the second share of the budget, then fall linearly to zero.
    sparse_from, sparse_until
        Shares of the budget between which the wanted share of active neurons falls (geometrically).
    start_active, final_active
        The wanted share of active neurons at these two times.
    penalty_gain
        Step of the penalty's logarithm for each unit of the logarithm of actual by wanted share.
    """

    seed: int = 20
    batch_windows: int = 8
    matrix_rate: float = 0.02
    other_rate: float = 1.5e-3
    matrix_decay: float = 0.01
    warmup_steps: int = 60
    constant_share: float = 0.4
    sparse_from: float = 0.15
    sparse_until: float = 0.7
    start_active: float = 0.3
    final_active: float = 0.065
    penalty_gain: float = 0.05
    smallest_penalty: float = 0.1
    max_gradient_norm: float = 1.0

    def rate_scale(self, step: int, progress: float) -> float:
        """Factor on the peak learning rates at `step`, after the share `progress` of the budget."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return warm * min(1.0, max(0.0, (1 - progress) / (1 - self.constant_share)))

    def wanted_active(self, progress: float) -> float:
        """Share of active neurons aimed at after the share `progress` of the budget."""
        way = min(1.0, max(0.0, (progress - self.sparse_from) / (self.sparse_until - self.sparse_from)))
        return self.start_active * float((self.final_active / self.start_active) ** way)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz iterations (Jordan et al., 2024).

    For matrices only. `splits` of a group says how many matrices are stacked in each parameter: queries, keys and
    values are orthogonalised apart.
    """

    def __init__(self, groups: list[dict[str, Any]], rate: float, momentum: float = 0.95, decay: float = 0.0) -> None:
        super().__init__(groups, {"lr": rate, "momentum": momentum, "decay": decay, "splits": 1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter in place from its gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["average"] = torch.zeros_like(parameter)
                state["average"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(state["average"], group["momentum"])
                parts = update.chunk(group["splits"])
                n_rows, n_cols = parts[0].shape
                orthogonal = torch.cat([orthogonalise(part) for part in parts])
                parameter.mul_(1 - group["lr"] * group["decay"])
                parameter.add_(orthogonal, alpha=-group["lr"] * math.sqrt(max(1.0, n_rows / n_cols)))


def orthogonalise(matrix: Tensor, n_iterations: int = 5) -> Tensor:
    """Approximate `U @ V.T` of the matrix's singular value decomposition; float32, same shape."""
    x: Tensor = matrix.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(n_iterations):  # quintic coefficients of Muon
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T.float() if tall else x.float()


def make_optimisers(model: Decoder, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    stacked, single, rest = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or not name.startswith("blocks."):
            rest.append(parameter)
        elif name.endswith("qkv.weight"):
            stacked.append(parameter)
        else:
            single.append(parameter)
    muon = Muon(
        [{"params": stacked, "splits": 3}, {"params": single}], rate=recipe.matrix_rate, decay=recipe.matrix_decay
    )
    adam = torch.optim.AdamW(rest, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [muon, adam]


def windows(stream: np.ndarray, n_context: int, n_windows: int, seed: int, skip: int) -> Iterator[Tensor]:
    """Batches int64 `[n_windows, n_context + 1]` without end: each epoch is a shuffled tiling at a random offset.

    The first `skip` batches are left out, so that a resumed run sees what it would have seen.
    """
    epoch = 0
    while True:
        order = np.random.default_rng((seed, epoch))
        begin = int(order.integers(n_context))
        starts = order.permutation(np.arange(begin, len(stream) - n_context - 1, n_context))
        for i in range(0, len(starts) - n_windows + 1, n_windows):
            if skip:
                skip -= 1
                continue
            picked = np.stack([stream[start : start + n_context + 1] for start in starts[i : i + n_windows]])
            yield torch.from_numpy(picked.astype(np.int64))
        epoch += 1


def forward(model: Decoder, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy in nats, mean activation (the penalised quantity) and active share of each layer."""
    with torch.autocast("cpu", torch.bfloat16):
        logits, activations = model(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        activation = torch.stack([active.float().mean() for active in activations]).mean()
    shares = torch.stack([(active.detach() > 0).float().mean() for active in activations])
    return loss, activation, shares


@torch.no_grad()
def held_out_loss(model: Decoder, stream: np.ndarray, n_windows: int = 48) -> float:
    """Nats per token over `n_windows` windows spread evenly over the held-out stream."""
    n_context = model.shape.n_context
    starts = np.linspace(0, len(stream) - n_context - 1, n_windows).astype(int)
    losses = []
    for chunk in np.split(starts, n_windows // 8):
        batch = torch.from_numpy(np.stack([stream[s : s + n_context + 1] for s in chunk]).astype(np.int64))
        losses.append(forward(model, batch)[0].item())
    return float(np.mean(losses))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the training state beside `path` and rename it there."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def train(
    corpus: Path,
    run: Path,
    shape: Shape,
    recipe: Recipe,
    minutes: float,
    *,
    state: dict[str, Any] | None = None,
    state_minutes: float = 8.0,
) -> Decoder:
    """Train for `minutes` of running time and return the trained model.

    A step counts for ten seconds at most, so a stopped process does not use up its budget.

    Parameters
    ----------
    corpus, run
        Folder that `text_corpus.py` wrote; existing folder for `state.pt` and `log.jsonl`.
    state
        A saved training state to go on from; the time it has already run counts towards `minutes`.
    state_minutes
        Running time between two states.
    """
    torch.manual_seed(recipe.seed)
    stream, held_out = np.load(corpus / "train.npy"), np.load(corpus / "held_out.npy")
    model = Decoder(shape)
    optimisers = make_optimisers(model, recipe)
    peaks = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]
    step, elapsed_s, penalty = 0, 0.0, recipe.smallest_penalty
    if state is not None:
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        step, elapsed_s, penalty = state["step"], state["elapsed_s"], state["penalty"]

    compiled = torch.compile(forward)
    budget_s = minutes * 60
    next_log_s, next_state_s = elapsed_s, elapsed_s + state_minutes * 60
    smooth_loss = smooth_share = math.nan
    batches = windows(stream, shape.n_context, recipe.batch_windows, recipe.seed, skip=step)
    before = time.monotonic()
    while elapsed_s < budget_s:
        progress = elapsed_s / budget_s
        scale = recipe.rate_scale(step, progress)
        for optimiser, rates in zip(optimisers, peaks, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * scale
        loss, activation, shares = compiled(model, next(batches))
        torch.autograd.backward(loss + penalty * activation)
        nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        share = shares.mean().item()
        smooth_loss = loss.item() if math.isnan(smooth_loss) else 0.97 * smooth_loss + 0.03 * loss.item()
        smooth_share = share if math.isnan(smooth_share) else 0.9 * smooth_share + 0.1 * share
        if progress >= recipe.sparse_from:
            excess = max(-1.0, min(1.0, math.log(smooth_share / recipe.wanted_active(progress))))
            penalty = max(recipe.smallest_penalty, penalty * math.exp(recipe.penalty_gain * excess))
        step += 1

        if elapsed_s >= next_log_s:
            next_log_s = elapsed_s + 90
            entry = {
                "seconds": round(elapsed_s),
                "step": step,
                "tokens": step * recipe.batch_windows * shape.n_context,
                "train_nats": round(smooth_loss, 4),
                "held_out_nats": round(held_out_loss(model, held_out), 4),
                "active": [round(value, 4) for value in shares.tolist()],
                "penalty": round(penalty, 5),
            }
            print(json.dumps(entry), flush=True)
            with (run / "log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
        now = time.monotonic()
        elapsed_s += min(now - before, LONGEST_STEP_S)
        before = now
        if elapsed_s >= next_state_s or elapsed_s >= budget_s:
            next_state_s = elapsed_s + state_minutes * 60
            save_state(
                run / "state.pt",
                {
                    "shape": asdict(shape),
                    "model": model.state_dict(),
                    "optimisers": [optimiser.state_dict() for optimiser in optimisers],
                    "step": step,
                    "elapsed_s": elapsed_s,
                    "penalty": penalty,
                },
            )
    return model


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder that text_corpus.py wrote")
    parser.add_argument("run", type=Path, help="folder for the state and the log")
    parser.add_argument("--minutes", type=float, default=60.0, help="running time, over which the rates anneal")
    parser.add_argument("--resume", action="store_true", help="go on from the run's state, in its shape")
    parser.add_argument("--export", type=Path, help="write the trained checkpoint to this folder")
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--n-layers", type=int, default=6)
    parser.add_argument("--n-context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pid-file", type=Path, help="write this process's id there")
    arguments = parser.parse_args()

    if arguments.pid_file:
        arguments.pid_file.write_text(f"{os.getpid()}\n")
    torch.set_num_threads(arguments.threads)
    vocab_size = json.loads((arguments.corpus / "corpus.json").read_text())["vocab_size"]
    arguments.run.mkdir(parents=True, exist_ok=True)
    state = None
    shape = Shape(vocab_size, arguments.d_model, arguments.n_layers, 4 * arguments.d_model, arguments.n_context)
    if arguments.resume:
        state = torch.load(arguments.run / "state.pt", weights_only=True)
        shape = Shape(**state["shape"])
    model = train(arguments.corpus, arguments.run, shape, Recipe(), arguments.minutes, state=state)
    if arguments.export:
        export(model, arguments.corpus / "tokenizer.json", arguments.export, END_OF_TEXT)


if __name__ == "__main__":
    main()
