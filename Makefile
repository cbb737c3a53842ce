# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
# The newest JAX that this Python can have; EXTRAS=export,test is the pinned one, for a SavedModel.
EXTRAS ?= export-newest,test
# Processes that tests run in, each of up to 8 GB, and further flags of pytest.
JOBS ?= 2
FLAGS ?=
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet

.PHONY: demo test lint doctor clean

demo: $(VENV)/installed
	$(RUN) -m vit_jax.doctor
	$(RUN) -m vit_jax.main --config configs/digits.py
	$(RUN) experiments/training_curves.py runs/digits
	$(RUN) -m vit_jax.predict --checkpoint runs/digits docs/seven.png
	$(RUN) -m vit_jax.export --checkpoint runs/digits --output runs/digits/export --latency_seconds 0.5

test: $(VENV)/installed
	JAX_COMPILATION_CACHE_DIR=$(VENV)/xla JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
		$(RUN) -m pytest -n $(JOBS) --dist loadfile $(FLAGS)

doctor: $(VENV)/installed
	$(RUN) -m vit_jax.doctor

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/installed: setup.py vit_jax/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11: use make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[$(EXTRAS)]'
	$(if $(findstring export-newest,$(EXTRAS)),$(PIP) --no-deps jax2onnx)
	touch $@

clean:
	rm -rf $(VENV)
