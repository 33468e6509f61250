# Everything from a fresh clone: each target makes .venv and installs what it needs, at the versions of requirements.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.txt

.PHONY: demo test check lint types format docs lock clean

demo: $(VENV)/.installed
	$(BIN)/python demo.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# In two minutes, while one writes.
check: lint types
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow and not hosts and not torch"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/pyrefly check

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is too old: expected Python 3.11 or newer; make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml requirements.txt | $(BIN)/python
	@echo "Installing into $(VENV) (about a minute) ..."
	$(PIP) --editable .
	@touch $@

# torchvision without its dependencies: they would bring torch's CUDA build; its models and transforms need none of it.
# lightly likewise: its losses need none of its command line's and its trainer's. timm likewise, for torchvision's sake.
$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the test environment into $(VENV) (torch among it) ..."
	$(PIP) --editable '.[dev,torch,tfds]'
	$(PIP) --no-deps torchvision lightly timm
	@touch $@

# The site, into site/; a broken link or anchor is an error.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# requirements.txt anew, from what is installed.
lock: $(VENV)/.installed-dev
	$(BIN)/python -m pip list --format=freeze --exclude-editable --exclude pip --exclude setuptools \
	  | sed 's/+cpu$$//' > requirements.txt

clean:
	rm -rf $(VENV) .cache build site *.egg-info
