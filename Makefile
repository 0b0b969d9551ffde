# Two commands do everything: `make demo` and `make test`; both make the environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
# constraints-oldest.txt holds the oldest versions that pyproject.toml admits.
CONSTRAINTS ?= constraints.txt

.PHONY: venv test lint layout types docs pytest nightly canary dist-check demo bench-peers clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	touch $@

test: lint types docs pytest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Neither mypy nor mkdocstrings follows the mapping of passes/ to tfmq_fx.passes, so they get a copy laid out as installed.
layout:
	rm -rf build/layout && mkdir -p build/layout
	cp -r tfmq_fx build/layout/ && cp -r passes build/layout/tfmq_fx/passes

types: venv layout
	cd build/layout && $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) -p tfmq_fx

# The site, into build/site. It needs no network; --strict makes a broken link or name an error.
docs: venv layout
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# A worker for each processor, up to four of 1.3 GB. Each takes neighbouring tests (worksteal), so that what a file shares
# is made by one of them and not by all.
WORKERS := -n logical --maxprocesses 4
pytest: venv
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=ci $(BIN)/pytest $(WORKERS) --dist worksteal --durations=15

# What draws its cases draws thousands of them instead of dozens, new ones each time. It takes hours.
nightly: venv
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=nightly $(BIN)/pytest $(WORKERS) --dist worksteal --durations=15 tests/kernels tests/properties

# The tests on the newest torch that installs, whatever pyproject.toml admits: it says what the next version will break.
canary:
	$(MAKE) venv VENV=.canary
	.canary/bin/pip install --quiet --upgrade torch torchao diffusers
	$(MAKE) pytest VENV=.canary

# A wheel and an sdist, each looked into, the wheel installed into an empty environment and used there.
dist-check: venv
	$(BIN)/python .ci/dist_check.py

# The main job on the bundled model: quantize, save, load, lower, sample, compare.
demo: venv
	$(BIN)/tfmq-fx inspect
	$(BIN)/tfmq-fx quantize --out $(DEMO)/fashion-w8a8
	$(BIN)/tfmq-fx compare --artefact $(DEMO)/fashion-w8a8 --out $(DEMO)/comparison.png --json $(DEMO)/comparison.json
	$(BIN)/python benchmarks/baselines.py --artefact $(DEMO)/fashion-w8a8 --json $(DEMO)/baselines.json

# What benchmarks/latency.py compares with, and nncf as a client, each in an environment of its own: never in this project's.
PEERS := export openvino onnxruntime nncf
bench-peers: $(PEERS:%=.peers/%/.installed)

.peers/%/.installed: benchmarks/peers/%.txt
	$(PYTHON) -m venv .peers/$*
	.peers/$*/bin/pip install --quiet --requirement $<
	touch $@

clean:
	rm -rf build dist $(DEMO) .mypy_cache .ruff_cache .pytest_cache .hypothesis
