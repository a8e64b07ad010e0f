"""The coverage-guided engine, run by fuzz_open.py: atheris decides which inputs to change, `Mutator` changes them.

python tests/fuzz/atheris_engine.py SCRATCH CORPUS [options of libFuzzer]
"""

from __future__ import annotations

import pickle
import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["flashfmt"]):
    import flashfmt  # noqa: F401

from minimise import minimised
from mutations import Mutator
from odd_values import damage
from probe import Probe, Report
from seeds import load_builder, seeds


def main() -> None:
    scratch = Path(sys.argv[1])
    builder = load_builder()
    mutator = Mutator(builder, seeds(builder))
    probe = Probe(scratch)
    seen: set[str] = set()

    def test_one_input(raw: bytes) -> None:
        result = probe.outcomes(raw)
        if isinstance(result, Report) and result.signature not in seen:
            seen.add(result.signature)
            report = minimised(result, mutator, probe)
            (scratch / f"{len(seen)}.report").write_bytes(pickle.dumps(report))

    def mutate(raw: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        changed = mutator.mutate(rng, raw) if rng.random() < 0.9 else damage(rng, raw)
        return changed[:max_size]

    atheris.Setup([sys.argv[0], *sys.argv[2:]], test_one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
