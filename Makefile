PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  ?= torch==2.13.0

# FASTSEQ_NO_EXT=1 asks for an installation without the extension; otherwise make requires it.
NO_EXT  := $(filter-out 0,$(FASTSEQ_NO_EXT))
REQUIRE := $(if $(NO_EXT),,cpp)
DONE    := $(VENV)/.installed$(if $(NO_EXT),-no-ext)

SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: demo test lint bench bench-smoke clean

demo: $(DONE)  ## train and run a character-level LSTM, as it is and accelerated
	$(BIN)/python examples/char_lm.py

test: $(DONE)  ## all tests; a missing C++ extension is a failure, not a skip
	FASTSEQ_REQUIRE=$(REQUIRE) $(BIN)/python -m pytest tests

lint: $(DONE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench  ## every case against every peer, over 20 minutes
	$(BIN)/python -m pytest benches

bench-smoke: $(VENV)/.bench
	$(BIN)/python -m pytest benches --smoke

clean:
	rm -rf $(VENV) build out fastseq/*.so *.egg-info

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
