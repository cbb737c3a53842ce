# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
# The newest JAX that this Python can have; EXTRAS=export,test is the pinned one, for a SavedModel.
EXTRAS ?= export-newest,docs,test
# The two that CI tests are locked, for every Python and system; all else, and LOCK=, is the newest there is.
LOCK.export-newest,docs,test := requirements/newest.txt
LOCK.export,peers,test := requirements/pinned.txt
LOCK ?= $(LOCK.$(EXTRAS))
# Processes that tests run in, each of up to 8 GB, and further flags of pytest.
JOBS ?= 2
FLAGS ?=
RUN := $(VENV)/bin/python
# Python compiles the files that it imports; of all that is installed they are a part.
PIP := $(RUN) -m pip install --quiet --no-compile
PIP_LOCKED := $(PIP) --no-deps --no-build-isolation
# In full, for commands that change their directory; $(abspath) would split it at its spaces.
VENV_PATH := $$(cd '$(VENV)' && pwd)
# Compiled programs are kept for the next run, and for the other process of this one.
CACHE := JAX_COMPILATION_CACHE_DIR="$(VENV_PATH)/xla" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

# What looks after the locks, in an environment of its own.
TOOLS ?= .venv-tools
COMPILE := $(TOOLS)/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
	--generate-hashes --no-annotate --no-header

.PHONY: demo test coverage lint types docs doctor lock clean

demo: $(VENV)/installed
	$(RUN) -m vit_jax doctor
	$(RUN) -m vit_jax train --config digits
	$(RUN) -m experiments.training_curves runs/digits
	$(RUN) -m vit_jax predict --checkpoint runs/digits docs/seven.png
	$(RUN) -m vit_jax export --checkpoint runs/digits --output runs/digits/export --latency_seconds 0.5

# Files with slow tests come first (tests/conftest.py), so that none is left to one process at the end.
test: $(VENV)/installed
	$(CACHE) $(RUN) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(COVERAGE) $(FLAGS)

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
	PATH="$(VENV_PATH)/bin:$$PATH" NO_MKDOCS_2_WARNING=1 $(CACHE) $(RUN) -m mkdocs build --strict

$(VENV)/installed: setup.py vit_jax/__init__.py $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11: use make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
ifeq ($(LOCK),)
	@echo "not locked: the newest of $(EXTRAS) that there is"
	$(PIP) --editable '.[$(EXTRAS)]'
	$(if $(findstring export-newest,$(EXTRAS)),$(PIP) --no-deps jax2onnx)
else
	$(PIP_LOCKED) --require-hashes --requirement requirements/build.txt
	$(PIP_LOCKED) --require-hashes --requirement $(LOCK)
	$(PIP_LOCKED) --editable .
endif
	touch $@

$(TOOLS)/installed: requirements/tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --no-compile --require-hashes --requirement $<
	touch $@

# Takes up the newest of everything; requirements/*.in and pyproject.toml say what setup.py cannot.
lock: $(TOOLS)/installed
	$(COMPILE) setup.py requirements/newest.in --extra export-newest --extra docs --extra test --output-file requirements/newest.txt
	$(COMPILE) setup.py --extra export --extra peers --extra test --output-file requirements/pinned.txt
	$(COMPILE) requirements/build.in --output-file requirements/build.txt
	$(COMPILE) requirements/tools.in --output-file requirements/tools.txt

clean:
	rm -rf $(VENV) $(TOOLS) site
