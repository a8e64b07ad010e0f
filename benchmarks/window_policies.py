"""How far each rule of the neuron window is from the best: ``python benchmarks/window_policies.py [TRACE...]``.

The best possible is Belady's rule: with the whole future known, evict what is needed again last. It is no rule that an
engine could follow. A fairer mark is ``hindsight``: evict what is active least often in the whole trace, the future
included; where tokens are independent of each other, no rule that does not know the next tokens does better.
``learned`` asks what else a neuron's past could tell: evict by a logistic regression of "is active within the next
tokens" on activity counts at ten time scales and on the time since the last use, fitted to this very trace.

Traces are recorded with ``flashfmt run --trace`` (activity_trace). Without any, synthetic ones are made: every token,
`reuse` of the neurons of the token before stay active, the others are drawn from a Zipf distribution over a random
order of the neurons.

Two tables: misses at a share of the neurons for each rule, and each rule against the paper's window of k tokens in as
many slots as that window fills at its fullest. Misses are summed over layers; a layer gets at least as many slots as it
has active neurons at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reference_engine.activity_trace import read_header, read_trace
from reference_engine.neuron_window import DecayedFrequency, Ids, LeastRecent, NeuronWindow, RecentTokens

NEVER = np.iinfo(np.int64).max
SHARES = (0.12, 0.24, 0.4, 0.6)
KS = (1, 2, 4, 8, 16)
HALF_LIVES = (16, 64, 256)
SCALES = 2.0 ** np.arange(10)  # half-lives that `learned` sees
HORIZON = 16  # tokens within which `learned` expects a neuron back
FITTED_ROWS = 200_000
SYNTHETIC = (
    {"zipf": 0.3, "reuse": 0.5},
    {"zipf": 0.6, "reuse": 0.3},
    {"zipf": 0.9, "reuse": 0.5},
    {"zipf": 1.2, "reuse": 0.2},
)
Trace = list[Ids]
Floats = npt.NDArray[Any]
Rule = Callable[[int, int], NeuronWindow]


def _frequency(half_life: int) -> Rule:
    return lambda n_neurons, capacity: DecayedFrequency(n_neurons, capacity, half_life)


RULES: dict[str, Rule] = {"lru": LeastRecent, **{f"frequency:{h}": _frequency(h) for h in HALF_LIVES}}
NAMES = ("hindsight", "learned", *RULES)


def belady_misses(trace: Trace, n_neurons: int, capacity: int) -> int:
    """Fewest misses that any rule could have, with all active neurons held at each token."""
    next_uses: list[npt.NDArray[np.int64]] = []
    upcoming = np.full(n_neurons, NEVER)
    for token in range(len(trace) - 1, -1, -1):
        next_uses.append(upcoming[trace[token]])
        upcoming[trace[token]] = token
    held = np.zeros(n_neurons, np.bool_)
    next_use = np.full(n_neurons, NEVER)
    misses = 0
    for active, uses in zip(trace, reversed(next_uses), strict=True):
        misses += int(np.count_nonzero(~held[active]))
        next_use[active] = uses
        held[active] = False
        others = np.flatnonzero(held)
        n_leaving = len(others) + len(active) - capacity
        if n_leaving > 0:
            held[others[np.argpartition(-next_use[others], n_leaving - 1)[:n_leaving]]] = False
        held[active] = True
    return misses


def scored_misses(trace: Trace, n_neurons: int, capacity: int, score: Callable[[int], Floats]) -> int:
    """Misses when the neurons of the lowest score leave; `score` gives float [n_neurons] after a token."""
    held = np.zeros(n_neurons, np.bool_)
    misses = 0
    for token, active in enumerate(trace):
        misses += int(np.count_nonzero(~held[active]))
        held[active] = False
        others = np.flatnonzero(held)
        n_leaving = len(others) + len(active) - capacity
        if n_leaving > 0:
            held[others[np.argpartition(score(token)[others], n_leaving - 1)[:n_leaving]]] = False
        held[active] = True
    return misses


def hindsight_misses(trace: Trace, n_neurons: int, capacity: int) -> int:
    """Misses when the neurons that are active least often in the whole trace are evicted."""
    popularity = np.bincount(np.concatenate(trace), minlength=n_neurons).astype(np.float64)
    return scored_misses(trace, n_neurons, capacity, lambda _: popularity)


def history_features(trace: Trace, n_neurons: int) -> Floats:
    """What the past says of a neuron after each token, float32 [n_tokens, n_neurons, len(SCALES) + 2].

    Logarithms of its share of active tokens, weighted by each half-life, and of the tokens since its last use; one.
    """
    features = np.ones((len(trace), n_neurons, len(SCALES) + 2), np.float32)
    shares, last = np.zeros((n_neurons, len(SCALES))), np.full(n_neurons, -len(trace))
    decay = 0.5 ** (1 / SCALES)
    for token, active in enumerate(trace):
        shares *= decay
        shares[active] += 1 - decay
        last[active] = token
        features[token, :, : len(SCALES)] = np.log(shares / (1 - decay ** (token + 1)) + 1e-4)
        features[token, :, -2] = np.log1p(token - last)
    return features


def logistic_fit(x: Floats, y: Floats, n_steps: int = 15, ridge: float = 1e-4) -> Floats:
    """Weights of a logistic regression by Newton's method."""
    weights = np.zeros(x.shape[1])
    for _ in range(n_steps):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        gradient = x.T @ (p - y) / len(y) + ridge * weights
        curvature = x.T @ (x * (p * (1 - p))[:, None]) / len(y) + ridge * np.eye(len(weights))
        weights -= np.linalg.solve(curvature, gradient)
    return weights


def learned_scores(trace: Trace, n_neurons: int) -> Floats:
    """Log-odds that a neuron is active within `HORIZON` tokens, fitted to this trace: [n_tokens, n_neurons]."""
    features = history_features(trace, n_neurons)
    returns = np.zeros((len(trace), n_neurons), np.bool_)
    for token, active in enumerate(trace):
        returns[max(0, token - HORIZON) : token, active] = True
    chosen = np.random.default_rng(0).choice(returns.size, min(returns.size, FITTED_ROWS), replace=False)
    flat = features.reshape(-1, features.shape[2])
    scores: Floats = features @ logistic_fit(flat[chosen].astype(np.float64), returns.reshape(-1)[chosen])
    return scores


def learned_misses(trace: Trace, n_neurons: int, capacity: int) -> int:
    """Misses when the neurons that are least likely to be active soon are evicted, as far as the past can tell."""
    scores = learned_scores(trace, n_neurons)
    return scored_misses(trace, n_neurons, capacity, lambda token: scores[token])


def rule_misses(trace: Trace, window: NeuronWindow) -> int:
    """Misses of a rule."""
    return sum(len(window.step(active).missing) for active in trace)


def paper_window(trace: Trace, n_neurons: int, k: int) -> tuple[int, int]:
    """(misses, slots at its fullest) of the paper's rule."""
    window = RecentTokens(n_neurons, k)
    misses = peak = 0
    for active in trace:
        misses += len(window.step(active).missing)
        peak = max(peak, len(window.held()))
    return misses, peak


def synthetic_trace(n_neurons: int, n_tokens: int, *, active: float, zipf: float, reuse: float, seed: int) -> Trace:
    """Active sets of `active` * n_neurons neurons with a Zipf popularity and temporal reuse."""
    rng = np.random.default_rng(seed)
    popularity = 1.0 / np.arange(1, n_neurons + 1) ** zipf
    rng.shuffle(popularity)
    n_active = int(active * n_neurons)
    trace, previous = [], np.empty(0, np.int64)
    for _ in range(n_tokens):
        kept = previous[rng.random(len(previous)) < reuse]
        weights = popularity.copy()
        weights[kept] = 0
        new = rng.choice(n_neurons, n_active - len(kept), replace=False, p=weights / weights.sum())
        previous = np.sort(np.concatenate((kept, new)))
        trace.append(previous.astype(np.int32))
    return trace


def total_misses(layers: Sequence[Trace], n_neurons: int, capacities: Sequence[int]) -> dict[str, int]:
    """Misses of every rule, summed over layers."""
    pairs = list(zip(layers, capacities, strict=True))
    return {
        "belady": sum(belady_misses(trace, n_neurons, c) for trace, c in pairs),
        "hindsight": sum(hindsight_misses(trace, n_neurons, c) for trace, c in pairs),
        "learned": sum(learned_misses(trace, n_neurons, c) for trace, c in pairs),
        **{name: sum(rule_misses(trace, rule(n_neurons, c)) for trace, c in pairs) for name, rule in RULES.items()},
    }


def measure(layers: Sequence[Trace], n_neurons: int) -> dict[str, Any]:
    """Misses of every rule by share of slots, and in the room of the paper's rule by k."""
    by_share = []
    for share in SHARES:
        capacities = [max(int(share * n_neurons), *map(len, trace)) for trace in layers]
        misses = total_misses(layers, n_neurons, capacities)
        by_share.append({"share": share, "slots": sum(capacities), **misses})
    by_k = []
    for k in KS:
        papers = [paper_window(trace, n_neurons, k) for trace in layers]
        capacities = [peak for _, peak in papers]
        paper = sum(misses for misses, _ in papers)
        misses = total_misses(layers, n_neurons, capacities)
        by_k.append({"k": k, "slots": sum(capacities), "paper": paper, **misses})
    return {
        "n_layers": len(layers),
        "n_neurons": n_neurons,
        "n_tokens": len(layers[0]),
        "mean_active": float(np.mean([len(active) for trace in layers for active in trace])) / n_neurons,
        "by_share": by_share,
        "by_k": by_k,
    }


def print_result(name: str, result: dict[str, Any]) -> None:
    """Tables of ratios to the best possible."""
    print(
        f"\n{name}: {result['n_layers']} layers of {result['n_neurons']} neurons, {result['n_tokens']} passes, "
        f"{result['mean_active']:.1%} active. Misses over Belady's:"
    )
    print(f"{'slots':>12} {'Belady':>9}" + "".join(f"{rule:>15}" for rule in NAMES))
    for row in result["by_share"]:
        ratios = "".join(f"{row[rule] / row['belady']:15.3f}" for rule in NAMES)
        print(f"{row['share']:12.0%} {row['belady']:9d}{ratios}")
    print(f"{'as paper:k':>12} {'Belady':>9}" + "".join(f"{rule:>15}" for rule in ("paper", *NAMES)))
    for row in result["by_k"]:
        ratios = "".join(f"{row[rule] / row['belady']:15.3f}" for rule in ("paper", *NAMES))
        print(f"{row['k']:12d} {row['belady']:9d}{ratios}")


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", type=Path, help="recorded traces; synthetic ones where none is given")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--neurons", type=int, default=2048, help="of a synthetic layer [%(default)s]")
    parser.add_argument("--tokens", type=int, default=600, help="of a synthetic trace [%(default)s]")
    parser.add_argument("--active", type=float, default=0.07, help="share active in a synthetic trace [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic traces [%(default)s]")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    for path in options.traces:
        header, passes = read_header(path), list(read_trace(path))
        layers = [[recorded.active[layer] for recorded in passes] for layer in range(header.n_layers)]
        results[path.name] = measure(layers, header.n_neurons)
    for parameters in [] if options.traces else SYNTHETIC:
        name = f"synthetic zipf {parameters['zipf']} reuse {parameters['reuse']}"
        trace = synthetic_trace(options.neurons, options.tokens, active=options.active, seed=options.seed, **parameters)
        results[name] = measure([trace], options.neurons)
    for name, result in results.items():
        print_result(name, result)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
