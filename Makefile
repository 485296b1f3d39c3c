# make demo    set up, train experts, position, merge, score, report          make test   set up, run the tests
# make lint    ruff and mypy                                                  make clean  remove what these made
#
# PYTHON  the interpreter to make the virtual environment with (3.11 to 3.13)
# VENV    where the virtual environment is
# TORCH   what to ask pip for when no fitting torch is there. Without a GPU: torch==2.13.0, of which a CPU build is
#         small; with one: whatever pip finds for it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FITS := import torch; from packaging.version import Version as V; assert V("2.8") <= V(torch.__version__) < V("3")
TORCH ?= $(shell if [ -e /dev/nvidiactl ]; then echo 'torch>=2.8,<3'; else echo 'torch==2.13.0'; fi)

.PHONY: demo test test-slow lint bench clean

demo: $(VENV)/.demo
	$(BIN)/scalemerge run recipes/docs.yaml --out runs/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p scalemerge

bench: $(VENV)/.demo
	$(BIN)/python benchmarks/positioning.py --out benchmarks/results/cpu

# A torch that is already there and fits (in the environment, or in the interpreter that it is made from) is kept.
$(VENV)/.torch:
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 13), \
	    f"Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}; set PYTHON=python3.12"'
	@test -x $(BIN)/python || if $(PYTHON) -c '$(FITS)' 2>/dev/null; \
	    then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	@$(BIN)/python -c '$(FITS)' 2>/dev/null || $(BIN)/pip install -q packaging '$(TORCH)'
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -q -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -q -e '.[dev]'
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) runs build *.egg-info
