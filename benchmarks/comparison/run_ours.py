"""Decodes with the reference engine and reports what each token took: ``python -m comparison.run_ours SPEC``.

SPEC is JSON: `mode`, `path`, `memory` (bytes or null), `tokens`.

exact, sparse          the engine as it is; sparse computes the file's predictors, and takes drawn activity instead
exact-mmap             every neuron, computed where the file is mapped: the page cache decides what stays
sparse-mmap            sparse, bundles copied out of a map of the file in the place of direct reads
naive                  every weight read for every token by direct reads, in order, nothing kept or overlapped
compile                nothing: kernels are compiled for this model, and kept for the runs to come
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

import flashfmt
from comparison.token_clock import report, time_tokens
from flashfmt import FlashModel
from reference_engine.backends import Backend, load_backend
from reference_engine.bench.activity import PUBLISHED, SyntheticActivity, fit
from reference_engine.bench.naive import NaiveModel
from reference_engine.bench.replay import replaying
from reference_engine.bundle_blocks import split_layer
from reference_engine.engine import Engine, EngineOptions
from reference_engine.flash_io import open_reader
from reference_engine.kv_cache import KvCache
from reference_engine.models.decoder_stack import DecoderStack
from reference_engine.models.weights import F32, BundleBlock, WithoutLookAhead
from reference_engine.residents import (
    EMBEDDING,
    ResidentTable,
    flash_table,
    load_residents,
    multiplied_encodings,
)
from reference_engine.selectors import parse_selector
from reference_engine.sparse_mode import SparseOptions
from reference_engine.telemetry import FIGURES

LEAST_CONTEXT: Final = 128
Feed = Callable[[int], object]


class MappedBundles(WithoutLookAhead):
    """`BundleSource` of all neurons, in a private map of the file."""

    def __init__(self, model: FlashModel) -> None:
        self._layers = [(info, split_layer(info)) for info in model.layers]
        self._rows = [
            np.memmap(
                info.extent.path,
                np.uint8,
                "c",  # writable, as the kernels take arrays; nothing writes
                info.extent.offset,
                (info.geometry.n_neurons, info.geometry.stride),
            )
            for info in model.layers
        ]

    def whole(self, layer: int) -> np.ndarray:
        """All bundles of a layer."""
        return self._rows[layer].view(np.ndarray)

    def blocks(self, layer: int, x: F32) -> Iterator[BundleBlock]:
        """Blocks of a layer in neuron order."""
        rows = self._rows[layer].view(np.ndarray)
        for block in self._layers[layer][1]:
            neurons = slice(block.first, block.first + block.n_neurons)
            yield BundleBlock(neurons, rows[neurons])


def compiled_for(model: FlashModel) -> Backend:
    """A backend with its kernels for the encodings of a model."""
    backend = load_backend("auto", None)
    backend.prepare(multiplied_encodings(model))
    return backend


@contextmanager
def mapped(path: Path, context: int) -> Iterator[tuple[Feed, int, Callable[[], dict[str, Any]]]]:
    """Decoding with residents in DRAM and bundles in a map."""
    with flashfmt.open(path) as model:
        backend = compiled_for(model)
        residents = load_residents(model, verify=False)
        table = flash_table(model, backend) or ResidentTable(residents.matrix(EMBEDDING), backend)
        stack = DecoderStack(
            decoder=model.decoder,
            residents=residents,
            layers=model.layers,
            tokens=table,
            bundles=MappedBundles(model),
            backend=backend,
        )
        kv_cache = KvCache(model.decoder, context, "f16")
        yield lambda token: stack.logits(stack.forward(np.array([token]), kv_cache)), model.decoder.vocab_size, dict


@contextmanager
def engine(path: Path, options: EngineOptions) -> Iterator[tuple[Feed, int, Callable[[], dict[str, Any]]]]:
    """Decoding with the engine; what the last function returns goes into the report."""
    with Engine(path, options) as loaded:
        loaded.load()
        session = loaded.start()

        def details() -> dict[str, Any]:
            found: dict[str, Any] = {"plan": loaded.plan.as_dict()}
            found["plan"].pop("capacities", None)
            if loaded.sparse is not None:
                totals = loaded.sparse.decode_totals
                found["sparse_per_token"] = {name: totals.total(name) / totals.n_passes for name in FIGURES}
                found["hit_rate"] = totals.hit_rate
            if loaded.exact is not None:
                found["wait_seconds"] = loaded.exact.counters.wait_seconds
                found["compute_seconds"] = loaded.exact.compute_seconds
            return found

        yield lambda token: session.feed([token]), loaded.vocab_size, details


@contextmanager
def naive(path: Path, options: EngineOptions) -> Iterator[tuple[Feed, int, Callable[[], dict[str, Any]]]]:
    """Decoding that keeps nothing."""
    with flashfmt.open(path) as model:
        vocab_size = model.decoder.vocab_size
    loaded = NaiveModel(path, options, open_reader)
    try:
        yield lambda token: loaded.feed([token]), vocab_size, dict
    finally:
        loaded.close()


def sparse_options(path: Path, n_tokens: int, *, by_mmap: bool) -> SparseOptions:
    """The file's predictors, replaced by activity with the statistics published for OPT-6.7B once they are computed."""
    with flashfmt.open(path) as model:
        decoder, has_predictors = model.decoder, bool(model.manifest.predictors)
    activity = SyntheticActivity(fit(PUBLISHED), decoder.n_layers, decoder.ffn.d_ff, n_tokens)
    return SparseOptions(
        parse_selector("file" if has_predictors else "all"),
        substitute=replaying(activity),
        open_reader=(lambda file: open_reader(file, backend="mmap")) if by_mmap else None,
    )


def main() -> int:
    """Decode and report."""
    spec = json.loads(sys.argv[1])
    path, mode, n_tokens = Path(spec["path"]), spec["mode"], spec["tokens"]
    if mode == "compile":
        with flashfmt.open(path) as model:
            compiled_for(model)
        report({})
        return 0
    context = max(LEAST_CONTEXT, n_tokens)
    sparse = sparse_options(path, n_tokens, by_mmap=mode == "sparse-mmap") if mode.startswith("sparse") else None
    options = EngineOptions(
        memory=spec["memory"],
        context_tokens=context,
        kv_type="f16",
        verify="never" if mode == "naive" else "first",
        sparse=sparse,
    )
    match mode:
        case "exact-mmap":
            running = mapped(path, context)
        case "naive":
            running = naive(path, options)
        case _:
            running = engine(path, options)
    with running as (feed, vocab_size, details):
        figures = time_tokens(feed, n_tokens, vocab_size)
        report(figures | details())
    return 0


if __name__ == "__main__":
    sys.exit(main())
