# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
# The newest JAX that this Python can have; EXTRAS=export,test is the pinned one, for a SavedModel.
EXTRAS ?= export-newest,docs,test
# The two that CI tests are locked, for every Python and system. All else, and LOCK=, is the newest.
LOCK.export-newest,docs,test := requirements/newest.txt
LOCK.export,peers,test := requirements/pinned.txt
LOCK ?= $(LOCK.$(EXTRAS))
# Processes that tests run in, each of up to 8 GB, and further flags of pytest.
JOBS ?= 2
FLAGS ?=
# Of `make mutation`: how many mutants are drawn, and from what; or all of one file, MODULE=models/vit.
MODULE ?=
MUTATED := $(if $(MODULE),vit_jax/$(MODULE).py,$(addprefix vit_jax/,models state.py recipes checkpoints))
SAMPLE ?= $(if $(MODULE),0,200)
SEED ?= 1
# What looks after locks and tests, in an environment of its own.
TOOLS ?= .venv-tools
RUN := $(VENV)/bin/python
# Python compiles the files that it imports; of all that is installed they are a part.
PIP := $(RUN) -m pip install --quiet --no-compile
PIP_LOCKED := $(PIP) --no-deps --no-build-isolation
# In full, for commands that change their directory; $(abspath) would split it at its spaces.
VENV_PATH := $$(cd '$(VENV)' && pwd)
TOOLS_PATH := $$(cd '$(TOOLS)' && pwd)
# Compiled programs are kept for the next run, and for the other process of this one.
CACHE := JAX_COMPILATION_CACHE_DIR="$(VENV_PATH)/xla" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

COMPILE := $(TOOLS)/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
	--generate-hashes --no-annotate --no-header --output-file

.PHONY: demo test faults fuzz coverage lint types docs doctor lock outdated audit licenses mutation clean

demo: $(VENV)/installed
	$(RUN) -m vit_jax doctor
	$(RUN) -m vit_jax train --config digits
	$(RUN) -m experiments.training_curves runs/digits
	$(RUN) -m vit_jax predict --checkpoint runs/digits docs/seven.png
	$(RUN) -m vit_jax export --checkpoint runs/digits --output runs/digits/export --latency_seconds 0.5

# Files with slow tests come first (tests/conftest.py), so that none is left to one process at the end.
test: $(VENV)/installed
	$(CACHE) $(RUN) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(COVERAGE) $(FLAGS)

# Attacks the commands for half an hour of two cores, and prints the table of docs/robustness.md.
faults: $(VENV)/installed
	FAULTS=long FAULTS_SEED=$${FAULTS_SEED:-$$(date +%s)} $(CACHE) $(RUN) -m pytest tests/faults -n $(JOBS) $(FLAGS)

# Every reader of files is attacked for ten minutes, with other cases each time; FLAGS='-k npz' one.
# EXTRAS=export,peers,test has PyTorch, without which its two readers are left out.
fuzz: export FUZZ_SECONDS ?= 600
fuzz: export FUZZ_SEED ?= $(shell date +%s)
fuzz: $(VENV)/installed
	$(CACHE) $(RUN) -m pytest -n $(JOBS) tests/fuzz $(FLAGS)

# The tests, and the share of lines and branches that they run, without those in other processes.
coverage: COVERAGE := --cov=vit_jax --cov-branch --cov-report=term:skip-covered --cov-fail-under=90
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
	$(TOOLS)/bin/python -m pip install --quiet --no-compile --no-deps --require-hashes --requirement $<
	touch $@

# Takes up the newest of everything; requirements/*.in and pyproject.toml say what setup.py cannot.
lock: $(TOOLS)/installed
	$(COMPILE) requirements/newest.txt setup.py requirements/newest.in \
		--extra export-newest --extra docs --extra test
	$(COMPILE) requirements/pinned.txt setup.py --extra export --extra peers --extra test
	$(COMPILE) requirements/build.txt requirements/build.in
	$(COMPILE) requirements/tools.txt requirements/tools.in

# What has been released since the locks were made.
outdated: $(VENV)/installed
	$(RUN) -m pip list --outdated --retries 0 --timeout 5

# Asks PyPI for the known vulnerabilities of what is locked. What it cannot ask about is a failure.
audit: $(TOOLS)/installed
	@for lock in newest pinned build tools; do \
		$(TOOLS)/bin/pip-audit --strict --disable-pip --progress-spinner off \
			--requirement requirements/$$lock.txt 2> $(TOOLS)/audit.log; \
		code=$$?; echo "$$lock: $$(tail -n 1 $(TOOLS)/audit.log)"; [ $$code = 0 ] || exit $$code; \
	done

# The licenses of what is installed; one of the GNU family is a failure. pip-licenses splits Python's
# paths at their spaces, and lists nothing where there are some: it is given a link without.
licenses: $(VENV)/installed $(TOOLS)/installed
	@link=$$(mktemp -d /tmp/licenses.XXXXXX) && ln -s "$(VENV_PATH)" $$link/venv && \
		$(TOOLS)/bin/pip-licenses --python $$link/venv/bin/python --order license \
			--partial-match --fail-on "GPL;GNU"; \
	code=$$?; rm -r $$link; exit $$code

# Faults put into a copy of what is committed, one at a time, and the share that its tests let pass.
MUTATION := $(TOOLS)/mutation
COMMA := ,
define MUTATION_CONFIG
[cosmic-ray]
module-path = [$(patsubst %,"%"$(COMMA),$(MUTATED))]
test-command = "python tests/mutation/nearest.py $(MUTATED)"
timeout = 7200.0
[cosmic-ray.distributor]
name = "local"
[cosmic-ray.filters.operators-filter]
exclude-operators = ["core/ReplaceBinaryOperator_BitOr_.*"]  # which is that of types
endef
export MUTATION_CONFIG

mutation: $(VENV)/installed $(TOOLS)/installed
	rm -rf $(MUTATION) && git clone --quiet . $(MUTATION)
	echo "$$MUTATION_CONFIG" > $(MUTATION)/config.toml
	export $(CACHE) PATH="$(VENV_PATH)/bin:$(TOOLS_PATH)/bin:$$PATH" && tools="$(TOOLS_PATH)" && \
		cd $(MUTATION) && export PYTHONPATH="$$PWD" && \
		cosmic-ray init config.toml session && cr-filter-operators session config.toml && \
		"$$tools/bin/python" tests/mutation/sample.py session $(SAMPLE) $(SEED) && \
		cosmic-ray baseline config.toml && cosmic-ray exec config.toml session && \
		cr-report --surviving-only --show-diff session && cr-rate --fail-over 20 session

clean:
	rm -rf $(VENV) $(TOOLS) site
