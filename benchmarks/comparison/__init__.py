"""Timing flashfmt against other ways to run the same model in the same memory, for ``benchmarks/compare.py``.

Files in the order of the flow: `cases` says what is compared, `weights`, `checkpoint_files`, `gguf_files` and
`model_store` write the models, `contenders` knows how each of them is run, `session` runs them in turn, each through
`limited_run` in a memory cgroup; `run_ours`, `run_accelerate` and `run_llama_bench` are the programs that are run
(`token_clock` is what they share), `figures` makes ratios and tables of what they measured.
"""
