# make install   the virtual environment .venv with pinned packages
# make demo      the whole pipeline in miniature
# make test      the fast tests; make test-slow: kill-and-resume, several processes, real data
# make vllm      .venv-vllm, a second environment with vLLM for CPUs; make test-vllm: the tests that run in it
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Compiled tests and modules are kept: without them each process compiles anew, up to 7 seconds for all tests.
unexport PYTHONDONTWRITEBYTECODE

VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed

.PHONY: install demo test test-slow vllm test-vllm lint clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	@$(BIN)/rlhf demo

# Three tests at a time, since many wait: for a process, a timeout, a signal
test: install
	@$(BIN)/pytest -q -n 3 --dist worksteal

test-slow: install
	@$(BIN)/pytest -q -n 3 --dist worksteal -m "slow or real" --durations 12

vllm: $(VLLM_STAMP)

$(VLLM_STAMP): constraints-vllm.txt
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@echo "Installing into $(VLLM) (a few minutes the first time)"
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --requirement constraints-vllm.txt
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# vLLM looks at each new model class in a process of its own, and keeps what it saw in its cache
test-vllm: vllm
	@VLLM_CACHE_ROOT=$(abspath $(VLLM))/cache OMP_NUM_THREADS=1 \
		$(VLLM)/bin/python -m pytest -q -p no:cacheprovider -m vllm tests/test_vllm.py --durations 5

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VLLM) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
