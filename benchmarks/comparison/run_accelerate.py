"""Decodes with transformers and accelerate's disk offload: ``python -m comparison.run_accelerate SPEC``.

SPEC is JSON: `path` of a checkpoint, `memory` (bytes or null), `tokens`. As many decoder layers as the memory allows
stay in DRAM; accelerate does not see a cgroup's limit, so the share is worked out here. The others are read from the
checkpoint's safetensors file whenever they are due.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from comparison.token_clock import report, time_tokens

PROCESS_BYTES: Final = 700 << 20  # interpreter, torch and transformers, and what they need beside the weights
LAYERS_IN_FLIGHT: Final = 2


def device_map(config: Any, sizes: dict[str, int], memory: int | None) -> dict[str, str]:
    """Places of modules: everything in DRAM but the last decoder layers, as many as do not fit."""
    prefix = "model.decoder" if config.model_type == "opt" else "model"
    n_layers = config.num_hidden_layers
    layer_nbytes = sizes["layer"]
    n_held = n_layers
    if memory is not None:
        room = memory - PROCESS_BYTES - sizes["others"] - LAYERS_IN_FLIGHT * layer_nbytes
        n_held = max(0, min(n_layers, room // layer_nbytes))
    if config.model_type == "opt":
        others = [f"{prefix}.embed_tokens", f"{prefix}.embed_positions", f"{prefix}.final_layer_norm", "lm_head"]
    else:
        others = [f"{prefix}.embed_tokens", f"{prefix}.norm", f"{prefix}.rotary_emb", "lm_head"]
    places = dict.fromkeys(others, "cpu")
    for layer in range(n_layers):
        places[f"{prefix}.layers.{layer}"] = "cpu" if layer < n_held else "disk"
    return places


def checkpoint_sizes(folder: Path) -> dict[str, int]:
    """Bytes of one decoder layer and of everything else, from the header of the checkpoint's file."""
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    sizes = {"layer": 0, "others": 0}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            if ".layers.0." in name:
                sizes["layer"] += end - begin
            elif ".layers." not in name:
                sizes["others"] += end - begin
    return sizes


def main() -> int:
    """Decode and report."""
    spec = json.loads(sys.argv[1])
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_grad_enabled(False)
    folder = Path(spec["path"])
    config = transformers.AutoConfig.from_pretrained(folder)
    places = device_map(config, checkpoint_sizes(folder), spec["memory"])
    with tempfile.TemporaryDirectory() as offload:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float16, device_map=places, offload_folder=offload
        )
        model.eval()
        past: Any = None

        def feed(token: int) -> None:
            nonlocal past
            output = model(input_ids=torch.tensor([[token]]), past_key_values=past, use_cache=True)
            past = output.past_key_values

        figures = time_tokens(feed, spec["tokens"], config.vocab_size)
    figures["versions"] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": metadata.version("accelerate"),
    }
    figures["layers_on_disk"] = sum(place == "disk" for place in places.values())
    report(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
