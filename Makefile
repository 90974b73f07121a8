PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  ?= torch==2.13.0
OUT    ?= out/gpu-check

# FASTSEQ_NO_EXT=1 asks for an installation without the extension; otherwise make requires it.
NO_EXT  := $(filter-out 0,$(FASTSEQ_NO_EXT))
REQUIRE := $(if $(NO_EXT),numba,cpp,numba)
DONE    := $(VENV)/.installed$(if $(NO_EXT),-no-ext)

SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.PHONY: demo test lint bench bench-full bench-smoke bench-guard bench-compare report gpu-aot cuda-check gpu-check clean

demo: $(DONE)  ## train and run a character-level LSTM, as it is and accelerated
	$(BIN)/python examples/char_lm.py

test: $(DONE)  ## all tests; a missing C++ extension or numba is a failure, not a skip
	FASTSEQ_REQUIRE=$(REQUIRE) $(BIN)/python -m pytest tests
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 FASTSEQ_REQUIRE=$(REQUIRE),triton $(BIN)/python -m pytest -n auto tests/test_triton_*.py

lint: $(DONE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Both need a machine with nothing else to do, and leave what make report reads.
bench: $(VENV)/.bench  ## representative cases of every family against every peer, and series: 15 minutes
	mkdir -p out
	$(BIN)/python -m pytest benches --representative --benchmark-json=out/bench.json

bench-full: $(VENV)/.bench  ## every case against every peer, and series: over an hour
	mkdir -p out
	$(BIN)/python -m pytest benches --benchmark-json=out/bench.json

bench-smoke: $(VENV)/.bench
	$(BIN)/python -m pytest benches --smoke

report: $(VENV)/.bench  ## docs/performance.md with its figures, docs/performance.html and the README's results
	$(BIN)/python benches/performance.py out/bench.json

bench-guard: $(DONE)  ## instructions of key kernels, counted by valgrind, against those on record; UPDATE=1 records
	$(BIN)/python benches/instructions.py $(if $(filter-out 0,$(UPDATE)),--update)

bench-compare: $(DONE)  ## this version's speed against that of BASE, a git ref; CASES=text: cases that have it in their name
	$(BIN)/python benches/compare.py $(if $(CASES),--cases '$(CASES)') -- $(BASE)

gpu-aot: $(DONE)  ## Triton kernels compiled for GPUs that need not be here, in every configuration: 5 minutes
	$(BIN)/python tests/aot.py

cuda-check: $(DONE)  ## CUDA kernels compiled by nvcc for GPUs that need not be here: registers, spills, warnings
	$(BIN)/python tests/cuda_check.py

# Needs no network: what has to be installed is, or the first Python with torch says what is missing.
gpu-check:  ## tests and races on an NVIDIA GPU, all files into OUT; DRY=1 without one: whether they could run
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benches/gpu_check.py --out $(OUT) $(if $(filter-out 0,$(DRY)),--dry)

clean:
	rm -rf $(VENV) build out fastseq/*.so *.egg-info
	-git worktree prune  # out/ may have held bases of bench-compare

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" ninja numpy
	touch $@

# The dependencies first, then the package: no isolated build environment, which would fetch another torch.
$(DONE): $(VENV)/.torch $(SOURCES)
	rm -f $(VENV)/.installed*
	FASTSEQ_REQUIRE=$(REQUIRE) $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[demo,test,lint]'
	touch $@

$(VENV)/.bench: $(DONE)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[bench]'
	touch $@
