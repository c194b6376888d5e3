PYTHON ?= python3
BIN := .venv/bin
DATA ?=
GRID ?= quick

.PHONY: demo results docs test test-all lint format bench gpu gpu-results gpu-kit clean

# One environment for everything, made anew when the dependencies change.
.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -e '.[test]'
	touch $@

demo: .venv/installed  ## the whole path in minutes; DATA=<folder of class folders> for your images
	$(BIN)/famt demo $(if $(DATA),--data '$(DATA)')

results: .venv/installed  ## train and compare what docs/grids/$(GRID).toml declares
	$(BIN)/famt results docs/grids/$(GRID).toml

docs: .venv/installed  ## the pages as a site, in build/docs
	$(BIN)/pip install --quiet -e '.[docs]'
	$(BIN)/mkdocs build --strict -f docs/site/mkdocs.yml

# Their models are so small that a second thread costs more than it gives.
test: lint  ## lint and the fast tests, a file on each core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

test-all: lint  ## and the slow ones
	$(BIN)/python -m pytest -m ''

lint: .venv/installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: .venv/installed  ## figures beside their bounds, as JSON lines
	$(BIN)/famt benchmark precompute loader step attention refresh

gpu: .venv/installed  ## what only a GPU can show, before a long run; a page of results in gpu.md
	$(BIN)/famt gpu-check

MINUTES ?= 8

gpu-results: .venv/installed  ## four arms on one GPU, in pieces of MINUTES: docs/grids/gpu.toml
	$(BIN)/famt results docs/grids/gpu.toml --gpus 0.125 --cpus 3 --minutes $(MINUTES)

HAVE ?= have.txt
PYTHON_THERE ?= 3.12
ARCH ?=
PART_MIB ?= 1024
KIT ?= kit

gpu-kit: .venv/installed  ## all that a GPU machine without network lacks, in parts: docs/gpu.md
	$(BIN)/python docs/gpu_kit/pack.py --have '$(HAVE)' --python $(PYTHON_THERE) --arch $(ARCH) \
		--part-mib $(PART_MIB) --out '$(KIT)'

clean:
	rm -rf .venv demo
