# make labs      set up, run the notebooks on the embedded model, sum up
# make test      set up, run all checks and tests
# make notebook  set up, open JupyterLab on the chapter
#
# Narrow down:   make labs LAB=3.1 NOTEBOOK=02 PROFILE=smoke MODEL=... GPU_MEMORY=15

PYTHON ?= python3
BIN := .venv/bin
REQUIREMENTS := requirements.txt requirements-dev.txt requirements-assets.txt constraints.txt pyproject.toml

LAB_OPTIONS = $(if $(LAB),--lab $(LAB)) $(if $(NOTEBOOK),--notebook $(NOTEBOOK)) $(if $(PROFILE),--profile $(PROFILE)) \
	$(if $(MODEL),--model $(MODEL)) $(if $(GPU_MEMORY),--gpu-memory $(GPU_MEMORY))

.PHONY: setup labs record test lint notebook tables clean

setup: .venv/.ready

# The mark is written last: a set-up that was interrupted begins again, one that finished is not repeated.
.venv/.ready: $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "Python 3.11, 3.12 or 3.13 is needed; found $$($(PYTHON) --version). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Setting up .venv (once, a few minutes) ..."
	@$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements.txt -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-assets.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

labs: setup
	$(BIN)/python -m common.run $(LAB_OPTIONS)

record: setup
	$(BIN)/python -m common.run --record $(LAB_OPTIONS)
	$(BIN)/python -m common.tables render

test: setup lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

notebook: setup
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/03-Model_Compression

tables: setup
	$(BIN)/python -m common.tables render

clean:
	rm -rf .work .pytest_cache .ruff_cache .hypothesis
