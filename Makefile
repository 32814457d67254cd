# The study as a dependency graph: every row's record of every seed is a file that is made once.
#
#   make demo | test | bench | data      see `make help`
#   make table1 table2 claims figures    all rows, all seeds, then the tables, the verdicts and the figures
#   make table2/no-inter-skip            one row
#   make interpret                       attention and shift invariance: surrogates, measurements, figures
#
#   PROTOCOL=  report (default, for a GPU: three or four rows side by side unless -j or RUN= say otherwise),
#              desk (two CPU cores: two rows side by side unless -j says otherwise), smoke (seconds)
#   DATA=      a folder of your own images, see docs/own-data.md: the table that fits it, into
#              results/PROTOCOL-FOLDER; FLAGS= for every row of it, e.g. FLAGS="--size 96 --epochs 60"
#   SEEDS=     "0 1 2 3 4 5" (report), "0 1 2" (desk), 0 (smoke)
#   DEVICE=    auto, cpu, cuda, cuda:1
#   RUN=       a launcher before every row's command, e.g. RUN="srun --gpus=1"
#   PY=        an interpreter that has the packages, instead of the environment that make builds in .venv

# ---- the rows: a name and the flags of its training script; to add a row, add a line ----

table1/maxpool-2-32             :=
table1/stride-2-32              := --down stride
table1/stride-2-32-noskip       := --down stride --no-skip
table1/stride-2-32-nobn         := --down stride --no-norm
table1/stride-2-32-noact        := --down stride --act none
table1/stride-2-32-gelu         := --down stride --act gelu
table1/stride-1-32              := --down stride --depth 1
table1/stride-4-32              := --down stride --depth 4
table1/stride-2-16              := --down stride --width 16
table1/stride-2-64              := --down stride --width 64
table1/maxpool-1-32             := --depth 1
table1/maxpool-4-32             := --depth 4
table1/maxpool-2-16             := --width 16
table1/maxpool-2-64             := --width 64
table1/maxpool-2-32-noact       := --act none
table1/maxpool-2-32-transformer := --block transformer
table1/blurpool-2-32            := --down blurpool

table2/standard                 :=
table2/unet                     := --arch unet
table2/no-intra-skip            := --no-intra-skip
table2/no-inter-skip            := --no-inter-skip
table2/no-bn                    := --no-norm
table2/no-act                   := --act none
table2/ce                       := --loss ce
table2/dice                     := --loss dice
table2/hourglass-1-32           := --hourglasses 1
table2/hourglass-4-32           := --hourglasses 4
table2/hourglass-2-16           := --width 16
table2/hourglass-2-64           := --width 64
table2/no-dropout               := --dropout 0
table2/stride                   := --down stride
table2/stride-no-act            := --down stride --act none

script/table1 := train_cls.py
script/table2 := train_seg.py

# ---- the surrogates of the attention study: classifiers of grids, their digit 3 tied to Trouser ever more strongly ----

surrogates/frozen-tie0    := --frozen --epochs 1 --lr 1e-2 --tie 0
surrogates/frozen-tie0.5  := --frozen --epochs 1 --lr 1e-2 --tie 0.5
surrogates/frozen-tie0.9  := --frozen --epochs 1 --lr 1e-2 --tie 0.9
surrogates/frozen-tie1    := --frozen --epochs 1 --lr 1e-2 --tie 1
surrogates/scratch-tie0   := --tie 0
surrogates/scratch-tie0.5 := --tie 0.5
surrogates/scratch-tie0.9 := --tie 0.9
surrogates/scratch-tie1   := --tie 1

# fewer grids in more steps where there is no GPU
composites/desk := --train-images 20000 --batch 32
measure/desk := --sweep-images 128
measure/smoke := --images 64 --sweep-images 2

# how far features are from moving with the image is measured for these rows of Table 1
EQUIVARIANCE := maxpool-2-32 blurpool-2-32 stride-2-32
equivariance/desk := --sweep-images 128
equivariance/smoke := --sweep-images 2

# ---- the environment ----

VENV ?= .venv
PY ?= $(VENV)/bin/python
DEMO := results/demo

# with an interpreter of the user's own there is nothing to install
ifeq ($(PY),$(VENV)/bin/python)
ENV := $(VENV)/.installed
endif

# the rows that are exported; the first of them is timed as well (bench-inference), at 256 pixels a side
EXPORTED := table2/standard table1/maxpool-2-32

.PHONY: page page-networks test-page
.PHONY: help env data demo test faults fuzz bench gpu table1 table2 claims figures interpret export bench-inference
.DELETE_ON_ERROR:
help:
	@echo "make demo           environment, data, a short training of both base models, figures in $(DEMO)/"
	@echo "make test           environment, all tests"
	@echo "make faults         runs that are killed again and again must end with the same bits"
	@echo "make fuzz           mutated IDX files and archives, guided by coverage (SECONDS= each; needs pip install atheris)"
	@echo "make gpu            the first minutes on a GPU: checks, a verdict each, then the missing rows"
	@echo "                    until SECONDS=540 are over, and all records in one archive"
	@echo "make bench          speed of the training step and of average precision, as ratios"
	@echo "make export         both base models as TorchScript, ONNX, int8 ONNX and AOTInductor, proven equal (PROTOCOL=)"
	@echo "make bench-inference  speed and memory of all these forms, side by side (PROTOCOL=)"
	@echo "make data           fetch and check the data sets"
	@echo "make table1 table2  the study: all rows, all seeds (PROTOCOL= SEEDS= DEVICE= RUN= PY=, see the Makefile)"
	@echo "make table1 table2 DATA=FOLDER   the same on images of your own (FLAGS=, see docs/own-data.md)"
	@echo "make page           the networks and the tables in a browser: a static site in build/page/ (needs npm)"
	@echo "make test-page      the same in headless chromium, against ONNX Runtime and predict.py"
	@echo "make claims figures the verdicts on the report's claims, and all figures; runs what is missing"
	@echo "make table2/unet SEEDS=0   one row, one seed; python study.py table2, claims, figures: from what was run"
	@echo "make cpp/runner     the C++ program that runs exported models"
	@echo "make interpret      where the models look and what a shift does to them"

env: $(ENV)

$(VENV)/.installed: requirements.txt requirements-dev.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

data: $(ENV)
	$(PY) data.py

demo: data
	$(PY) train_cls.py --train-images 20000 --epochs 1 --lr 2e-3 --warmup 0.2 --out $(DEMO)/fashion
	$(PY) interpret.py --checkpoint $(DEMO)/fashion/seed0.pt --figure $(DEMO)/fashion.png
	$(PY) train_seg.py --size 96 --width 16 --epochs 5 --batch 8 --lr 2e-3 --warmup 0.3 --out $(DEMO)/facades
	$(PY) interpret.py --checkpoint $(DEMO)/facades/seed0.pt --figure $(DEMO)/facades.png

test: $(ENV)
	$(PY) -m pytest -q $(shell $(PY) -c "import xdist" 2>/dev/null && echo "-n auto --maxprocesses 4 --dist loadfile")

bench: $(ENV)
	PYTHONPATH=. $(PY) tests/bench.py

faults: $(ENV)
	PYTHONPATH=. $(PY) tests/faults.py --rounds 44

fuzz: SECONDS ?= 60
fuzz: $(ENV)
	PYTHONPATH=. $(PY) tests/fuzz.py idx --seconds $(SECONDS)
	PYTHONPATH=. $(PY) tests/fuzz.py archive --seconds $(SECONDS)

# once its seconds are over nothing runs any more; what ran goes on with the same command
gpu: SECONDS ?= 540
gpu: $(ENV)
	$(PY) tests/gpu.py --protocol $(PROTOCOL) --seeds $(SEEDS) --seconds $(SECONDS) \
	  --device $(DEVICE:auto=cuda) --results $(RESULTS)

# ---- the study ----

PROTOCOL ?= report
PROTOCOLS := report desk smoke
# before anything runs: a wrong name would make an empty table
ifneq ($(words $(PROTOCOL)) $(filter $(PROTOCOLS),$(PROTOCOL)),1 $(PROTOCOL))
$(error PROTOCOL=$(PROTOCOL) must be one of: $(PROTOCOLS))
endif
SEEDS ?= $(SEEDS_$(PROTOCOL))
SEEDS_report := 0 1 2 3 4 5
SEEDS_desk := 0 1 2
SEEDS_smoke := 0
DEVICE ?= auto
# not what a shell has by these names
RUN :=
FLAGS :=
ifeq ($(PROTOCOL),desk)
# where there is no GPU one row leaves cores idle: two side by side, each on half of them
MAKEFLAGS += -j2
RUN := env OMP_NUM_THREADS=$(shell echo $$(( ($$(getconf _NPROCESSORS_ONLN) + 1) / 2 )))
endif
ifeq ($(PROTOCOL),report)
# one row leaves most of a GPU idle: four of Table 1 side by side, or three of Table 2
ifneq ($(origin RUN),command line)
MAKEFLAGS += -j$(if $(filter-out table1% rows/table1,$(MAKECMDGOALS)),3,4)
RUN := env OMP_NUM_THREADS=2
endif
endif

ifeq ($(DATA)$(origin FLAGS),command line)
$(error FLAGS=$(FLAGS) is for every row of DATA=; the rows of the study share their protocol's settings)
endif

# the study of another set than the report's, a folder of the user's: docs/own-data.md
SET := $(PROTOCOL)
OWN := table1 table2
ifneq ($(DATA),)
ifeq ($(shell test -d "$(DATA)" && echo yes),)
$(error DATA=$(DATA) is no folder: see docs/own-data.md)
endif
ifneq ($(filter interpret rows/attention gpu,$(MAKECMDGOALS)),)
$(error $(MAKECMDGOALS) DATA=$(DATA): surrogates and GPU checks are of the study's own sets; with DATA there are table1, table2, claims, figures and export)
endif
# found here, and not when all rows are trained: a run that held out other images is in no table
ifneq ($(findstring --split dev,$(strip $(subst =, ,$(FLAGS)))),)
$(error FLAGS=$(FLAGS): a table is of the test split, and --split dev does not read it; compare settings with single runs of the training script)
endif
# the folder's name, for files and flags; where that leaves something out, a hash tells such folders apart
NAME := $(shell name="$$(basename "$$(realpath "$(DATA)")")"; \
  plain="$$(printf %s "$$name" | LC_ALL=C tr -c 'A-Za-z0-9._-' '-' | sed 's/^[-.]*//')"; \
  hash="$$(printf %08x "$$(printf %s "$$name" | cksum | cut -d' ' -f1)")"; \
  if [ "$$plain" = "$$name" ]; then echo "$$name"; else echo "$${plain:+$$plain-}$$hash"; fi)
SET := $(PROTOCOL)-$(NAME)
OWN := $(shell if [ -e "$(DATA)/classes.txt" ]; then echo table2; else echo table1; fi)
FLAGS_DATA := --data "$(DATA)"
PLAN := plan
endif
STUDY = $(PY) study.py $(1) --protocol $(PROTOCOL) $(if $(DATA),--name=$(NAME)) --results $(dir $(RESULTS))

RESULTS := results/$(SET)
# the names before an = above, in the order of their lines, which is the report's: .VARIABLES has no order
named = $(shell sed -nE 's|^($(1)/[^[:space:]:=]+)[[:space:]]*[:?+]*=.*|\1|p' $(firstword $(MAKEFILE_LIST)))
ROWS := $(call named,table[12])
# read so far: a row further down would get the flags of none, and train the base row under its name
$(foreach row,$(ROWS) $(call named,surrogates),$(if $(filter undefined,$(origin $(row))),$(error $(row): write its line among those of the other rows, not below)))

# in seed order, so that one seed of every row exists before the second of any
records = $(foreach seed,$(SEEDS),$(patsubst %,$(RESULTS)/%/seed$(seed).json,$(1)))

# of a set of one's own there are no surrogates
figures: $(OWN) $(RESULTS)/predictions.png $(if $(DATA),,$(addprefix $(RESULTS)/,attention.md attention.png hourglass.png))
	$(call STUDY,figures)

$(OWN) claims: %: $(RESULTS)/%.md
	@cat $<

# the other table's networks are for another task
$(filter-out $(OWN),table1 table2):
	@echo "$@ is left out: $(DATA) is a set for $(OWN) ($(if $(filter table2,$(OWN)),it has a,without) classes.txt)"

$(RESULTS)/claims.md: $(OWN:%=$(RESULTS)/%.md) $(if $(DATA),,$(RESULTS)/attention.md)

$(RESULTS)/table1.md: $(call records,$(filter table1/%,$(ROWS)))
$(RESULTS)/table2.md: $(call records,$(filter table2/%,$(ROWS)))
# what computes and renders them: a change there makes tables anew, of the same records
RENDERS := study.py metrics.py $(wildcard lab/*.py)
$(RESULTS)/table1.md $(RESULTS)/table2.md $(RESULTS)/attention.md $(RESULTS)/claims.md: $(RENDERS) | $(ENV) $(PLAN)
	$(call STUDY,$(basename $(@F))) --seeds $(words $(SEEDS))

# the records alone, without table and page
.PHONY: rows/table1 rows/table2 rows/attention
rows/table1: $(call records,$(filter table1/%,$(ROWS)))
rows/table2: $(call records,$(filter table2/%,$(ROWS)))

.PHONY: $(ROWS)
$(foreach row,$(ROWS),$(eval $(row): $(call records,$(row))))

# Rows of Table 2 without the photos would be of drawn ones. Where there are none, the first such row that is to run has
# one try to fetch them come before it; if that fails it says why, and drawn ones it is. For smoke these are good enough.
# The name is of no file, as a path may have spaces, and secondary, so that rows that all exist ask for no photos.
FACADES := $(if $(DATA)$(filter smoke,$(PROTOCOL)),,$(shell test -e "$(or $(DATA_ROOT),data)/mini_facade" || echo facades))
.SECONDARY: facades
facades: | $(ENV)
	$(PY) data.py --only facades
needs = $(ENV) $(if $(filter table2/%,$(1)),$(FACADES))

# a record depends on nothing that changes: what exists is not run again; what is broken off resumes
TRAIN = $(RUN) $(PY) $(script/$(1)) --protocol $(PROTOCOL) --device $(DEVICE) $(if $(DATA),$(FLAGS_DATA) $(FLAGS))
define row_rule
$(RESULTS)/$(1)/seed%.json: | $(call needs,$(1)) $(PLAN)
	$(call TRAIN,$(patsubst %/,%,$(dir $(1)))) --seed $$* $($(1)) --out $$(@D)
endef
$(foreach row,$(ROWS),$(eval $(call row_rule,$(row))))

# What all rows of a set of one's own will take, said before the first of them runs. And every time: records of other
# images or FLAGS, which lie where those of this folder would, are refused.
.PHONY: plan
plan: | $(ENV)
	@mkdir -p $(RESULTS)
	@said="$$({ $(foreach row,$(filter $(OWN)/%,$(ROWS)),echo "$($(row)) --out $(RESULTS)/$(row)";) } | $(call TRAIN,$(OWN)) --plan $(words $(SEEDS)))" && { test -e $(RESULTS)/plan.txt || echo "$$said" | tee $(RESULTS)/plan.txt; }

# ---- attention and shift invariance: measured on trained weights, which are not committed ----

# A run is deterministic, so where the study was not run here the row is trained again, beside its committed record. Of a
# set of one's own it is a run of the table. The target is the run's record, which is written last: the checkpoint beside it
# is whole once it is there.
define weights_rule
runs/$(SET)/$(1)/seed%.json: | $(call needs,$(1)) $(if $(DATA),$(RESULTS)/$(1)/seed%.json)
	mkdir -p $$(@D)
	if [ -f $(RESULTS)/$(1)/seed$$*.json ] && [ -f $(RESULTS)/$(1)/seed$$*.pt ]; \
	then cp $(RESULTS)/$(1)/seed$$*.pt $(RESULTS)/$(1)/seed$$*.json $$(@D); \
	else $(call TRAIN,$(patsubst %/,%,$(dir $(1)))) --seed $$* $($(1)) --out $$(@D); fi
endef
$(foreach row,$(ROWS),$(eval $(call weights_rule,$(row))))
# asked for on the way to these weights alone, a run stays all the same
.PRECIOUS: $(ROWS:%=$(RESULTS)/%/seed%.json)

SURROGATES := $(call named,surrogates)
base := runs/$(SET)/table1/maxpool-2-32/seed
define surrogate_rule
runs/$(SET)/$(1)/seed%.json: | $(ENV) $(if $(filter --frozen,$($(1))),$(base)%.json)
	$(RUN) $(PY) train_cls.py --protocol $(PROTOCOL) --seed $$* --device $(DEVICE) --composites $(composites/$(PROTOCOL)) $($(1)) $(if $(filter --frozen,$($(1))),--base $(base)$$*.pt) --out $$(@D)
endef
$(foreach row,$(SURROGATES),$(eval $(call surrogate_rule,$(row))))

attention := $(patsubst surrogates/%,attention/%,$(SURROGATES))
equivariance := $(patsubst %,equivariance/%,$(EQUIVARIANCE))
define attention_rule
$(RESULTS)/attention/$(1)/seed%.json: | runs/$(SET)/surrogates/$(1)/seed%.json
	$(RUN) $(PY) interpret.py measure --checkpoint runs/$(SET)/surrogates/$(1)/seed$$*.pt --device $(DEVICE) $(measure/$(PROTOCOL)) --out $$(@D)
endef
define equivariance_rule
$(RESULTS)/equivariance/$(1)/seed%.json: | runs/$(SET)/table1/$(1)/seed%.json
	$(RUN) $(PY) interpret.py measure --checkpoint runs/$(SET)/table1/$(1)/seed$$*.pt --device $(DEVICE) $(equivariance/$(PROTOCOL)) --out $$(@D)
endef
$(foreach row,$(SURROGATES),$(eval $(call attention_rule,$(notdir $(row)))))
$(foreach row,$(EQUIVARIANCE),$(eval $(call equivariance_rule,$(row))))

interpret: $(RESULTS)/attention.md $(RESULTS)/attention.png
	@cat $<
	$(if $(filter figures,$(MAKECMDGOALS)),,$(call STUDY,figures))

rows/attention $(RESULTS)/attention.md: $(call records,$(attention) $(equivariance))

first := $(firstword $(SEEDS))
# The report's Figures 2, 1 and 4. Those of trained weights, which a clone lacks, ask for no code: it would train anew.
$(RESULTS)/hourglass.png: interpret.py models.py lab/figures.py | $(ENV)
	$(PY) interpret.py architecture --figure $@
$(RESULTS)/attention.png: | $(foreach kind,frozen scratch,runs/$(SET)/surrogates/$(kind)-tie0.9/seed$(first).json)
	$(PY) interpret.py attention $(foreach kind,frozen scratch,--$(kind) runs/$(SET)/surrogates/$(kind)-tie0.9/seed$(first).pt) --figure $@
shown := runs/$(SET)/$(if $(filter table2,$(OWN)),table2/standard,table1/maxpool-2-32)/seed$(first)
$(RESULTS)/predictions.png: | $(shown).json
	$(PY) interpret.py --checkpoint $(shown).pt $(FLAGS_DATA) --figure $@

# what is missing in runs/ is made only where a missing measurement needs it
.SECONDARY: $(foreach seed,$(SEEDS),$(patsubst %,runs/$(SET)/%/seed$(seed).json,$(ROWS) $(SURROGATES)))

# ---- deployment ----

TRAINED := $(patsubst %,runs/$(SET)/%/seed0,$(filter $(OWN:%=%/%),$(EXPORTED)))

export: $(TRAINED:=/parity.json)

# written last: where it exists, the models beside it passed
$(TRAINED:=/parity.json): %/parity.json: %.json
	$(PY) export.py --checkpoint $*.pt --device $(DEVICE) $(FLAGS_DATA)

# asked for both, the bench waits until the machine is quiet
bench-inference: $(firstword $(TRAINED))/parity.json cpp/runner | $(filter export,$(MAKECMDGOALS))
	$(PY) export.py bench --checkpoint $(firstword $(TRAINED)).pt --device $(DEVICE) $(FLAGS_DATA)

# needs libpng-dev and libjpeg-dev; linked like this, torch's CUDA build needs no CUDA toolkit; RPATH, not RUNPATH, since
# a .pt2 loads libtorch as well
cpp/runner: TORCH = $(shell $(PY) -c "import torch; print(torch.__path__[0])")
cpp/runner: cpp/runner.cpp cpp/images.h | $(ENV)
	$(CXX) -std=c++20 -O2 $< -o $@ -isystem "$(TORCH)/include" -isystem "$(TORCH)/include/torch/csrc/api/include" \
	  -L"$(TORCH)/lib" -Wl,-rpath,"$(TORCH)/lib",--disable-new-dtags,--as-needed -ltorch_cpu -lc10 -lpng -ljpeg

# ---- the page: networks and tables in a browser ----

# asked for more, it waits for what it shows
page: | $(ENV) $(filter page-networks table1 table2 claims figures interpret,$(MAKECMDGOALS))
	PYTHONPATH=. $(PY) web/build.py

# what it cannot find (chromium, playwright) it skips, and says so
test-page: page
	PAGE=build/page $(PY) -m pytest -q $(addprefix tests/test_page,.py _browser.py _use.py)

# the page's surrogates: each way to halve the image, frozen and from scratch, with and without the tie
page/frozen := --frozen --epochs 1 --lr 1e-2
PAGE_RUNS := $(foreach tie,0 0.9,$(foreach down,maxpool stride blurpool,$(down)-frozen-tie$(tie)) maxpool-scratch-tie$(tie))
define page_rule
runs/$(PROTOCOL)/page/$(1)-$(2)-tie$(3)/seed0.json: | $(ENV) $(if $(filter frozen,$(2)),runs/$(PROTOCOL)/table1/$(1)-2-32/seed0.json)
	$(RUN) $(PY) train_cls.py --protocol $(PROTOCOL) --seed 0 --device $(DEVICE) --composites $(composites/$(PROTOCOL)) --down $(1) --tie $(3) $(page/$(2)) $(if $(filter frozen,$(2)),--base runs/$(PROTOCOL)/table1/$(1)-2-32/seed0.pt) --out $$(@D)
endef
$(foreach down,maxpool stride blurpool,$(foreach kind,frozen scratch,$(foreach tie,0 0.9,$(eval $(call page_rule,$(down),$(kind),$(tie))))))

# web/models/ anew, of what the page was committed with: PROTOCOL=desk
page-networks: $(PAGE_RUNS:%=runs/$(PROTOCOL)/page/%/seed0.json) runs/$(PROTOCOL)/table2/standard/seed0.json
	PYTHONPATH=. $(PY) web/networks.py --runs runs/$(PROTOCOL) --records results/$(PROTOCOL)
