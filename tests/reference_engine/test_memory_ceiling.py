"""The ceiling holds for the whole process, measured from outside: resident size, and a memory cgroup around it."""

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
path, memory, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
engine = Engine(path, EngineOptions(memory=memory, context_tokens=context, kv_type="f16"))
if sys.argv[4] == "run":
    engine.load()
    session = engine.start()
    logits = session.feed([(i * 7919) % engine.vocab_size for i in range(context - 4)])
    ids = []
    for _ in range(4):
        ids.append(int(logits.argmax()))
        logits = session.feed(ids[-1:])
    print(json.dumps({"ids": ids, "peak": peak_resident_nbytes(), "streamed": engine.plan.streamed}))
else:
    print(json.dumps({"floor": engine.plan.floor}))
engine.close()
"""
MIB = 1 << 20


def child(path, memory, context, verb, prefix=()):
    result = subprocess.run(
        [*prefix, sys.executable, "-c", CHILD, str(path), str(memory), str(context), verb],
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


def check_budgets(path, context, shares):
    """The same tokens at every budget, and never more memory than the budget."""
    floor = child(path, 1 << 40, context, "plan")["floor"]
    results = []
    for share in shares:
        memory = floor + 4 * MIB + int(share * path.stat().st_size)
        result = child(path, memory, context, "run")
        assert result["peak"] <= memory, (share, result["peak"] / MIB, memory / MIB)
        results.append(result)
    assert len({tuple(result["ids"]) for result in results}) == 1
    assert results[0]["streamed"] > 0
    assert results[-1]["streamed"] == 0


def test_resident_size_stays_below_the_ceiling(opt_125m):
    check_budgets(opt_125m, 128, (0.0, 0.2, 1.0))


def test_a_cgroup_of_the_ceiling_is_never_exceeded(opt_125m, memory_cgroup):
    floor = child(opt_125m, 1 << 40, 128, "plan")["floor"]
    memory = floor + 16 * MIB
    with memory_cgroup(memory) as (prefix, group):
        assert child(opt_125m, memory, 128, "run", prefix)["streamed"] > 0
        failures = group / "memory.failcnt"
        if failures.exists():
            assert int((group / "memory.max_usage_in_bytes").read_text()) <= memory


@pytest.mark.slow
@pytest.mark.parametrize(("like", "encoding"), [("opt-1.3b", "f16"), ("llama-2-7b", "q4")])
def test_models_of_several_gigabytes_stay_below_the_ceiling(tmp_path, like, encoding):
    path = tmp_path / "large.flash"
    write_synthetic(path, SHAPES[like], encoding=Encoding(encoding), residents=Encoding(encoding))
    check_budgets(path, 256, (0.0, 0.25, 1.0))
