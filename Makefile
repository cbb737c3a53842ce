# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
# The newest JAX that this Python can have; EXTRAS=export,test is the pinned one, for a SavedModel.
EXTRAS ?= export-newest,docs,test
# Processes that tests run in, each of up to 8 GB, and further flags of pytest.
JOBS ?= 2
FLAGS ?=
RUN := $(VENV)/bin/python
# Python compiles the files that it imports; of all that is installed they are a part.
PIP := $(RUN) -m pip install --quiet --no-compile
# Compiled programs are kept for the next run, and for the other process of this one.
CACHE := JAX_COMPILATION_CACHE_DIR=$(abspath $(VENV))/xla JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

.PHONY: demo test faults fuzz coverage lint types docs doctor clean

demo: $(VENV)/installed
	$(RUN) -m vit_jax doctor
	$(RUN) -m vit_jax train --config digits
	$(RUN) -m experiments.training_curves runs/digits
	$(RUN) -m vit_jax predict --checkpoint runs/digits docs/seven.png
	$(RUN) -m vit_jax export --checkpoint runs/digits --output runs/digits/export --latency_seconds 0.5

# Files with slow tests come first (tests/conftest.py), so that none is left to one process at the end.
test: $(VENV)/installed
	$(CACHE) $(RUN) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(COVERAGE) $(FLAGS)

# Attacks the commands for a quarter of an hour, and prints the table of docs/robustness.md.
faults: $(VENV)/installed
	FAULTS=long FAULTS_SEED=$${FAULTS_SEED:-$$(date +%s)} $(CACHE) $(RUN) -m pytest tests/faults -n $(JOBS) $(FLAGS)

# Every reader of files is attacked for ten minutes, with other cases each time; FLAGS='-k npz' one.
# EXTRAS=export,peers,test has PyTorch, without which its two readers are left out.
fuzz: export FUZZ_SECONDS ?= 600
fuzz: export FUZZ_SEED ?= $(shell date +%s)
fuzz: $(VENV)/installed
	$(CACHE) $(RUN) -m pytest -n $(JOBS) tests/fuzz $(FLAGS)

# The tests, and the share of lines that they run, without those in other processes.
coverage: COVERAGE := --cov=vit_jax --cov-report=term:skip-covered
coverage: export COVERAGE_CORE = sysmon
coverage: test

doctor: $(VENV)/installed
	$(RUN) -m vit_jax doctor

lint: $(VENV)/installed types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/installed
	$(VENV)/bin/ty check --python $(VENV)

# The notebook runs the commands of this environment.
docs: $(VENV)/installed
	PATH="$(abspath $(VENV))/bin:$$PATH" NO_MKDOCS_2_WARNING=1 $(CACHE) $(RUN) -m mkdocs build --strict

$(VENV)/installed: setup.py vit_jax/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11: use make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[$(EXTRAS)]'
	$(if $(findstring export-newest,$(EXTRAS)),$(PIP) --no-deps jax2onnx)
	touch $@

clean:
	rm -rf $(VENV) site
