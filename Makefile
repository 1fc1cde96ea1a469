# Each target sets up what it needs. The trainer's environment is .venv, built from requirements.lock; the engine's
# environment and the model live in the user's cache (LOCKSTEP_CACHE), so that a second clone builds neither again.

PYTHON ?= $(shell for p in python3.11 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
BIN := .venv/bin
# Keyed on what .venv is built from, and made last: a half-built or an outdated one is never used. With LIGHT it can
# build the engine's environment, so that the trainer's packages and the engine's are unpacked side by side.
KEY := $(shell cat requirements.lock pyproject.toml | cksum | cut -d ' ' -f 1)
LIGHT := .venv/.light-$(KEY)
READY := .venv/.ready-$(KEY)
BENCH_READY := $(READY)-bench-$(shell cksum < requirements-bench.lock | cut -d ' ' -f 1)
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install -qq --no-compile
# Proves the environment before it is called ready, and compiles once what every run imports.
FIRST_IMPORT := import accelerate, beartype.claw, gguf, hypothesis, pyarrow.parquet, pytest, reasoning_gym, torch, \
	transformers.models.auto.modeling_auto, transformers.models.llama.modeling_llama, typer
# Many a container image sets it; then each process would compile again what it imports (a test worker: 12 s).
unexport PYTHONDONTWRITEBYTECODE

ENGINE := vllm==0.32.0
MODEL := smollm2-135m-instruct
PLATFORM := $(shell uname -s)-$(shell uname -m)
ifeq ($(filter $(PLATFORM),Linux-x86_64 Linux-aarch64),)
TRAIN_FLAGS := --engine transformers
endif

.PHONY: quickstart test test-unit chaos check faults bench migration migration-short migration-ready peers extras setup prepared engine engines model lock clean
.DEFAULT_GOAL := quickstart

quickstart: prepared
	$(BIN)/lockstep train recipes/quickstart.toml --continue $(TRAIN_FLAGS)

# Two at a time: an engine's start, most of what a test costs, takes one core. pytest tests/… alone runs in one process.
SIDE_BY_SIDE := -n 2 --dist loadgroup --no-loadscope-reorder

test: prepared
	$(BIN)/python -m pytest -m "not chaos and not long" $(SIDE_BY_SIDE)

chaos: prepared  # the long form of fuzz and kills
	$(BIN)/python -m pytest -m chaos $(SIDE_BY_SIDE)

test-unit: setup
	$(BIN)/python -m pytest tests/unit -m "not chaos" $(SIDE_BY_SIDE)

faults: prepared  # every planted fault in the real engine, and eight clean checks
	$(BIN)/lockstep faults recipes/quickstart.toml $(TRAIN_FLAGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --summary=none
	$(BIN)/lint-imports
	$(BIN)/python tests/check_sizes.py

bench: prepared $(BENCH_READY)
	@for file in benchmarks/*.py; do echo "$$ python $$file"; $(BIN)/python "$$file" || exit 1; done

migration: migration-ready  # the story, fix by fix, three seeds an arm: hours, it says how many; killed, it goes on
	$(BIN)/python benchmarks/migration.py --out runs/migration --page

migration-short: migration-ready  # one seed, four arms, a quarter of an hour; docs/ stays as it is
	$(BIN)/python benchmarks/migration.py --out runs/migration-short --short

migration-ready: setup model
	@for version in 0.8.5 0.18.1; do $(BIN)/lockstep engines install vllm==$$version || exit $$?; done

PEERS_READY := .venv-peers/.ready-$(shell cksum < requirements-peers.lock | cut -d ' ' -f 1)

peers: $(PEERS_READY)  # Lockstep's objectives beside TRL's and verl's own code; writes docs/reference/peers.md
	PYTHONPATH=src:. .venv-peers/bin/python -m tests.peers.compare

$(PEERS_READY):  # verl pins an older transformers than TRL's: what is compared needs neither's trainer
	@rm -rf .venv-peers && $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip --disable-pip-version-check --no-input install -qq --no-deps -r requirements-peers.lock
	@touch $@

EXTRAS_READY := .venv-extras/.ready-$(shell cksum < requirements-extras.lock | cut -d ' ' -f 1)

extras: $(EXTRAS_READY)  # sinks, mathematics and the hub's data sets with the real libraries, offline; no torch
	LOCKSTEP_EXTRAS=1 PYTHONPATH=src:. .venv-extras/bin/python -m pytest \
		tests/unit/test_sinks.py tests/unit/test_math_reward.py tests/unit/test_datasets.py

$(EXTRAS_READY):  # mlflow holds pyarrow below the trainer's
	@rm -rf .venv-extras && mkdir -p build
	@.ci/quietly ".venv-extras, virtual environment" build/venv-extras.log $(PYTHON) -m venv .venv-extras
	@.ci/quietly ".venv-extras, the extras" build/pip-extras.log .venv-extras/bin/python -m pip \
		--disable-pip-version-check --no-input install -qq --no-compile --no-deps -r requirements-extras.lock
	@touch $@

setup: $(READY)

prepared:  # two at a time, each in plain lines
	@TERM=dumb $(MAKE) --no-print-directory -j2 engine model

engine: $(LIGHT)
ifdef TRAIN_FLAGS
	@echo "there is no vLLM build for $(PLATFORM): using $(TRAIN_FLAGS)" >&2
else
	@$(BIN)/lockstep engines install $(ENGINE)
endif

engines: setup  # every vLLM that a recipe covers; make test then holds each of them to the contract
	@for version in 0.8.5 0.18.1 0.32.0; do \
		$(BIN)/lockstep engines install --check vllm==$$version; code=$$?; \
		case $$code in \
			0) $(BIN)/lockstep engines install vllm==$$version || exit $$? ;; \
			3) echo "NOT_RUN vllm==$$version: this machine cannot run it, for the reason above" >&2 ;; \
			*) exit $$code ;; \
		esac; \
	done

model: $(READY)
	@$(BIN)/lockstep models install $(MODEL)

$(LIGHT):
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer; hint: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@mkdir -p build && rm -rf .venv
	@.ci/quietly ".venv, virtual environment" build/venv.log $(PYTHON) -m venv .venv
	@.ci/quietly ".venv, build tool" build/pip.log $(PIP) -c requirements.lock setuptools
	@.ci/quietly ".venv, lockstep" build/pip.log $(PIP) -c requirements.lock --no-build-isolation -e .
	@touch $@

$(READY): $(LIGHT)
	@.ci/quietly ".venv, trainer and tools" build/pip.log $(PIP) -r requirements.lock
	@.ci/quietly ".venv, first import" build/import.log $(BIN)/python -c "$(FIRST_IMPORT)"
	@touch $@

$(BENCH_READY): $(READY)
	@.ci/quietly "adding what the benchmarks compare with" build/pip-bench.log $(PIP) -r requirements-bench.lock
	@touch $@

lock:
	@rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip --disable-pip-version-check install -qq --upgrade pip uv packaging
	build/lock/bin/python .ci/lock
	build/lock/bin/python .ci/lock-engines

clean:
	rm -rf .venv build
