# The study as a dependency graph. `make help` lists the targets.
#
#   VENV=    folder of the environment that make builds (.venv)
#   PY=      an existing interpreter to use instead, e.g. PY=python3
#   DATA_ROOT=  folder of the data sets, read by the scripts themselves (./data)

VENV ?= .venv
PY ?= $(VENV)/bin/python
DEMO := results/demo

# with an interpreter of the user's own there is nothing to install
ifeq ($(PY),$(VENV)/bin/python)
ENV := $(VENV)/.installed
endif

.PHONY: help demo test bench data env
.DELETE_ON_ERROR:

help:
	@echo "make demo   environment, data, a short training of both base models, figures in $(DEMO)/"
	@echo "make test   environment, all tests"
	@echo "make bench  speed of the training step and of average precision, as ratios"
	@echo "make data   fetch and check the data sets"

env: $(ENV)

$(VENV)/.installed: requirements.txt requirements-dev.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

data: $(ENV)
	$(PY) data.py

demo: data
	$(PY) train_cls.py --epochs 1 --out $(DEMO)/fashion
	$(PY) interpret.py --checkpoint $(DEMO)/fashion/seed0.pt --figure $(DEMO)/fashion.png
	$(PY) train_seg.py --size 128 --epochs 2 --batch 8 --lr 2e-3 --warmup 0.3 --out $(DEMO)/facades
	$(PY) interpret.py --checkpoint $(DEMO)/facades/seed0.pt --figure $(DEMO)/facades.png

test: $(ENV)
	$(PY) -m pytest -q

bench: $(ENV)
	PYTHONPATH=. $(PY) tests/bench.py
