# The two commands of the README, and what they need. Each target installs what is missing first.
SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
EXTRA ?= cpu
UV_VERSION := 0.13.8
# uv from the PATH, or from a small environment of its own
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)

.PHONY: install demo test test-slow lint clean

install: $(VENV)/.installed-$(EXTRA)

.uv/bin/uv:
	python3 -m venv .uv && .uv/bin/python -m pip install --quiet uv==$(UV_VERSION)

$(VENV)/.installed-$(EXTRA): pyproject.toml .ci/constraints.txt | $(filter .uv/%,$(UV))
	$(UV) venv --quiet --allow-existing --python 3.11 $(VENV)
	$(UV) pip install --quiet --python $(PYTHON) \
		--constraint .ci/constraints.txt --editable '.[$(EXTRA)]' --group dev
	rm -f $(VENV)/.installed-* && touch $@

demo: install
	$(PYTHON) -m jobs.demo

test: install
	$(PYTHON) -m pytest -m "not slow and not gpu"

test-slow: install
	$(PYTHON) -m pytest -m "slow and not gpu"

lint: install
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

clean:
	rm -rf runs cache demo
