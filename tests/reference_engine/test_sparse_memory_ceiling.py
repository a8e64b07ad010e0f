"""Sparse mode keeps below its ceiling as a whole process, from the floor on, and in a memory cgroup of that size."""

import json
import subprocess
import sys

import pytest

from flashfmt.encodings import Encoding
from reference_engine.synthetic import SHAPES, write_synthetic

CHILD = """
import json, sys
from reference_engine.engine import Engine, EngineOptions
from reference_engine.machine import peak_resident_nbytes
from reference_engine.neuron_window import parse_window
from reference_engine.selectors import parse_selector
from reference_engine.sparse_mode import SparseOptions
path, memory, verb, selector, window, residents = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
sparse = SparseOptions(parse_selector(selector), window=parse_window(window))
options = EngineOptions(memory=memory, context_tokens=128, kv_type="f16", sparse=sparse, residents=residents)
engine = Engine(path, options)
result = {"floor": engine.plan.floor, "held": engine.plan.held_share}
if verb == "run":
    engine.load()
    session = engine.start()
    logits = session.feed([(i * 7919) % engine.vocab_size for i in range(120)])
    for _ in range(4):
        logits = session.feed([int(logits.argmax())])
    result |= {"missing": engine.sparse.totals.total("n_missing"), "peak": peak_resident_nbytes()}
print(json.dumps(result))
engine.close()
"""
MIB = 1 << 20


def child(path, memory, verb, selector, *, window="frequency", residents="stored", prefix=()):
    result = subprocess.run(
        [*prefix, sys.executable, "-c", CHILD, str(path), str(memory), verb, selector, window, residents],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, (result.returncode, result.stderr)
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def opt_125m(tmp_path_factory):
    path = tmp_path_factory.mktemp("opt") / "opt-125m.flash"
    write_synthetic(path, SHAPES["opt-125m"])
    yield path
    path.unlink()


@pytest.mark.parametrize(
    ("selector", "window", "residents"),
    [("lowbit:q4", "frequency", "stored"), ("threshold:0", "paper:3", "stored"), ("threshold:0", "lru", "q8")],
)
def test_resident_size_stays_below_the_ceiling(opt_125m, selector, window, residents):
    floor = child(opt_125m, 1 << 40, "plan", selector, residents=residents)["floor"]
    missing = []
    for share in (0.0, 0.1, 1.0):
        memory = floor + 4 * MIB + int(share * opt_125m.stat().st_size)
        result = child(opt_125m, memory, "run", selector, window=window, residents=residents)
        assert result["peak"] <= memory, (share, result["peak"] / MIB, memory / MIB)
        missing.append(result["missing"])
    assert result["held"] == 1
    assert missing[0] > missing[1] > missing[2] > 0


def test_a_cgroup_of_the_ceiling_is_never_exceeded(opt_125m, memory_cgroup):
    memory = child(opt_125m, 1 << 40, "plan", "lowbit:q4")["floor"] + 16 * MIB
    with memory_cgroup(memory) as (prefix, group):
        assert child(opt_125m, memory, "run", "lowbit:q4", prefix=prefix)["missing"] > 0
        if (group / "memory.failcnt").exists():
            assert int((group / "memory.max_usage_in_bytes").read_text()) <= memory


@pytest.mark.slow
def test_half_of_a_model_of_gigabytes_runs_in_a_cgroup_of_that_size(tmp_path, memory_cgroup):
    path = tmp_path / "opt-1.3b.flash"
    write_synthetic(path, SHAPES["opt-1.3b"], residents=Encoding.Q8)
    memory = path.stat().st_size // 2
    with memory_cgroup(memory) as (prefix, _):
        result = child(path, memory, "run", "lowbit:q4", prefix=prefix)
    path.unlink()
    assert result["peak"] <= memory
    assert 0 < result["held"] < 0.5
    assert result["missing"] > 0
