# Two commands do all the set-up: `make demo` and `make test`. The others are for working on Tatara.
PYTHON ?= python3
unexport PYTHONDONTWRITEBYTECODE  # images set it; here hundreds of processes would each compile our modules again
.DEFAULT_GOAL := help
.PHONY: help setup demo test tests doctests long-test slow-test chaos-test vllm-test weave-test slurm-test ray-test check lint bench serve stop status clean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

setup:           ## make both environments (.venv, .venv-vllm); instant when they are there
	@$(PYTHON) deployments/environments.py main
	@$(PYTHON) deployments/environments.py vllm

demo: setup      ## the main job on this machine: data to a served, verified model
	@.venv/bin/tatara demo

test: setup      ## format, lint, types, doctests and tests; `make long-test` has the whole line with real vLLM
	@$(MAKE) --no-print-directory -j 3 lint doctests tests

PYTEST = .venv/bin/python -m pytest -q --dist loadfile --no-loadscope-reorder

tests: export OMP_NUM_THREADS = 1  # tiny models: threads of several processes would only wait for each other
tests:           # the longest files first; four processes, for each waits often
	@$(PYTEST) -n 4 --durations=15 -m "not long and not slow and not chaos and not slurm" --ignore=tests/weave --ignore=tests/ppo \
		tests/tasks/serve tests/deployments/gateway tests/tasks/traces tests

long-test: export OMP_NUM_THREADS = 1
long-test: setup ## longer tests, which CI runs too: the line and GRPO with real vLLM, pushes to a Hub, notebooks
	@$(PYTEST) -n 4 --durations=15 -m "long and not slow and not chaos" --ignore=tests/weave --ignore=tests/ppo \
		tests/flows/test_line.py tests/tasks/reinforce tests/tasks/train tests/tasks/publish tests

slow-test: export OMP_NUM_THREADS = 1
slow-test: setup ## kills, races and long equalities: the line killed and sabotaged, `tatara up`, resumed trainings
	@$(PYTEST) -n 4 --durations=15 -m "slow and not chaos" --ignore=tests/weave --ignore=tests/ppo tests/flows/test_line_killed.py \
		tests/deployments/test_orchestration.py tests/tasks/verify tests

chaos-test: export OMP_NUM_THREADS = 1
chaos-test: setup ## a real worker killed in each of the seven steps, a training that outlives server and worker
	@$(PYTEST) -n 2 -m chaos --durations=8 \
		tests/flows/test_worker_kills.py tests/flows/test_training_survives.py tests/flows/test_publish.py tests/flows/test_pretrain.py tests/tasks \
		tests/deployments tests/test_notebooks.py

vllm-test: export OMP_NUM_THREADS = 1
vllm-test: setup ## longer tests of real vLLM: wrecked weights, the evaluation gate, a pretrained base (twenty minutes)
	@.venv/bin/python -m pytest -q -m chaos --durations=5 tests/flows/test_sabotage.py tests/flows/test_line_killed.py tests/flows/test_release_base.py tests/flows/test_reinforce_ppo.py

weave-test: setup ## the drain against Weave's own trace server, in a third environment (.venv-weave)
	@$(PYTHON) deployments/environments.py weave
	@.venv/bin/python -m pytest -q -m weave --durations=5 tests/weave

slurm-test: export OMP_NUM_THREADS = 1
slurm-test: setup ## trainings as jobs of a real SLURM with two nodes on this machine (root: installs Debian's packages)
	@command -v sbatch >/dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y \
		--no-install-recommends slurmctld slurmd slurm-client munge; }
	@.venv/bin/python -m pytest -q -m slurm --durations=8 tests/tasks/train

ray-test: export OMP_NUM_THREADS = 1
ray-test: setup  ## finetunes as jobs and the flow reinforce-ppo on a real Ray cluster of two nodes, verl on the CPU (.venv-ppo; ten minutes)
	@$(PYTHON) deployments/environments.py ppo
	@.venv/bin/python -m pytest -q -m ray --durations=8 tests/ppo

check: setup lint doctests ## ruff format, ruff, pyright, doctests

# Else weave, which they import, waits at exit for Sentry.
doctests: export WANDB_ERROR_REPORTING = false
doctests:
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
	rm -rf .venv .venv-vllm .venv-weave .venv-ppo .venv-uv .tatara .pytest_cache .ruff_cache .hypothesis
