# make help shows what there is. Every target sets up what is missing first, through install.sh.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := .venv/bin
DEEPSPEED_CONFIG ?= ds_configs/zero3.json
TRAIN_ARGS ?=
PYTEST_ARGS ?=
FUZZ_EXAMPLES ?= 20000
# As many ranks as there are GPUs; two on a machine without.
RANKS ?= $(shell n=$$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true); echo $$((n > 0 ? n : 2)))
# One core's threads each: ranks that all take every core stand in each other's way.
OMP_NUM_THREADS ?= $(shell n=$$(( $$(getconf _NPROCESSORS_ONLN) / $(RANKS) )); echo $$((n > 0 ? n : 1)))
export OMP_NUM_THREADS
# Tests go on in lanes beside each other, a file of tests in one lane: a launch of two ranks waits, and imports, for much
# of its time.
LANES ?= $(shell n=$$(( $$(getconf _NPROCESSORS_ONLN) / 2 )); echo $$((n > 2 ? n : 2)))
# Without a GPU, say so: DeepSpeed warns where it has to find out.
ifeq ($(shell nvidia-smi -L 2>/dev/null),)
export DS_ACCELERATOR ?= cpu
endif

.PHONY: help install packages train test test-matrix test-soak fuzz check format

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: ## set up .venv, or bring it up to date
	@./install.sh

train: install ## set up, then train the demo through the deepspeed launcher (RANKS=, DEEPSPEED_CONFIG=, TRAIN_ARGS=)
	@if [[ -e runs/demo ]]; then \
		old="runs/demo-before-$$(date +%Y%m%d-%H%M%S)"; mv runs/demo "$$old"; echo "make: the last demo run is now in $$old"; \
	fi
	@port=$$($(BIN)/python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'); \
	PATH="$$PWD/$(BIN):$$PATH" deepspeed --log_level error --num_gpus $(RANKS) --master_port "$$port" \
		launcher/train.py train_configs/demo.yaml --deepspeed $(DEEPSPEED_CONFIG) $(TRAIN_ARGS)

test: packages install ## set up, then run all tests, as root with a SLURM and hosts of their own (LANES=, PYTEST_ARGS=)
	@PATH="$$PWD/$(BIN):$$PATH" python -m pytest -n $(LANES) --dist loadfile --no-loadscope-reorder --durations 10 $(PYTEST_ARGS)

packages:
	@tests/packages.sh

test-matrix: install ## layouts that cover every triple of choices, against the oracle; long
	@PATH="$$PWD/$(BIN):$$PATH" python -m pytest -m matrix $(PYTEST_ARGS)

test-soak: install ## runs that are killed 100 times over ZeRO stages, async saving and LoRA (SOAK_KILLS=, SOAK_SEED=); half an hour
	@PATH="$$PWD/$(BIN):$$PATH" python -m pytest -m soak -s $(PYTEST_ARGS)

fuzz: install ## FUZZ_EXAMPLES hostile inputs, other ones each time (make test draws 2,000, always the same)
	@PATH="$$PWD/$(BIN):$$PATH" FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) python -m pytest tests/fuzz $(PYTEST_ARGS)

check: install ## style, types, the direction of imports, the size budget
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/python -m pytest -q tests/unit/test_style_budget.py

format: install ## let ruff put the sources in order
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
