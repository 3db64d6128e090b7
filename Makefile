# make demo: set up, then the whole road on CPU.   make test: set up, then lint, types and tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test quick lint setup clean
setup: $(READY)

$(READY): pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch torchvision
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[deepspeed,fast,gguf,qlora,serve,web,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llava-torch
	touch $(READY)

demo: $(READY)
	$(BIN)/llava-tune demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

quick: lint
	$(BIN)/pytest -q -m 'not slow'

test: lint
	$(BIN)/pytest -q --durations=30

clean:
	rm -rf $(VENV) work_dirs build *.egg-info
