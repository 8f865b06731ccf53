# `make demo` sets everything up and runs the main job; `make test` passes the tests.
PYTHON ?= python3
VENV ?= .venv
# What builds the image: docker where its daemon answers, else podman.
ENGINE ?= $(shell docker info >/dev/null 2>&1 && echo docker || echo podman)

.PHONY: demo test test-runners quality docs bench image image-test clean

demo: $(VENV)/.demo
	$(VENV)/bin/python examples/demo.py demo

test: quality
	$(VENV)/bin/pytest

# A Flink cluster and Prism, built from packages where these can be had.
test-runners: $(VENV)/.dev
	$(VENV)/bin/pytest -m 'flink or prism'

quality: $(VENV)/.dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

docs: $(VENV)/.dev
	$(VENV)/bin/python docs/generate.py

bench: $(VENV)/.dev
	$(VENV)/bin/python benchmarks/bench_build.py
	$(VENV)/bin/python benchmarks/bench_ops.py
	$(VENV)/bin/python benchmarks/bench_models.py
	$(VENV)/bin/python benchmarks/bench_search.py
	$(VENV)/bin/python benchmarks/bench_quality.py

image:
	$(ENGINE) build --tag beamsight --build-arg REVISION=$$(git rev-parse HEAD) .

image-test: $(VENV)/.dev
	$(VENV)/bin/pytest -m container

clean:
	rm -rf $(VENV) demo build *.egg-info

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "beamsight needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The first installation brings torch and takes some minutes.
$(VENV)/.demo: setup.py | $(VENV)/bin/pip
	$(VENV)/bin/pip install --disable-pip-version-check -e '.[demo]'
	@touch $@

$(VENV)/.dev: setup.py | $(VENV)/bin/pip
	$(VENV)/bin/pip install --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.demo
