# `make demo` and `make test` do everything on a fresh machine; the first of them prepares .venv, later ones use it.
# Another Python: make PYTHON=python3.12 ...    Another environment: make VENV=/path ...

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install
TORCH_BUILD := .ci/torch_build.py

.PHONY: demo test timing any-cpu faults mutants sanitize
demo: $(VENV)/.installed
	$(BIN)/dream-fast --text "a hamburger" --workspace trial -O --save_mesh

# By modules: an environment around a Python that has pytest gets no script of its own for it. Tests run in JOBS processes
# of one thread each; one that has no more of them takes over some of another's. A thread that waits leaves its core alone.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -P -m pytest -n $(JOBS) --dist worksteal
test: $(VENV)/.installed-test
	$(BIN)/python -P -m ruff check .
	$(BIN)/python -P -m ruff format --check .
	$(BIN)/python -P .ci/check_types.py
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels/triton

# Speed on a CPU beside another commit, by default where the branch left main: make timing BASE=v1.0
timing: $(VENV)/.installed
	$(BIN)/python -P -m dream_fast.bench timing $(if $(BASE),--base '$(BASE)')

# The suite as on other processors: make any-cpu, or make any-cpu ROUND="--jobs 12 --shard 1/2"
any-cpu: $(VENV)/.installed-test
	$(BIN)/python -P .ci/any_cpu.py $(ROUND)

# Faults planted in the kernels, one at a time, and the test that notices each: make faults FAULTS="-n 16 mlp march"
faults: $(VENV)/.installed-test
	$(BIN)/python -P tests/planted/run.py $(FAULTS)

# Changes of the host code that no test notices: make mutants, or make mutants MUTANTS="engine/scene/camera.py --show"
mutants: $(VENV)/.installed-test
	$(PIP) 'mutmut==3.*'
	$(BIN)/python .ci/mutants.py $(MUTANTS)

# Kernels over small shapes on a GPU, every access checked: make sanitize, or make sanitize TOOL=racecheck
TOOL ?= memcheck
sanitize: $(VENV)/.installed-test
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $(TOOL) --error-exitcode 1 \
	  $(BIN)/python -P -m pytest tests/kernels/triton -m gpu -k small_shapes

# An environment around a Python that has a good torch of its own uses that one.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dream-fast needs Python 3.11 or newer")'
	case $$($(PYTHON) $(TORCH_BUILD)) in cpu|gpu) site=--system-site-packages;; *) site=;; esac; \
	$(PYTHON) -m venv $$site $(VENV)

# torch first, because its build decides about triton: a GPU build brings its own and keeps it. A torch that is there and
# good stays. Without an NVIDIA GPU it is the version that we test with.
$(VENV)/.torch: $(TORCH_BUILD) constraints-cpu.txt | $(BIN)/python
	case $$($(BIN)/python $(TORCH_BUILD)) in none|old) \
	  if nvidia-smi -L >/dev/null 2>&1; then $(PIP) 'torch>=2.10'; else $(PIP) torch -c constraints-cpu.txt; fi;; \
	esac
	touch $@

install = case $$($(BIN)/python $(TORCH_BUILD)) in cpu) $(PIP) -e '$(1)' triton==3.6.0;; *) $(PIP) -e '$(1)';; esac

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	$(call install,.)
	touch $@

$(VENV)/.installed-test: pyproject.toml $(VENV)/.torch
	$(call install,.[test])
	touch $(VENV)/.installed $@
