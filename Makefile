# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --no-header --no-annotate --upgrade --extra demo
EXTRAS := --extra harmony --extra jwt --extra mistral --extra otel --extra study --extra tiktoken

VLLM ?= 0.32.0
VLLM_DIR ?= .vllm
TESTS ?= tests/vllm

# Two workers for two cores; a third one where tests mostly wait for processes and timers. A file stays on one worker.
PYTEST := $(BIN)/pytest --quiet --dist loadfile --no-loadscope-reorder --durations 15
UNIT := tests/unit tests/conformance
TIMES ?= 10
# Of the soak: 600 take 12 minutes, with the rests at which leaks are measured.
SECONDS ?= 600
INDEX ?= memory

.PHONY: help demo demo-ui screenshots chromium test test-unit test-rest test-repeat test-vllm test-streams soak fault-table check-engines check lint bench \
  bench-peers head-to-head traces study format \
  lock clean
.NOTPARALLEL:

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: .venv/run.stamp ## Four simulated engines behind the gateway: round robin against KV-aware routing
	$(BIN)/matrixinfer demo

demo-ui: .venv/run.stamp ## The same engines, kept running under conversations, with the dashboard to see
	$(BIN)/matrixinfer demo --ui

test: test-unit test-rest ## All tests

test-unit: .venv/dev.stamp
	$(PYTEST) -n 2 $(UNIT)

test-rest: .venv/dev.stamp chromium
	$(PYTEST) -n 3 tests $(UNIT:%=--ignore %)

test-repeat: .venv/dev.stamp ## All tests, TIMES times; every second time beside a process that takes a whole core
	TIMES=$(TIMES) .ci/repeat

test-vllm: .venv/dev.stamp ## Predictions against real vLLM, version VLLM, which it installs into .vllm (an hour, 3.4 GB)
	$(BIN)/python -m tests.vllm.install $(VLLM_DIR) $(VLLM)
	VLLM=$(VLLM) VLLM_DIR=$(VLLM_DIR) $(BIN)/pytest -v $(TESTS)

test-streams: .venv/dev.stamp ## 2,000 streams at once over two workers: each must be whole, and nothing may stay open (two minutes)
	$(BIN)/python -m tests.streams --json bench/results/streams.json

soak: .venv/dev.stamp ## Clients, faults and churn for SECONDS; fails if a request or memory is lost (INDEX=redis: two gateways)
	$(BIN)/python -m tests.soak --seconds $(SECONDS) --index $(INDEX) --json bench/results/soak-$(INDEX).json

fault-table: .venv/dev.stamp ## Measure what faults of engines cost, into docs/operations.md (ten minutes)
	FAULT_TABLE=1 $(BIN)/pytest --quiet -n 0 tests/e2e/test_engine_faults.py

chromium:
	.ci/chromium

screenshots: .venv/dev.stamp chromium ## Pictures of the dashboard, into docs/images (two minutes)
	$(BIN)/python -m tests.browser.screenshots

check-engines: .venv/dev.stamp ## What the newest vLLM and SGLang publish that the gateway does not know (86 MB into .engines)
	$(BIN)/python -m watch .engines --page docs/engines.md

check: lint test-unit ## Format, lint, types, import contracts, unit tests

lint: .venv/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/dev.stamp ## Figures as JSON (bench/results/) and as tables (five minutes)
	$(BIN)/python -m bench

bench-peers: .venv/dev.stamp ## The same load through vllm-router, sglang-router and smg, which it installs into .peers (ten minutes)
	$(BIN)/python -m bench.peers

head-to-head: .venv/dev.stamp ## Other routers and ours in front of two real vLLM engines, undisturbed and disturbed (two hours; installs vLLM)
	$(BIN)/python -m tests.vllm.install $(VLLM_DIR) $(VLLM)
	$(BIN)/python -m bench.head_to_head --vllm $(VLLM) --vllm-dir $(VLLM_DIR)

traces: .venv/dev.stamp ## Token ids of public traces in the folder TRACES against transformers and tokenizers (half a minute)
	MATRIXINFER_TRACES=$(TRACES) $(BIN)/pytest -rs tests/integration/test_traces.py

study: .venv/dev.stamp ## Routing policies on the traces in the folder TRACES and on generated traffic (docs/evaluation.md; resumable)
	$(BIN)/python -m matrixinfer.study.evaluate $(if $(TRACES),--traces $(TRACES)) --results .study --page docs/evaluation.md

format: .venv/dev.stamp ## Format the code and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: .venv/dev.stamp ## Pin the newest requirements
	$(LOCK) $(EXTRAS) --group dev pyproject.toml -o requirements/dev.txt
	$(LOCK) --group build --constraint requirements/dev.txt pyproject.toml -o requirements/run.txt

clean: ## Remove what the targets made, but for the engines in .vllm and .engines, and .peers
	rm -rf .venv dist build bench/results .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.venv/dev.stamp: requirements/data.txt
.venv/run.stamp .venv/dev.stamp: .venv/%.stamp: requirements/%.txt pyproject.toml
	@echo "Installing requirements/$*.txt into .venv (once) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --require-hashes -r requirements/$*.txt
	$(if $(filter dev,$*),$(PIP) --require-hashes --no-deps -r requirements/data.txt)
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@
