# Two commands do everything: `make demo` and `make test`; both make the environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo

.PHONY: venv test lint types pytest nightly demo bench-peers clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

test: lint types pytest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow the mapping of passes/ to tfmq_fx.passes, so it gets a copy laid out as installed.
types: venv
	rm -rf build/types && mkdir -p build/types
	cp -r tfmq_fx build/types/ && cp -r passes build/types/tfmq_fx/passes
	cd build/types && $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) -p tfmq_fx

# Each worker takes neighbouring tests (worksteal), so that what a file shares is made by one of them and not by both.
pytest: venv
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=ci $(BIN)/pytest -n 2 --dist worksteal --durations=15

# What draws its cases draws thousands of them instead of dozens, new ones each time. It takes hours.
nightly: venv
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=nightly $(BIN)/pytest -n 2 --dist worksteal --durations=15 tests/kernels tests/properties

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
	rm -rf build $(DEMO) .mypy_cache .ruff_cache .pytest_cache .hypothesis
