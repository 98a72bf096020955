# `make rerank` and `make test` set up all they need in .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUERY ?= wie entferne ich ein Paket samt Konfiguration
DOCS ?= examples/linux_howto.jsonl

.PHONY: rerank test lint clean
export QUERY DOCS

rerank: $(VENV)/.installed
	@$(BIN)/querit rerank --query "$$QUERY" "$$DOCS"

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch first and by version: a range would bring several gigabytes of CUDA packages to a machine without a GPU.
$(VENV)/.installed: setup.py
	@echo "Installing into $(VENV); this happens once and takes a few minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --upgrade pip
	@$(BIN)/pip install -qq torch==2.13.0
	@$(BIN)/pip install -qq --editable ".[all]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
