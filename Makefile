# updetr: `make pretrain` learns on real photos, `make test` runs every test.
# Both first set up .venv where it is missing or older than the pins in requirements.txt.
#
#   make pretrain ARGS="-p seed 1"     parameters of nbs/pretrain.ipynb
#   make pretrain preset=paper ARGS="-p data /data/imagenet"
#                                      the paper's recipe on all GPUs, instead of the demo
#   make test ARGS="-k boxes"          options of pytest
#   make pretrain REPORT=reports/pretrain
#                                      where the report goes; runs/ is ignored by git, reports/ is what the repository keeps
#   make PYTHON=python3.12 ...         the Python that .venv is made with (3.10 to 3.14)

PYTHON ?= python3
ARGS   ?=
scale  ?= toy
preset ?= demo

VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
RUN    := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY)
PIP    := $(PY) -m pip --disable-pip-version-check --no-input
REPORT  := runs/reports/pretrain
REPORTS := runs/reports
# One GPU is enough for the demo, whose batches of 4 photos cannot be divided among 8; ARGS="-p gpus 4" takes others.
DEMO_GPUS = $(if $(filter paper,$(preset) $(ARGS)),,-p gpus $$($(PY) -c 'import torch; print(min(1, torch.cuda.device_count()))'))

# Nothing from the caller's shell may change what runs: neither another Python's packages and kernels
# (jupyter would look in JUPYTER_PATH and in ~/.local first) nor a matplotlib backend that draws no pictures
# into notebooks (unset, kernels draw inline and scripts need no display). Nothing may stop in a pager.
unexport PYTHONPATH PYTHONHOME JUPYTER_PATH MPLBACKEND
export JUPYTER_PREFER_ENV_PATH := 1
export PYTHONNOUSERSITE := 1
export PAGER := cat
export GIT_PAGER := cat

.DELETE_ON_ERROR:
.PHONY: help setup pretrain test reports readme docs

help:
	@echo 'make pretrain   pre-train on the built-in photos, report in $(REPORT)/   (ARGS="-p seed 1": parameters)'
	@echo '                preset=paper ARGS="-p data FOLDER": the paper'"'"'s recipe on all GPUs, on photos of yours'
	@echo 'make test       every test                                              (ARGS="-k boxes": pytest options)'
	@echo 'make reports    every table and figure, at scale=toy, small, mini or paper, in $(REPORTS)/ (ARGS="--only table1_voc -p seeds 1")'
	@echo 'make readme     README.md from nbs/index.ipynb'
	@echo 'make docs       every notebook and report as a site with search, in _docs/site/'
	@echo 'make setup      only the set-up of $(VENV), which the others do by themselves'

setup: $(STAMP)

pretrain: $(STAMP)
	@mkdir -p $(REPORT)
	@echo 'updetr: pre-training, preset $(preset); executed notebook, figures and numbers in $(REPORT)/'
	$(RUN) -m papermill --log-output -k python3 nbs/pretrain.ipynb $(REPORT)/pretrain.ipynb -p report $(REPORT) -p preset $(preset) $(DEMO_GPUS) $(ARGS)
	@echo 'updetr: pre-trained; look at $(REPORT)/pretrain.ipynb, or drag patches in nbs/localize.ipynb'

test: $(STAMP)
	@echo 'updetr: every notebook and every test; what needs a GPU, a browser or UPDETR_DATA is skipped where there is none'
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $$($(PY) -c 'import os; print(min(4, os.cpu_count() + 1))') $(ARGS)

reports: $(STAMP)
	$(RUN) -c 'from updetr.experiments.all_reports import main; main()' --scale $(scale) --to $(REPORTS) $(ARGS)

readme: $(STAMP)
	$(RUN) tests/tools/readme.py

docs: $(STAMP)
	$(RUN) tests/tools/site.py

# For Python 3.15 numpy, scipy, scikit-image and torch have no wheels.
# The stamp is written last, so an interrupted installation leaves none and the next `make` goes on where it stopped.
$(STAMP): $(PY) requirements.txt pyproject.toml
	@rm -f $@
	@$(PY) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' || { \
	  echo "updetr: the Python in $(VENV) is not of 3.10 to 3.14: remove the folder $(VENV) and run make again." >&2; exit 1; }
	@$(PIP) --version > /dev/null 2>&1 || $(PY) -m ensurepip
	$(PIP) install 'pip>=23.1'
	$(PIP) install -r requirements.txt
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

# Scripts in $(VENV) and its link to the package name this folder: where it was moved or copied, it is made anew.
ifneq ($(shell cat $(VENV)/.place 2> /dev/null || pwd -P),$(CURDIR))
.PHONY: $(PY)
endif
$(PY):
	@command -v $(PYTHON) > /dev/null || { \
	  echo "updetr: there is no '$(PYTHON)' here. Install Python 3.10 to 3.14, or name yours: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' || { \
	  echo "updetr: Python 3.10 to 3.14 is needed, '$(PYTHON)' is `$(PYTHON) -V 2>&1`. Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null || { \
	  echo "updetr: '$(PYTHON)' cannot make virtual environments (no venv or ensurepip)." \
	       "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@pwd -P > $(VENV)/.place
