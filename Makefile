# `make train` and `make test` are all a fresh machine needs; everything they install lies in .venv
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python mmgen.py

train: $(VENV)/installed
	$(RUN) train --phase multi --resume

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -q test_mmgen.py

# Times mmgen against plain code
bench: $(VENV)/installed
	$(VENV)/bin/python test_mmgen.py

# Ten thousand damaged files; FUZZ_SEED=N tries others
fuzz: $(VENV)/installed
	FUZZ_CASES=10000 $(VENV)/bin/python -m pytest -q -s test_mmgen.py -k damaged_files

$(VENV)/installed: Makefile
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q torch==2.13.0 numpy pytest
	touch $@

clean:
	rm -rf $(VENV) checkpoints results data/drawn.npz

.PHONY: train test bench fuzz clean
