# The verbs of this project. Each makes the environment it needs; only Python 3.11 or newer, with its venv
# module, and a network are expected.

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; done)
BIN = $(VENV)/bin
HOST ?= 127.0.0.1
PORT ?= 8000
# Most tests wait for processes, not for the processor.
JOBS ?= 5

.PHONY: run test style types tests compose-test autobahn soak bench bench-readme bench-capacity conformance format clean

run: $(VENV)/.run  ## start the chat example and print its address
	$(BIN)/trunkline serve --app-dir examples/chat chat:application --host $(HOST) --port $(PORT) --workers 2

test: style types tests  ## everything that must be green

style: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

tests: $(VENV)/.dev
	$(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

compose-test: $(VENV)/.dev  ## needs a running Docker engine with Compose v2
	TRUNKLINE_COMPOSE_TEST=1 $(BIN)/pytest -m docker --timeout 900 tests/system/test_compose.py

autobahn: $(VENV)/.dev  ## the Autobahn test suite, with compression; some 20 minutes
	$(BIN)/python -m tests.autobahn.run $(ARGS)

# Ten minutes. ARGS="--minutes 2", ARGS="--rolling 5", ARGS="--leaks 100000": see tests/soak/run.py.
soak: $(VENV)/.dev  ## break everything at random and count what is lost
	$(BIN)/python -m tests.soak.run $(ARGS)

# Servers of the comparison and ours in one environment. ARGS="--quick", ARGS="--only http,echo": see bench.py.
bench: benchmarks/.venv/.installed benchmarks/load  ## measure against Daphne, uvicorn and granian
	benchmarks/.venv/bin/python benchmarks/bench.py $(ARGS)

bench-readme: benchmarks/.venv/.installed  ## put the figures of the last full `make bench` into README's table
	benchmarks/.venv/bin/python benchmarks/readme_table.py $(ARGS)

# ARGS="--only blobs,groups", ARGS="--program redis-server --tcp": see broker_capacity.py.
bench-capacity: benchmarks/.venv/.installed benchmarks/load  ## CPU of the broker, and of our processes, for each operation
	benchmarks/.venv/bin/python benchmarks/broker_capacity.py $(ARGS)

# ARGS="--servers trunkline,daphne", ARGS="--only A9,W12": see benchmarks/conformance/__main__.py.
conformance: benchmarks/.venv/.installed  ## ask Trunkline and four other servers the same questions about ASGI
	benchmarks/.venv/bin/python -m benchmarks.conformance $(ARGS)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) benchmarks/.venv benchmarks/load build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# What users get is what `make run` installs; the developers' tools come on top.
$(VENV)/.run: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[all]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@ $(VENV)/.run

benchmarks/.venv/.installed: benchmarks/requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed" >&2; exit 1; }
	$(PYTHON) -m venv benchmarks/.venv
	benchmarks/.venv/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	touch $@

benchmarks/load: benchmarks/load.c
	$(CC) -O2 -Wall -Wextra -o $@ $<
