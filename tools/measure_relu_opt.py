"""Measure the embedded ReLU checkpoint on held-out text: loss, active neurons, window growth, greedy samples.

Knows what `tools/README.md` reports of a checkpoint and how each figure is defined. Reads the checkpoint through
transformers, in float32 arithmetic from the float16 file, so that it measures what is shipped.

Run as `python tools/measure_relu_opt.py CORPUS CHECKPOINT`; prints JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

LARGEST_WINDOW = 32
PROMPTS = (
    "The President of the United States",
    "And the LORD said unto Moses,",
    "This function returns",
    "Climate: tropical;",
    "PATIENCE, n.",
)


@dataclass
class ActivityCounts:
    """Running sums over held-out text of one layer's active neurons.

    `in_window[k - 1]` sums, over the tokens that have k - 1 predecessors in their context, the neurons that are active
    for at least one of the last k tokens (s_agg of LLM in a flash, section 3.1, times the layer's width).
    """

    n_neurons: int
    ever: Tensor
    in_window: np.ndarray
    n_tokens: np.ndarray

    @classmethod
    def empty(cls, n_neurons: int) -> ActivityCounts:
        """Counts before the first token."""
        zeros = np.zeros(LARGEST_WINDOW, dtype=np.int64)
        return cls(n_neurons, torch.zeros(n_neurons, dtype=torch.bool), zeros, zeros.copy())

    def add(self, active: Tensor) -> None:
        """Add one context: bool `[n_tokens, n_neurons]`."""
        self.ever |= active.any(dim=0)
        union = active
        for k in range(1, LARGEST_WINDOW + 1):
            if k > 1:
                union = union[1:] | active[: len(active) - k + 1]
            self.in_window[k - 1] += int(union.sum())
            self.n_tokens[k - 1] += len(union)

    @property
    def window_shares(self) -> np.ndarray:
        """s_agg(k) for k = 1 to `LARGEST_WINDOW`, as shares of the layer, float64."""
        return np.asarray(self.in_window / (self.n_tokens * self.n_neurons))


@torch.no_grad()
def measure_text(model: Any, stream: np.ndarray, n_bytes: int) -> dict[str, Any]:
    """Loss and activity over the whole stream in contexts that do not overlap.

    Parameters
    ----------
    model
        An `OPTForCausalLM`.
    stream
        Token ids, uint16 `[n_tokens]`, each document preceded by the end-of-text token.
    n_bytes
        UTF-8 bytes of the same text; bits per byte charge the end-of-text tokens to them too.
    """
    n_context = model.config.max_position_embeddings
    layers = model.model.decoder.layers
    counts = [ActivityCounts.empty(layer.fc1.out_features) for layer in layers]

    def count(layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            counts[layer].add(output.reshape(-1, output.shape[-1]) > 0)

        return hook

    handles = [layer.fc1.register_forward_hook(count(i)) for i, layer in enumerate(layers)]
    total_nats, n_scored = 0.0, 0
    for begin in range(0, len(stream) - 1, n_context):
        ids = torch.from_numpy(stream[begin : begin + n_context + 1].astype(np.int64))
        logits = model(ids[None, :-1]).logits[0]
        total_nats += F.cross_entropy(logits, ids[1:], reduction="sum").item()
        n_scored += len(ids) - 1
    for handle in handles:
        handle.remove()

    nats = total_nats / n_scored
    return {
        "tokens_scored": n_scored,
        "nats_per_token": round(nats, 4),
        "perplexity": round(math.exp(nats), 2),
        "bits_per_byte": round(nats * len(stream) / n_bytes / math.log(2), 4),
        "active_by_layer": [round(float(layer.window_shares[0]), 4) for layer in counts],
        "active": round(float(np.mean([layer.window_shares[0] for layer in counts])), 4),
        "never_active_by_layer": [int((~layer.ever).sum()) for layer in counts],
        "s_agg": [round(float(share), 4) for share in np.mean([layer.window_shares for layer in counts], axis=0)],
    }


@torch.no_grad()
def greedy_samples(folder: Path, model: Any, n_new_tokens: int = 48) -> dict[str, str]:
    """Greedy continuations of `PROMPTS`, each behind the end-of-text token that starts a document."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    samples = {}
    for prompt in PROMPTS:
        ids = [model.config.bos_token_id, *tokenizer.encode(prompt).ids]
        n_prompt = len(ids)
        for _ in range(n_new_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == model.config.eos_token_id:
                break
        samples[prompt] = tokenizer.decode(ids[n_prompt:])
    return samples


def main() -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder that text_corpus.py wrote")
    parser.add_argument("checkpoint", type=Path, help="folder that train_relu_opt.py exported")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    from transformers import OPTForCausalLM

    torch.set_num_threads(arguments.threads)
    model: Any = OPTForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    model.eval()
    held_out = json.loads((arguments.corpus / "corpus.json").read_text())["held_out"]
    figures = measure_text(model, np.load(arguments.corpus / "held_out.npy"), held_out["bytes"])
    figures["samples"] = greedy_samples(arguments.checkpoint, model)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
