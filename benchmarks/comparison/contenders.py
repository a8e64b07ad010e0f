"""Who is compared: the form of the model that each of them runs, and the command that runs it."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_GGUF_OF: Final = {"f16": "f16", "q8": "q8_0", "q4": "q4_0"}


@dataclass(frozen=True, slots=True)
class Tools:
    """What contenders need beside this repository: llama-bench, and a Python that has transformers and accelerate."""

    llama_bench: Path | None
    torch_python: Path


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to run a model.

    Attributes
    ----------
    name : such as ``ours-sparse`` or ``llama.cpp``.
    form : of the model, with the placeholders ``{encoding}``, ``{residents}`` and ``{gguf}``.
    module : the program that runs it, below `comparison`.
    options : what the program is told beside path, memory and tokens.
    text : one line for people.
    """

    name: str
    form: str
    module: str
    options: dict[str, Any]
    text: str

    @property
    def is_ours(self) -> bool:
        """Whether it is this repository's engine as it is meant to be used."""
        return self.name in ("ours", "ours-sparse", "ours-sparse-plain")

    def form_for(self, encoding: str, residents: str) -> str:
        """Name of the form in `ModelStore`, for bundles in `encoding` and resident matrices in `residents`."""
        return self.form.format(encoding=encoding, residents=residents, gguf=_GGUF_OF[encoding])

    def unavailable(self, tools: Tools) -> str | None:
        """Why it cannot run here; None if it can."""
        if self.module == "run_llama_bench" and (tools.llama_bench is None or not tools.llama_bench.is_file()):
            return "no llama-bench: give --llama-bench PATH"
        if self.module == "run_accelerate" and tools.torch_python == Path(sys.executable):
            missing = [n for n in ("torch", "transformers", "accelerate") if importlib.util.find_spec(n) is None]
            if missing:
                return f"not installed: {', '.join(missing)}; or give --torch-python PATH"
        return None

    def command(self, path: Path, memory: int | None, n_tokens: int, tools: Tools) -> list[str]:
        """Command line that runs the model at `path`, for `n_tokens` tokens."""
        spec = {"path": str(path), "memory": memory, "tokens": n_tokens, **self.options}
        python = Path(sys.executable)
        if self.module == "run_llama_bench":
            spec |= {"program": str(tools.llama_bench), "threads": len(os.sched_getaffinity(0))}
        elif self.module == "run_accelerate":
            python = tools.torch_python
        return [str(python), "-m", f"comparison.{self.module}", json.dumps(spec)]


CONTENDERS: Final[dict[str, Contender]] = {
    contender.name: contender
    for contender in (
        Contender("ours", "flash-{encoding}-{residents}", "run_ours", {"mode": "exact"}, "exact mode"),
        Contender(
            "ours-mmap",
            "flash-{encoding}-{residents}",
            "run_ours",
            {"mode": "exact-mmap"},
            "our kernels on a map of our file",
        ),
        Contender(
            "ours-sparse",
            "flash-{encoding}-{residents}",
            "run_ours",
            {"mode": "sparse"},
            "sparse mode, drawn activity, predictors computed",
        ),
        Contender(
            "ours-sparse-plain",
            "flash-{encoding}-{encoding}",
            "run_ours",
            {"mode": "sparse"},
            "the same with residents in the bundles' encoding",
        ),
        Contender(
            "ours-sparse-mmap",
            "flash-{encoding}-{residents}",
            "run_ours",
            {"mode": "sparse-mmap"},
            "sparse mode reading through a map",
        ),
        Contender(
            "naive",
            "flash-{encoding}-{encoding}",
            "run_ours",
            {"mode": "naive"},
            "all weights read for each token (direct reads, our kernels)",
        ),
        Contender(
            "accelerate", "hf", "run_accelerate", {}, "transformers with accelerate's disk offload, float16 checkpoint"
        ),
        Contender("llama.cpp", "gguf-{gguf}", "run_llama_bench", {"repack": 0}, "mmap, weights used where they lie"),
        Contender(
            "llama.cpp-repack",
            "gguf-{gguf}",
            "run_llama_bench",
            {"repack": 1},
            "mmap and repacking, its default",
        ),
    )
}
