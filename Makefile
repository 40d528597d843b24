# Every target sets up what it needs. `make demo` and `make test` are all a newcomer has to know.
#
# PYTHON       the interpreter that the environment is made from (3.11 or newer)
# TORCH_INDEX  an extra package index for torch, for instance the one of PyTorch's CPU wheels (see README)

PYTHON ?= python3
TORCH_INDEX ?=
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
STAMP := $(shell date +%Y%m%d-%H%M%S)

.PHONY: help setup demo test test-slow lint format bench bench-large bench-attention bench-scaling bench-learning \
	bench-checkpoints bench-recording bench-decoding bench-serving bench-tuning test-load learn labs wheel clean

help:
	@echo "make demo       train a small DeepSeek-V3 on Tiny Shakespeare and let it talk"
	@echo "make test       run the tests"
	@echo "make lint       formatting, lint, types, one-way imports"
	@echo "make bench      our training step beside transformers', in turn in one run; on a GPU too where there is one"
	@echo "make bench-large, bench-scaling, bench-learning, bench-attention   the other tables of docs/performance.md"
	@echo "make bench-decoding     the engine beside transformers and llama.cpp (9 GB of disk, 16 GB of memory)"
	@echo "make bench-serving      the server under 1, 8 and 32 clients"
	@echo "make bench-tuning       a LoRA step beside PEFT + transformers (--data of GSM8K: see the file)"
	@echo "make bench-recording    what recording routing costs while a model trains"
	@echo "make bench-checkpoints  memory and time of loading, converting, exporting (16 GB of disk, 8 GB of memory)"
	@echo "make test-load  the server under 200 clients that come and go, two minutes"
	@echo "make test-slow  long proofs that CI leaves out"
	@echo "make labs       run all experiments anew and write their reports into docs/lab (an hour on two cores)"
	@echo "make learn      run the chapters of docs/learn and write their notebooks"
	@echo "make wheel      build the wheel, install it in an empty environment, run a command"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "abyssal needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "could not make $(VENV); on Debian or Ubuntu: apt install python3-venv"; exit 2; }

# torch first and by its exact version, so that nothing pulls in another build of it.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@echo "setting up $(VENV) (PyTorch first; some minutes the first time)"
	@$(INSTALL) $$(grep '^torch==' constraints.txt) numpy
	@touch $@

$(VENV)/.base: $(VENV)/.torch pyproject.toml
	@$(INSTALL) --editable '.[plot,serve]'
	@touch $@

# Triton comes with PyTorch's CUDA builds, in the version that they want; elsewhere its interpreter runs the GPU kernels' tests.
$(VENV)/.dev: $(VENV)/.base
	@$(INSTALL) --editable '.[dev]'
	@$(BIN)/python -c 'import triton' 2> /dev/null || $(INSTALL) 'triton==3.6.0; platform_system == "Linux"'
	@touch $@

setup: $(VENV)/.dev

demo: $(VENV)/.base
	@$(BIN)/abyssal train demo --out runs/demo-$(STAMP)

test: $(VENV)/.dev
	@$(BIN)/python -m pytest -n auto --dist loadgroup -m 'not slow'

test-load: $(VENV)/.dev
	@$(BIN)/python -m pytest -m slow tests/serving/test_load.py

test-slow: $(VENV)/.dev
	@$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(VENV)/.dev
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# Threads that sleep at a barrier instead of spinning: a benchmark of two sides holds both sides' threads.
bench: export OMP_WAIT_POLICY ?= passive
bench: $(VENV)/.dev
	@$(BIN)/python benchmarks/training.py --shapes demo S --compiled --json bench.json
	@! $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
		$(BIN)/python benchmarks/gpu.py --json bench-gpu.json

bench-large: $(VENV)/.dev
	@$(BIN)/python benchmarks/training.py --shapes demo S --rounds 5 --memory
	@$(BIN)/python benchmarks/training.py --shapes M --rounds 2 --apart

bench-attention: $(VENV)/.dev
	@$(BIN)/python benchmarks/attention.py

bench-scaling: $(VENV)/.dev
	@$(BIN)/python benchmarks/precision.py
	@$(BIN)/python benchmarks/scaling.py

bench-learning: $(VENV)/.dev
	@$(BIN)/python benchmarks/learning.py

bench-recording: $(VENV)/.dev
	@$(BIN)/python benchmarks/recording.py

# llama-cpp-python is compiled (minutes); where that fails the benchmark says so and leaves llama.cpp out.
bench-decoding: $(VENV)/.dev
	@$(BIN)/python -c 'import llama_cpp, gguf' 2> /dev/null || $(PIP) install --quiet gguf==0.19.0 llama-cpp-python==0.3.36 || true
	@$(BIN)/python benchmarks/decoding.py --memory-roofline

bench-serving: $(VENV)/.dev
	@$(BIN)/python benchmarks/serving.py

bench-tuning: export OMP_WAIT_POLICY ?= passive
bench-tuning: $(VENV)/.dev
	@$(BIN)/python benchmarks/tuning.py --memory

bench-checkpoints: $(VENV)/.dev
	@$(BIN)/python benchmarks/checkpoints.py

# The scripts are the source; a notebook is made of each, with what it printed here.
learn: $(VENV)/.dev
	@$(INSTALL) --editable '.[learn]'
	@cd docs/learn && for chapter in $$(ls *.py | grep -v '^checks' | sed 's/\.py$$//'); do echo $$chapter && \
		PATH="$(abspath $(BIN)):$$PATH" jupytext --quiet --to ipynb --set-kernel python3 --execute $$chapter.py && \
		PATH="$(abspath $(BIN)):$$PATH" jupyter nbconvert --log-level ERROR --to notebook --inplace --coalesce-streams \
			--ClearMetadataPreprocessor.enabled=True $$chapter.ipynb || exit 1; done

labs: $(VENV)/.dev
	@for name in $$($(BIN)/abyssal lab | cut -d ' ' -f 1); do \
		$(BIN)/abyssal lab $$name --report docs/lab/$$name || exit 1; done

# Built from a clean tree, installed without the source, run from elsewhere: presets, recipes and corpus must be in it.
wheel: $(VENV)/.torch
	@rm -rf dist build/wheel-env
	@$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	@$(PYTHON) -m venv build/wheel-env
	@build/wheel-env/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $$(grep '^torch==' constraints.txt) dist/*.whl
	@cd build && wheel-env/bin/abyssal presets && wheel-env/bin/abyssal train demo --print-config > /dev/null && \
		wheel-env/bin/python -c "from abyssal.data.corpus import documents; print(sum(map(len, documents('tinyshakespeare'))), 'characters of corpus in the wheel')"
	@rm -rf build/wheel-env

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
