# make help lists the targets. Everything below runs in .venv, made on first use.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PY := $(abspath $(VENV))/bin/python
REQUIREMENTS := requirements.txt requirements-serve.txt requirements-dev.txt
# Set-up is skipped while the content of these files is unchanged: the mark carries their hash.
HASH := $(shell cat $(REQUIREMENTS) $(CONSTRAINTS) | sha256sum | cut -c1-16)
MARK := $(VENV)/.installed-$(HASH)
WORKERS ?= 2
# One thread a test process, no network, no telemetry. Hundreds of processes are started: they keep their bytecode.
TEST_ENV := PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 GRADIO_ANALYTICS_ENABLED=False TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

.PHONY: help setup setup-llamacpp doctor quick demo test test-all check style bench house clean
help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 18

setup: $(MARK)  ## make .venv and install requirements under constraints.txt
$(MARK):
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install $(foreach file,$(REQUIREMENTS),-r $(file)) -c $(CONSTRAINTS)
	rm -f $(VENV)/.installed-*
	touch $@

# The processor's instructions that llama.cpp is built for, by name: built for the "native" ones it would use AMX too,
# which many virtual machines list and deny. What runs here already is not built again.
CPU := $(shell grep -m1 ^flags /proc/cpuinfo 2>/dev/null)
has = $(if $(filter $(1),$(CPU)),ON,OFF)
LLAMACPP_BUILD := -DGGML_AVX=$(call has,avx) -DGGML_AVX2=$(call has,avx2) -DGGML_FMA=$(call has,fma) \
  -DGGML_F16C=$(call has,f16c) -DGGML_BMI2=$(call has,bmi2) -DGGML_AVX512=$(call has,avx512bw) \
  -DGGML_AVX512_VNNI=$(call has,avx512_vnni)
setup-llamacpp: setup  ## llama-cpp-python for the full tests, for this processor (builds about 5 minutes)
	PYTHONPATH=scripts $(PY) -c "from utils.gguf.llamacpp import require_llama_cpp as check; check('$@')" 2>/dev/null || { \
	  $(PY) -m pip uninstall --yes llama-cpp-python; \
	  CMAKE_ARGS="$(LLAMACPP_BUILD) $$CMAKE_ARGS" $(PY) -m pip install --no-cache-dir -r requirements-llamacpp.txt; }

doctor:  ## what is installed, what works here, what mends the rest
	PYTHON=$$(test -x $(PY) && echo $(PY) || echo $(PYTHON)) bash scripts/run_doctor.sh

quick: setup  ## a first look at the recipe in four or five minutes: up to a tuned model, its answers before and after
	PYTHON=$(PY) bash scripts/run_demo.sh --quick

demo: setup  ## the whole recipe on a laptop CPU, with a report in output/demo
	PYTHON=$(PY) bash scripts/run_demo.sh

test: setup  ## the tests, at most 6 minutes
	$(TEST_ENV) $(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not gpu" tests

test-all: setup-llamacpp  ## all counts: kills, fuzz, llama.cpp, full disks (at most 75 minutes)
	$(TEST_ENV) $(PY) -m pytest -n $(WORKERS) --dist worksteal tests

check: setup  ## lint, format, types, shell
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy scripts
	$(abspath $(VENV))/bin/shellcheck -x scripts/*.sh .ci/run

style: setup  ## mend what ruff can mend
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

house:  ## the wings of scripts/utils, their lines and arrows; draws pics/house.svg anew
	@$(PYTHON) tests/support/house.py pics/house.svg

bench: setup  ## side-by-side measurements into benchmarks/RESULTS.md
	PYTHON=$(PY) bash benchmarks/run_all.sh

clean:  ## remove what runs leave behind
	rm -rf output .pytest_cache .mypy_cache .ruff_cache
