# Two commands do all the set-up: `make demo` and `make test`. The others are for working on Tatara.
PYTHON ?= python3
unexport PYTHONDONTWRITEBYTECODE  # images set it; here hundreds of processes would each compile our modules again
.DEFAULT_GOAL := help
.PHONY: help setup demo test tests chaos-test vllm-test weave-test quick check lint bench serve stop status clean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

setup:           ## make both environments (.venv, .venv-vllm); instant when they are there
	@$(PYTHON) deployments/environments.py main
	@$(PYTHON) deployments/environments.py vllm

demo: setup      ## the main job on this machine: data to a served, verified model
	@.venv/bin/tatara demo

test: setup      ## everything but long chaos: format, lint, types, doctests and tests, real vLLM included
	@$(MAKE) --no-print-directory -j 2 lint tests

LONGEST = tests/flows/test_line.py tests/deployments/gateway/test_lite_process.py tests/tasks/train/test_train_run.py \
	tests/tasks/pretrain/test_pretrain_run.py tests/deployments/test_orchestration.py tests/tasks/traces/test_drain_flow.py

tests: export OMP_NUM_THREADS = 1  # tiny models: threads of several processes would only wait for each other
tests:           # the longest files first, the rest beside them; four processes, for each waits often
	@.venv/bin/python -m pytest -q -n 4 --dist loadfile --no-loadscope-reorder --durations=15 --doctest-modules \
		-m "not chaos" --ignore=tests/weave $(LONGEST) tests tasks flows deployments

chaos-test: export OMP_NUM_THREADS = 1
chaos-test: setup ## a real worker killed in each of the seven steps, a training that outlives server and worker
	@.venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m chaos --durations=8 \
		tests/flows/test_worker_kills.py tests/flows/test_training_survives.py tests/flows/test_publish.py tests/tasks \
		tests/deployments

vllm-test: export OMP_NUM_THREADS = 1
vllm-test: setup ## longer tests of real vLLM: wrecked weights, each served by its own, and the evaluation gate (ten minutes)
	@.venv/bin/python -m pytest -q -m chaos --durations=5 tests/flows/test_sabotage.py tests/flows/test_line.py

weave-test: setup ## the drain against Weave's own trace server, in a third environment (.venv-weave)
	@$(PYTHON) deployments/environments.py weave
	@.venv/bin/python -m pytest -q -m weave --durations=5 tests/weave

quick: setup     ## the fast tests only
	@.venv/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow and not chaos and not weave" tests

check: setup lint ## ruff format, ruff, pyright, doctests
	@.venv/bin/python -m pytest -q --doctest-modules tasks flows deployments

lint:
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/pyright

bench: setup     ## speed and memory; prints one JSON line each
	@for file in tests/bench/bench_*.py; do .venv/bin/python $$file || exit 1; done

serve: setup     ## start vLLM and the gateway (MODEL_DIR, VLLM_PORT, LITE_GATEWAY_PORT ... from the environment)
	@.venv/bin/tatara services start

stop:            ## stop gateway, vLLM, worker and Prefect server
	@if [ -x .venv/bin/tatara ]; then .venv/bin/tatara down; fi

status: setup    ## how vLLM and the gateway are
	@.venv/bin/tatara services status

clean: stop      ## remove environments and everything below .tatara
	rm -rf .venv .venv-vllm .venv-weave .venv-uv .tatara .pytest_cache .ruff_cache .hypothesis
