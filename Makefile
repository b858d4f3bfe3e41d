# Each target does its own set-up: a machine needs Python 3.11 or 3.12, make and a compiler.

VENV := .venv
BIN := $(VENV)/bin
DEMO_DIR ?= runs/digits
TPU_SLICES ?= v2-8 v3-8 v3-32 v4-8 v5e-8 v5e-16 v6e-8
BUILDIFIER := npx --yes @bazel/buildifier@8.2.1

.PHONY: demo test test-slow fuzz soak bench scaling tpu-table lint format lock clean

demo: $(VENV)/.installed  ## train the digits, sample, say what was learnt
	$(BIN)/python -m experiments.demo --workdir=$(DEMO_DIR)

test: $(VENV)/.installed  ## the tests, in a few minutes
	$(BIN)/python -m pytest --numprocesses=2 --durations=10

test-slow: $(VENV)/.installed  ## the tests that take many minutes
	XLA_FLAGS= $(BIN)/python -m pytest -m slow --durations=5 -rP

fuzz: $(VENV)/.installed  ## 100,000 damaged files for the readers of files; FILES=1000 for fewer
	PYTHONPATH=tests:. $(BIN)/python -m support.fuzz $(or $(FILES),100000)

soak: $(VENV)/.installed  ## kill a training process thirty times: the run must be the run; at most twenty minutes
	$(BIN)/python -m pytest -m slow -s tests/end_to_end/test_soak.py

bench: $(VENV)/.installed  ## speed beside diffusers' on this CPU: BENCH="--quick forward" for a part
	$(BIN)/python tests/benchmarks/bench.py $(BENCH)

scaling: $(VENV)/.installed  ## how time grows with batch, resolution, images, T and samples: a picture in build/bench
	PYTHONPATH=. $(BIN)/python tests/benchmarks/scaling.py

tpu-table: $(VENV)/.installed  ## the paper's recipes on TPUs, compiled: cycles, speed, hours, price; takes hours
	@for dataset in $(or $(DATASETS),cifar10 lsun_church); do \
	  $(BIN)/python -m experiments.tpu_report --dataset=$$dataset --precision=bfloat16 $(TPU_SLICES:%=--topology=%) \
	    --prices=docs/tpu-prices.json --out=build/tpu/$$dataset.json || exit 1; \
	done

lint: $(VENV)/.installed  ## style, types and build files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy diffusion_tf experiments
	@if command -v npx >/dev/null; then $(BUILDIFIER) -mode=check -lint=warn BUILD MODULE.bazel; \
	else echo "npx is missing: BUILD and MODULE.bazel were not checked"; fi

format: $(VENV)/.installed  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(VENV)/.installed  ## choose new locked versions within setup.py's ranges
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile --universal --python-version=3.11 --upgrade --no-header --no-emit-index-url \
	  --no-emit-find-links --extra=cpu --extra=dev setup.py --output-file=requirements.lock

clean:  ## remove the virtual environment and caches; runs stay
	rm -rf $(VENV) build/bench .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.installed: requirements.lock
	@python=; for p in python3.11 python3.12 python3; do \
	  if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then python=$$p; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "make: Python 3.11 or 3.12 is needed, and none is on the PATH" >&2; exit 1; fi; \
	$$python -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@
