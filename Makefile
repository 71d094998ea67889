# The two commands of the README, and what they need. Each target installs what is missing first.
SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
# cpu or gpu: which vLLM. An environment that is there keeps its own; naming the other one makes it anew.
EXTRA ?= $(if $(wildcard $(VENV)/.installed-gpu),gpu,cpu)
OTHER := $(if $(filter gpu,$(EXTRA)),cpu,gpu)
# Two processes, of one thread each: most tests wait for a process that starts, and leave a core to another.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses 2 --dist loadfile
UV_VERSION := 0.13.8
# uv from the PATH, or from a small environment of its own
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)

.PHONY: install demo test test-slow lint

install: $(VENV)/.installed-$(EXTRA)

.uv/bin/uv:
	python3 -m venv .uv && .uv/bin/python -m pip install --quiet uv==$(UV_VERSION)

$(VENV)/.installed-$(EXTRA): pyproject.toml .ci/constraints.txt | $(filter .uv/%,$(UV))
	$(UV) venv --quiet $(if $(wildcard $(VENV)/.installed-$(OTHER)),--clear,--allow-existing) --python 3.11 $(VENV)
	$(UV) pip install --quiet --compile-bytecode --python $(PYTHON) \
		--constraint .ci/constraints.txt --editable '.[$(EXTRA)]' --group dev
	touch $@

demo: install
	$(PYTHON) -m jobs.demo

test: install
	$(PYTEST) -m "not slow and not gpu"

test-slow: install
	$(PYTEST) -m "slow and not gpu"

lint: install
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy && $(VENV)/bin/lint-imports
