"""Conversion against copying: a float16 checkpoint in the shapes of OPT-1.3B (2.6 GB), both forced to the device.

    python benchmarks/convert.py [--runs 3] [--folder DIR] [--json]

Each run copies the checkpoint and converts it, in turn, from a page cache in the same state. `ratio` is the copy's time
over the conversion's: 1 means that converting costs what copying costs. The peak memory of converting is that of a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from reference_engine.bench.machine_description import describe_machine

CONFIG: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": 50272,
    "hidden_size": 2048,
    "word_embed_proj_dim": 2048,
    "ffn_dim": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "dtype": "float16",
}
CONVERT = """
import json, sys, time
from flashfmt.convert import convert
from reference_engine.bench.machine_description import describe_machine
from reference_engine.machine import peak_resident_nbytes
started = time.perf_counter()
convert(sys.argv[1], sys.argv[2], overwrite=True)
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "peak_bytes": peak_resident_nbytes()}))
"""
COPY_BYTES = 16 << 20


def tensors() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint."""
    d, ff, vocab = CONFIG["hidden_size"], CONFIG["ffn_dim"], CONFIG["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.decoder.embed_tokens.weight": (vocab, d),
        "model.decoder.embed_positions.weight": (2050, d),
        "model.decoder.final_layer_norm.weight": (d,),
        "model.decoder.final_layer_norm.bias": (d,),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.decoder.layers.{layer}"
        for name in ("q", "k", "v", "out"):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (d, d)
            shapes[f"{prefix}.self_attn.{name}_proj.bias"] = (d,)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes[f"{prefix}.{name}.weight"] = shapes[f"{prefix}.{name}.bias"] = (d,)
        shapes[f"{prefix}.fc1.weight"], shapes[f"{prefix}.fc1.bias"] = (ff, d), (ff,)
        shapes[f"{prefix}.fc2.weight"], shapes[f"{prefix}.fc2.bias"] = (d, ff), (d,)
    return shapes


def write_checkpoint(folder: Path) -> int:
    """Write config.json and model.safetensors of random weights; returns the bytes."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in tensors().items():
        nbytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    pool = (np.random.default_rng(0).standard_normal(1 << 22, np.float32) * 0.02).astype(np.float16).tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, offset, len(pool)):
            file.write(pool[: min(len(pool), offset - start)])
        file.flush()
        os.fsync(file.fileno())
    return offset


def copy(source: Path, target: Path) -> float:
    """Seconds to copy a file and force the copy to the device."""
    started = time.perf_counter()
    with source.open("rb") as reading, target.open("wb") as writing:
        shutil.copyfileobj(reading, writing, COPY_BYTES)
        writing.flush()
        os.fsync(writing.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def convert(source: Path, target: Path) -> dict[str, float]:
    """Seconds and peak memory of a conversion in a process of its own."""
    command = [sys.executable, "-c", CONVERT, str(source), str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    target.unlink()
    return dict(json.loads(result.stdout))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files go, 8 GB for a while [default: a temporary one]")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        nbytes = write_checkpoint(folder)
        runs = []
        for _ in range(arguments.runs):
            copied = copy(folder / "model.safetensors", folder / "copy.safetensors")
            converted = convert(folder, folder / "model.flash")
            runs.append(
                {"copy_seconds": copied, "convert_seconds": converted["seconds"], "peak_bytes": converted["peak_bytes"]}
            )
    report: dict[str, Any] = {
        "checkpoint_bytes": nbytes,
        "runs": runs,
        "ratio": statistics.median(run["copy_seconds"] / run["convert_seconds"] for run in runs),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "machine": describe_machine(arguments.folder or Path(tempfile.gettempdir())),
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    for run in runs:
        print(f"copy {run['copy_seconds']:6.2f} s   convert {run['convert_seconds']:6.2f} s")
    print(f"median ratio copy/convert {report['ratio']:.2f}, peak memory {report['peak_bytes'] / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
