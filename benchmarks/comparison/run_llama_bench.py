"""Runs llama.cpp's llama-bench and reports what each token took: ``python -m comparison.run_llama_bench SPEC``.

SPEC is JSON: `path` of a GGUF file, `program` (llama-bench), `repack` (0 or 1), `threads`, `tokens`. Each repetition of
llama-bench is one token in an empty context, so its samples are times of single tokens, the first one cold. The lines
that it writes between repetitions say when to look at how much the process has read.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

from comparison.token_clock import device_bytes_read, report


def command(spec: dict[str, Any]) -> list[str]:
    """llama-bench's command line."""
    options = {
        "-m": spec["path"],
        "-p": 0,
        "-n": 1,
        "-r": spec["tokens"],
        "-t": spec["threads"],
        "-ngl": 0,
        "-lm": "mmap",
        "--repack": spec["repack"],
        "-o": "json",
    }
    return [spec["program"], *(str(part) for pair in options.items() for part in pair), "--no-warmup", "--progress"]


def main() -> int:
    """Run and report."""
    spec = json.loads(sys.argv[1])
    process = subprocess.Popen(command(spec), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if process.stdout is None or process.stderr is None:
        raise OSError("no pipes to llama-bench")
    began_at, bytes_read, messages = [], [], []
    for line in process.stderr:
        if "generation run" in line:
            began_at.append(time.time())
            bytes_read.append(device_bytes_read(process.pid))
        else:
            messages.append(line)
    output = process.stdout.read()
    if process.wait() != 0:
        sys.stderr.write("".join(messages[-5:]))
        return 128 - process.returncode if process.returncode < 0 else process.returncode
    (result,) = json.loads(output)
    seconds = [nanoseconds / 1e9 for nanoseconds in result["samples_ns"]]
    report(
        {
            "seconds": seconds,
            "bytes_read": bytes_read[1:],  # at the end of each token but the last
            "first_token_at": began_at[0] + seconds[0],
            "versions": {"llama.cpp": f"{result['build_number']} ({result['build_commit']})"},
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
