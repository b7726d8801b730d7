# Every command that runs something of the course sets the environment up first, a tenth of a second if nothing changed.
# Python 3.8 or later is enough to start: course_lib/machine/bootstrap.py finds Python 3.12 and uv.
PYTHON ?= $(shell command -v python3 || command -v python || echo python3)
COURSE := .venv/bin/course
# Without bytecode each of the eight ranks would compile some 7,000 modules again.
unexport PYTHONDONTWRITEBYTECODE
# The lessons choose the environment in .venv; an activated one must not leak in.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup run test test-changed lab book archive bench doctor gpu-bundle gpu-check lock-check environment clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: ## find or install uv and Python packages into this folder, nothing else
	@"$(PYTHON)" course_lib/machine/bootstrap.py

run: setup ## train on 8 ranks: lesson 03 without a browser, on mock data, then on real text
	@$(COURSE) lesson 03 --open-hint

test: setup ## run every test
	@.venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-changed: setup ## run the tests, without lessons that passed with the same content; never in CI
	@.venv/bin/python -m pytest --changed-only

lab: setup ## open JupyterLab on lesson 00, and import the stack for its first run meanwhile
	@$(COURSE) lab

book: setup ## build the book as HTML
	@.venv/bin/python -m book.builder

archive: setup ## build the book and pack it into one zip file, to read without a network
	@.venv/bin/python -m book.builder --archive

bench: setup ## measure the engine's speed
	@.venv/bin/python -m tests.bench

doctor: setup ## say what this machine can run, and what to mend
	@$(COURSE) doctor

gpu-bundle: setup ## with a network: pack what a node with a GPU and without one lacks (OPTIONS="--torch 2.11.0 --arch 90")
	@.venv/bin/python -m course_lib.machine.gpu.bundle $(OPTIONS)

# The environment of this folder if there is one, else the node's own Python, with its own packages: no set-up, no network.
gpu-check: ## on a node with a GPU: check the course on it, without a network (OPTIONS="--budget-seconds 500 --out DIR")
	@if [ -x .venv/bin/python ]; then exec .venv/bin/python -m course_lib.machine.gpu.check $(OPTIONS); \
	  else exec "$(PYTHON)" -m course_lib.machine.gpu.check $(OPTIONS); fi

lock-check: ## check that uv.lock fits pyproject.toml (needs uv)
	@PATH="$(CURDIR)/.tools/bin:$$PATH" uv lock --check

environment: ## write environment.yml again from uv.lock (needs uv)
	@PATH="$(CURDIR)/.tools/bin:$$PATH" uv export --locked --quiet --no-hashes --no-emit-project --no-annotate --no-header \
	  --output-file .environment.txt
	@(sed '/^  - pip:$$/q' environment.yml; sed 's/ ;.*//; s/^/      - /' .environment.txt) > .environment.yml
	@mv .environment.yml environment.yml && rm .environment.txt

clean: ## delete runs, executed lessons and the built book; keeps .venv
	rm -rf runs .lab book/_build book/lessons book/assets bench .pytest_cache .ruff_cache
