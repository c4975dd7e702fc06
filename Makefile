# make install   the virtual environment .venv with pinned packages
# make demo      the whole pipeline in miniature
# make test      the fast tests; make test-slow: kill-and-resume, several processes, real data
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Compiled tests and modules are kept: without them each process compiles anew, up to 7 seconds for all tests.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test test-slow lint clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	@$(BIN)/rlhf demo

test: install
	@$(BIN)/pytest -q -n 2 --dist loadfile

test-slow: install
	@$(BIN)/pytest -q -n 2 --dist worksteal -m "slow or real" --durations 12

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
