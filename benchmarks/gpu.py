"""Builds, checks and times the CUDA backend in one command: ``python benchmarks/gpu.py``. Takes a few minutes on a GPU.

1. The tests marked ``gpu``: every kernel against float64 with fresh inputs and poisoned outputs, the engine against
   the CPU's, windows and second tier against the CPU's trace.
2. Kernels at the shapes of a 7B model, each checked against float64 again, timed against a device copy's bandwidth.
3. Decode at OPT-6.7B's shapes (random weights: f16 bundles, q8 residents) in half of the model's bytes of device
   memory, with an activity of 10 % of the neurons of which 2.4 % are new to the last tokens (LLM in a flash, section
   3.1); against naive loading, every byte of the model for every token, at the rate that exact mode streams at there.
4. Decode with everything resident, against torch with f16 weights in the same shapes.
5. Scattered bundles from flash to the device by page-locked memory and, with kvikio, straight to their slots; and
   decoding with the way that this speaks for and with the other.

Decoding is measured with and without CUDA graphs: `launch_gap_share` is what a token gains by them, and so what speaks
for or against capturing (`CupyBackend.uses_graphs`).

Writes JSON to benchmarks/results/. Exits with 1 if any result is wrong. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

try:
    import cupy
except ImportError:
    sys.exit("this needs CuPy and a GPU: install flashfmt[gpu] for CUDA 12, flashfmt[gpu-cuda13] for CUDA 13")

import flashfmt
from flashfmt.encodings import Encoding, decode, encode, part_layout
from flashfmt.manifest import Activation, InputTap
from reference_engine.backends import FfnShape, Matrix
from reference_engine.backends.cupy_backend import CupyBackend
from reference_engine.backends.cupy_device import CupyDevice, open_cuda_device
from reference_engine.backends.cupy_protocol import Device
from reference_engine.bench.machine_description import describe_machine
from reference_engine.device_bundles import DeviceBundles
from reference_engine.device_decoder import DeviceKvCache, DeviceResidents, DeviceStack
from reference_engine.device_direct import SlotReader, load_kvikio
from reference_engine.device_placement import DeviceOptions, DevicePlacement, tier_capacities
from reference_engine.engine import PREFILL_TOKENS, Engine, EngineOptions
from reference_engine.flash_io import open_reader
from reference_engine.neuron_window import parse_window
from reference_engine.residents import EMBEDDING, ResidentTable
from reference_engine.selectors import TappedSelector, Trace, parse_selector
from reference_engine.sparse_mode import SparseOptions
from reference_engine.sparse_plan import SparsePlan
from reference_engine.synthetic import SHAPES, Shape, write_synthetic

ROOT = Path(__file__).parents[1]
WIDTH, D_FF, N_ACTIVE = 4096, 16384, 1638
N_HEADS, N_POSITIONS = 32, 2048
COPY_BYTES, ROW_BYTES = 1 << 30, 16384
WORKING_SET_BYTES = 1 << 29  # well above any cache
UNIQUE_ROWS = 2048
CALLS = 24  # in a row, with other weights each
CONTEXT = 512
N_DECODE = 24
N_WARM = 12  # tokens that fill the slots
HELD_SHARE, ACTIVE_SHARE, NEW_SHARE = 0.24, 0.10, 0.024
IDENTITY, RELU, SILU = (Activation(kind=kind) for kind in ("identity", "relu", "silu"))
TOLERANCE = 2e-5

Figures = dict[str, Any]


class Checks:
    """Results that were compared with float64, and those that were wrong."""

    def __init__(self) -> None:
        self.worst: dict[str, float] = {}

    def compare(self, name: str, actual: Any, expected: Any) -> None:
        """Largest error relative to the largest value; what is not finite counts as infinite."""
        actual = cupy.asnumpy(actual)
        error = float(np.abs(actual - expected).max() / np.abs(expected).max())
        self.worst[name] = max(self.worst.get(name, 0.0), error if np.isfinite(error) else float("inf"))

    @property
    def wrong(self) -> list[str]:
        return [name for name, error in self.worst.items() if error > TOLERANCE]


def median_seconds(call: Callable[[], object], repeats: int = 15) -> float:
    """Median device time of a call by events, its launch included; two calls before the first that counts."""
    times = []
    for _ in range(repeats + 2):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end) / 1e3)
    return float(np.median(times[2:]))


def kernel_seconds(device: Device, call: Callable[[int], object]) -> float:
    """Median device time of ``call(i)``, from a graph of `CALLS` of them, as launching takes longer than a kernel."""

    def calls() -> None:
        for i in range(CALLS):
            call(i)

    calls()
    graph = device.capture(calls)
    return median_seconds(lambda: device.replay(graph), 9) / CALLS


def bandwidths(device: CupyDevice) -> Figures:
    """Bytes a second: a device copy counting bytes read and written, and copies from page-locked memory."""
    words = cupy.arange(COPY_BYTES // 8, dtype=np.int64)
    target = cupy.empty_like(words)
    copy = median_seconds(lambda: device.copy(target, words))
    host = device.pinned(COPY_BYTES // 4)
    host[:] = 7
    landing = device.empty((host.nbytes,), np.uint8)

    def upload() -> None:
        device.copy_in(landing, host)
        device.wait("compute", device.record("copy"))

    slots = cupy.asarray(np.random.default_rng(0).permutation(host.nbytes // ROW_BYTES).astype(np.int32))
    stride, rows = np.int64(ROW_BYTES), landing.reshape(-1, ROW_BYTES)

    def gather() -> None:
        arguments = (host.reshape(-1, ROW_BYTES), slots, rows, None, stride, stride)
        device.launch("move_rows", (len(rows), 1, 1), 128, *arguments, queue="compute")

    return {
        "device_copy": 2 * words.nbytes / copy,
        "upload": host.nbytes / median_seconds(upload, 10),
        "gather_from_host": host.nbytes / median_seconds(gather, 10),
    }


class EncodingBench:
    """Products and the FFN with stored rows of one encoding, for 1, 4 and 128 tokens.

    Attributes
    ----------
    results : microseconds, share of the copy bandwidth, and TFLOP/s, by name.
    """

    def __init__(self, backend: CupyBackend, encoding: Encoding, checks: Checks, ceiling: float) -> None:
        self._backend = backend
        self._encoding = encoding
        self._checks = checks
        self._ceiling = ceiling
        self._rng = np.random.default_rng()
        self._part = part_layout(encoding, WIDTH)
        unique = encode(self._rng.standard_normal((UNIQUE_ROWS, WIDTH), np.float32) / np.float32(64), encoding)
        self._weights = decode(unique, encoding, WIDTH).astype(np.float64)
        n_rows = max(WORKING_SET_BYTES // self._part.nbytes, 6 * D_FF)
        rows = cupy.asarray(unique).view(cupy.uint8).reshape(UNIQUE_ROWS, -1)
        self._pool = cupy.tile(rows, (n_rows // UNIQUE_ROWS, 1))  # row i holds the unique row i % UNIQUE_ROWS
        self.results: Figures = {}

    def run(self) -> None:
        """Measure everything."""
        for n_tokens in (1, 4, 128):
            x = self._rng.standard_normal((n_tokens, WIDTH)).astype(np.float32)
            self._matmul(x)
            self._ffn(x, ("up", "down"), RELU)
            self._ffn(x, ("gate", "up", "down"), SILU)

    def _matmul(self, x: Any) -> None:
        n_tokens, xd, storage = len(x), cupy.asarray(x), self._encoding.storage_dtype
        small = Matrix(self._encoding, UNIQUE_ROWS, WIDTH, self._pool[:UNIQUE_ROWS].view(storage))
        out = cupy.full((n_tokens, UNIQUE_ROWS), np.nan, np.float32)
        self._backend.matmul(small, xd, out)
        self._checks.compare(f"matmul {self._encoding} {n_tokens}", out, x @ self._weights.T)
        matrices = [
            Matrix(self._encoding, WIDTH, WIDTH, self._pool[first : first + WIDTH].view(storage))
            for first in range(0, len(self._pool) - WIDTH + 1, WIDTH)
        ]
        y = cupy.empty((n_tokens, WIDTH), np.float32)
        self._note(
            f"matmul {n_tokens}",
            WIDTH * self._part.nbytes,
            2.0 * n_tokens * WIDTH * WIDTH,
            lambda i: self._backend.matmul(matrices[i % len(matrices)], xd, y),
        )

    def _ffn(self, x: Any, parts: tuple[str, ...], function: Activation) -> None:
        n_parts, n_tokens, xd = len(parts), len(x), cupy.asarray(x)
        stride = n_parts * self._part.nbytes
        n_bundles = len(self._pool) // n_parts
        bundles = self._pool[: n_bundles * n_parts].reshape(n_bundles, stride)
        shape = FfnShape(self._encoding, parts, WIDTH, self._part, stride, function, IDENTITY)
        chosen = [np.sort(self._rng.permutation(n_bundles)[:N_ACTIVE]).astype(np.int32) for _ in range(CALLS)]
        slots = [cupy.asarray(ids) for ids in chosen]
        kind = "gated" if n_parts == 3 else "plain"

        out = cupy.zeros((n_tokens, WIDTH), np.float32)
        self._backend.ffn(shape, bundles, slots[0], xd, out)
        own = self._weights[(chosen[0][:, None] * n_parts + np.arange(n_parts)) % UNIQUE_ROWS]  # (n, parts, width)
        up, gate = x.astype(np.float64) @ own[:, -2].T, x.astype(np.float64) @ own[:, 0].T
        h = np.maximum(up, 0) if n_parts == 2 else gate / (1 + np.exp(-gate)) * up
        self._checks.compare(f"ffn {kind} {self._encoding} {n_tokens}", out, h @ own[:, -1])

        n_dense = D_FF * 2 // n_parts // 64 * 64
        runs = [bundles[first : first + n_dense] for first in range(0, n_bundles - n_dense + 1, n_dense)]
        for name, n, call in (
            ("sparse", N_ACTIVE, lambda i: self._backend.ffn(shape, bundles, slots[i], xd, out)),
            ("dense", n_dense, lambda i: self._backend.ffn(shape, runs[i % len(runs)], None, xd, out)),
        ):
            self._note(f"ffn {kind} {name} {n_tokens}", n * stride, 2.0 * n_tokens * n * n_parts * WIDTH, call)

    def _note(self, name: str, nbytes: int, flops: float, call: Callable[[int], object]) -> None:
        seconds = kernel_seconds(self._backend.device, call)
        self.results[name] = {
            "us": seconds * 1e6,
            "share_of_copy": nbytes / seconds / self._ceiling,
            "tflops": flops / seconds / 1e12,
        }


def measure_rest(backend: CupyBackend) -> Figures:
    """Microseconds of attention, norms, the selection of neurons."""
    rng = np.random.default_rng()
    cache = [cupy.asarray(rng.standard_normal((N_HEADS, N_POSITIONS, 128)).astype(np.float16)) for _ in range(2)]
    results = {}
    for n_tokens in (1, 128):
        q = cupy.asarray(rng.standard_normal((n_tokens, N_HEADS, 128)).astype(np.float32))
        seconds = kernel_seconds(
            backend.device,
            lambda _, a=q: backend.attend(a, *cache, n_past=N_POSITIONS - len(a), scale=0.09),  # type: ignore[misc]
        )
        results[f"attend {n_tokens} us"] = seconds * 1e6
    x = cupy.asarray(rng.standard_normal((1, WIDTH)).astype(np.float32))
    results["norm us"] = kernel_seconds(backend.device, lambda _: backend.rms_norm(x, x[0], 1e-5)) * 1e6
    scores = cupy.asarray(rng.standard_normal((1, D_FF)).astype(np.float32))
    began = time.perf_counter()
    for _ in range(100):
        backend.active_ids(scores, 1.28)
    results["active ids to the host us"] = (time.perf_counter() - began) * 1e4
    return results


def activity(n_neurons: int, n_tokens: int, seed: int) -> list[Any]:
    """Active sets of a layer for some tokens: a tenth of its neurons, 2.4 % outside of what the last tokens used."""
    rng = np.random.default_rng(seed)
    n_held, n_new = int(HELD_SHARE * n_neurons), int(NEW_SHARE * n_neurons)
    order = rng.permutation(n_neurons)  # the last used are at the front
    sets = []
    for _ in range(n_tokens):
        old = rng.permutation(n_held)[: int(ACTIVE_SHARE * n_neurons) - n_new]
        new = n_held + rng.permutation(n_neurons - n_held)[:n_new]
        picked = np.concatenate((old, new))
        active = order[picked]
        order = np.concatenate((active, np.delete(order, picked)))
        sets.append(np.sort(active).astype(np.int32))
    return sets


def decode_seconds(feed: Callable[[int], Any], n_warm: int) -> float:
    """Median seconds of a token, after `n_warm` of them; raises ArithmeticError where logits are not finite."""
    times = []
    for token in range(n_warm + N_DECODE):
        began = time.perf_counter()
        logits = feed(3 + token)
        times.append(time.perf_counter() - began)
        if not np.isfinite(logits).all():
            raise ArithmeticError(f"logits of token {token} are not finite")
    return float(np.median(times[n_warm:]))


def measure_sparse(path: Path, vram: int, host_memory: int, uses_graphs: bool, other_way: bool = False) -> Figures:
    """Decode with a made-up activity in `vram` bytes; `other_way` takes the slower way from flash to the device."""
    device = open_cuda_device()
    with flashfmt.open(path) as model:
        sparse = SparseOptions(parse_selector("all"), window=parse_window("lru"))
        options = DeviceOptions(
            vram=vram,
            host_memory=host_memory,
            memory=None,
            context_tokens=CONTEXT,
            prefill_tokens=PREFILL_TOKENS,
            kv_type="f16",
            verify="never",
            sparse=sparse,
            residents="stored",
        )
        placement = DevicePlacement(model, device, options)
        plan = placement.plan(0)
        if not isinstance(plan, SparsePlan):
            raise TypeError("a plan for a selector is a plan of slots")
        device.limit(plan.ceiling - placement.context_nbytes)
        backend, decoder = placement.backend, model.decoder
        backend.uses_graphs = uses_graphs
        way = placement.way
        if way is None:
            raise TypeError("sparse mode has a way from flash to the device")
        takes_direct = (way.open_direct is not None) != other_way
        residents = DeviceResidents(model, backend, verify=False)
        n_layers, n_neurons = decoder.n_layers, decoder.ffn.d_ff
        traces = [Trace(activity(n_neurons, N_WARM + N_DECODE, layer)) for layer in range(n_layers)]
        bundles = DeviceBundles(
            model,
            device,
            selectors=[TappedSelector(InputTap(layer=layer), trace) for layer, trace in enumerate(traces)],
            windows=[sparse.window.build(n_neurons, capacity) for capacity in plan.capacities],
            capacities=plan.capacities,
            tier_capacities=tier_capacities(model, host_memory),
            open_reader=open_reader,
            open_direct=partial(SlotReader, load_kvikio()) if takes_direct else None,
            verify="never",
        )
        tokens = ResidentTable(residents.matrix(EMBEDDING), backend)
        stack = DeviceStack(
            decoder=decoder, residents=residents, layers=model.layers, tokens=tokens, bundles=bundles, backend=backend
        )
        kv_cache = DeviceKvCache(decoder, CONTEXT, "f16", backend)
        seconds = decode_seconds(lambda token: stack.logits(stack.forward(np.array([token]), kv_cache)), N_WARM)
        totals, n_passes = bundles.totals, bundles.totals.n_passes
        free, total = device.memory()
        bundles.close()
        return {
            "ms_per_token": seconds * 1e3,
            "plan": plan.as_dict(),
            "context_bytes": placement.context_nbytes,
            "way": "direct" if takes_direct else "landing",
            "way_chosen": way.as_dict(),
            "held_share": plan.held_share,
            "hit_rate": totals.hit_rate,
            "from_tier": bundles.n_from_tier,
            "device_memory_in_use": total - free,
            "ms_per_token_by_stage": {
                name: totals.total(name) / n_passes * 1e3
                for name in ("select_seconds", "wait_seconds", "upkeep_seconds", "check_seconds")
            },
            "read_bytes_per_token": totals.total("bytes_read") / n_passes,
        }


def measure_exact(path: Path, vram: int | None, uses_graphs: bool) -> Figures:
    """Decode with all neurons in `vram` bytes; None takes what there is."""
    options = EngineOptions(context_tokens=CONTEXT, kv_type="f16", device="cuda", vram=vram, verify="never")
    with Engine(path, options) as engine:
        engine.load()
        if engine._placement is None:
            raise TypeError("an engine for a device has a placement")
        engine._placement.backend.uses_graphs = uses_graphs
        session = engine.start()
        before = engine.counters().bytes_read
        streams = not engine.exact_plan.is_resident
        seconds = decode_seconds(lambda token: session.feed([token]), 1 if streams else 6)
        result: Figures = {
            "ms_per_token": seconds * 1e3,
            "read_bytes_per_token": (engine.counters().bytes_read - before) / session.n_tokens,
            "plan": engine.plan.as_dict(),
        }
        if not streams:
            began = time.perf_counter()
            session.truncate(1)
            hidden = engine.stack.forward(np.array([3]), session._kv_cache)
            result["ms_to_enqueue"] = (time.perf_counter() - began) * 1e3
            engine.stack.logits(hidden)
        return result


def measure_torch(shape: Shape) -> Figures | None:
    """A decode step of the same shapes in torch, f16, without a graph; None where torch has no CUDA."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    d, n, heads = shape.d_model, shape.n_layers, shape.n_heads
    kind: Any = {"dtype": torch.float16, "device": "cuda"}
    layers = [
        {
            "qkv": torch.randn(3 * d, d, **kind) / 64,
            "out": torch.randn(d, d, **kind) / 64,
            "up": torch.randn(shape.d_ff, d, **kind) / 64,
            "down": torch.randn(d, shape.d_ff, **kind) / 64,
            "kv": torch.randn(2, 1, heads, CONTEXT, d // heads, **kind),
        }
        for _ in range(n)
    ]
    head = torch.randn(shape.vocab_size, d, **kind) / 64
    functional = torch.nn.functional

    def token(_: int) -> Any:
        x = torch.randn(1, d, **kind)
        for w in layers:
            q, k, v = functional.linear(functional.layer_norm(x, (d,)), w["qkv"]).view(3, 1, heads, 1, d // heads)
            w["kv"][0, :, :, -1:], w["kv"][1, :, :, -1:] = k, v
            mixed = functional.scaled_dot_product_attention(q, w["kv"][0], w["kv"][1])
            x = x + functional.linear(mixed.reshape(1, d), w["out"])
            x = x + functional.linear(
                functional.relu(functional.linear(functional.layer_norm(x, (d,)), w["up"])), w["down"]
            )
        return functional.linear(x, head).float().cpu().numpy()

    with torch.no_grad():
        seconds = decode_seconds(token, 6)
    nbytes = 2 * (n * (4 * d * d + 2 * d * shape.d_ff) + shape.vocab_size * d)
    return {"ms_per_token": seconds * 1e3, "weight_bytes": nbytes, "torch": torch.__version__}


def machine(device: CupyDevice) -> Figures:
    """What ran this."""
    query = "name,memory.total,driver_version,clocks.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        smi = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        smi = "nvidia-smi is not there"
    return {
        "device": device.name,
        "device_memory": device.memory()[1],
        "nvidia_smi": smi,
        "cuda_runtime": cupy.cuda.runtime.runtimeGetVersion(),
        "cupy": cupy.__version__,
        **describe_machine(ROOT),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def run_tests() -> int:
    """Exit status of the tests that need a GPU."""
    folder = ROOT / "tests" / "reference_engine" / "backends" / "cuda"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(folder)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def main() -> int:
    """Measure, print, write JSON; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="opt-6.7b", help="of the models decoded")
    parser.add_argument("--folder", type=Path, help="where the model is written (default: a temporary folder)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--skip-decode", action="store_true")
    arguments = parser.parse_args()
    write = sys.stdout.write

    device = open_cuda_device()
    backend, checks = CupyBackend(device), Checks()
    report: Figures = {"machine": machine(device), "tests": None if arguments.skip_tests else run_tests()}

    def save() -> None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")

    save()
    report["bandwidth"] = bandwidths(device)
    ceiling = report["bandwidth"]["device_copy"]
    write(" ".join(f"{name} {value / 1e9:.1f} GB/s" for name, value in report["bandwidth"].items()) + "\n")
    report["kernels"] = {}
    for encoding in (Encoding.F32, Encoding.F16, Encoding.BF16, Encoding.Q8, Encoding.Q4):
        bench = EncodingBench(backend, encoding, checks, ceiling)
        bench.run()
        report["kernels"][str(encoding)] = bench.results
        for name, row in bench.results.items():
            write(f"{encoding:5} {name:24} {row['us']:9.1f} us {row['share_of_copy']:6.2f} of the copy's bandwidth")
            write(f" {row['tflops']:7.2f} TFLOP/s\n")
        save()
    report["other_kernels"] = measure_rest(backend)
    report["errors"], report["wrong"] = checks.worst, checks.wrong
    write(json.dumps(report["other_kernels"]) + f"\nwrong: {checks.wrong}\n")
    save()
    if not arguments.skip_decode:
        shape = SHAPES[arguments.shape]
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            path = Path(folder) / "model.flash"
            write_synthetic(path, shape, encoding=Encoding.F16, residents=Encoding.Q8)
            report["decode"] = measure_decode(path, shape, ceiling)
        save()
        write(json.dumps(report["decode"], indent=1) + "\n")
    return 1 if checks.wrong or report["tests"] else 0


def in_child(measure: Callable[..., Any], *arguments: Any) -> Any:
    """Result of a measurement in a process of its own, which leaves nothing on the device."""
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        return executor.submit(measure, *arguments).result()


def measure_decode(path: Path, shape: Shape, copy_bandwidth: float) -> Figures:
    """All decoding, and what follows from it."""
    with flashfmt.open(path) as model:
        nbytes = model.nbytes
    half = nbytes // 2
    streamed, resident = in_child(measure_exact, path, half, True), in_child(measure_exact, path, None, True)
    launched = in_child(measure_exact, path, None, False)
    naive = nbytes / streamed["read_bytes_per_token"] * streamed["ms_per_token"]
    result: Figures = {
        "model_bytes": nbytes,
        "naive_ms_per_token": naive,
        "streamed": streamed,
        "resident": resident | {"ms_at_copy_bandwidth": nbytes / copy_bandwidth * 1e3},
        "resident_without_graphs": launched,
        "launch_gap_share": 1 - resident["ms_per_token"] / launched["ms_per_token"],
        "torch": in_child(measure_torch, shape),
    }
    for name, host_memory, uses_graphs in (
        ("half", 0, True),
        ("half_without_graphs", 0, False),
        ("half_with_tier", nbytes // 4, True),
    ):
        figures = in_child(measure_sparse, path, half, host_memory, uses_graphs)
        figures["times_faster_than_naive"] = naive / figures["ms_per_token"]
        figures["upkeep_share"] = figures["ms_per_token_by_stage"]["upkeep_seconds"] / figures["ms_per_token"]
        result[name] = figures
    if result["half"]["way_chosen"]["direct_bytes_per_second"] is not None:
        result["half_other_way"] = in_child(measure_sparse, path, half, 0, True, True)
    return result


if __name__ == "__main__":
    sys.exit(main())
