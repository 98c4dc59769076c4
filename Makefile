PYTHON ?= python3
BASE = $(PYTHON)
# python3.12 may be a pyenv shim that exists but does not run, hence the trial; expanded only where it is used.
PYTHON312 ?= $(shell for p in python3.12 "$$(pyenv root 2>/dev/null)"/versions/3.12*/bin/python3.12; do \
	"$$p" -c '' 2>/dev/null && echo "$$p" && break; done)
TESTS312 = $(wildcard tests/test_kernels*.py tests/test_engine*.py)
# Workers start with adjacent tests, which share compiled programs, and steal from each other at the end.
PYTEST = pytest -n 2 --dist worksteal --durations 20 --durations-min 5
BENCHES = bench-profile bench-end-to-end bench-shapes bench-loop bench-kernels bench-model \
	bench-ablations bench-planner bench-report

.PHONY: help demo test test-long test312 embedded draft clean bench bench-cpu bench-target $(BENCHES)

help:
	@echo 'make demo     generate with and without speculation from the embedded model, and compare'
	@echo 'make test     lint, type-check and run the test suite'
	@echo 'make test-long  a few tests that take about a minute each'
	@echo 'make test312  kernel and engine tests, but the slow ones, on Python 3.12 with the newest jax'
	@echo 'make embedded train the embedded model again (two runs; a GPU and Python 3.12 to get the shipped one)'
	@echo 'make draft    train the embedded model'"'"'s draft head again (a GPU and Python 3.12 to get the shipped one)'
	@echo 'make bench    all benchmarks on a GPU, about half an hour; docs/reproduce.md has its parts'
	@echo 'make bench-cpu  a few of them on a CPU'
	@echo 'make bench-target  train the long-context model that they measure again, which is then measured'
	@echo 'make clean    remove environments, caches and build products'

demo: .venv/.stamp
	.venv/bin/specsa generate --compare --json

test: .venv/.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/$(PYTEST) -m 'not long'

test-long: .venv/.stamp
	.venv/bin/$(PYTEST) -m long

# Without paths pytest would run everything.
test312: .venv312/.stamp
	$(if $(TESTS312),,$(error test312: no test file matches))
	.venv312/bin/$(PYTEST) -m 'not slow and not long' $(TESTS312)

# Not PYTHON itself: `make PYTHON=...` would override this too.
.venv312/.stamp: BASE = $(or $(PYTHON312),$(error test312 needs Python 3.12; set PYTHON312=/path/to/python3.12))

%/.stamp: pyproject.toml
	@$(BASE) -c 'import sys; v = sys.version.split()[0]; \
		sys.exit(None if sys.version_info >= (3, 11) else f"SpecSA-JAX needs Python 3.11 or newer; $(BASE) is {v}")'
	$(BASE) -m venv $*
	$*/bin/pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

TRAIN = .venv/bin/specsa train stdlib --skip-undecodable --no-remat --query-chunk 512
embedded: .venv/.stamp
	$(TRAIN) --output run1 --model embedded --stages 4096:16:850,8192:8:91 --learning-rate 2e-3
	$(TRAIN) --output run2 --init run1/checkpoint --stages 4096:16:520,8192:8:200 --warmup 50 \
		--exclude pydoc_data/topics.py --exclude 'encodings/*'

draft: .venv/.stamp
	.venv/bin/specsa train-draft embedded --output draft-run --steps 5000 --learning-rate 2e-3 --intermediate 1536 \
		--unroll 6 --generated 4096 --generation-batch 512 --prefill-chunk 64 --eval-rows 128 --eval-every 200 \
		--save-every 0 --implementation xla

# Benchmarks. The environment is .venv where there is one, else the Python at hand. Each part fits ten minutes; all go on
# where they stopped, and *_SECONDS bound them: no row begins later.
BENCH = PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} JAX_COMPILATION_CACHE_DIR=bench-programs $(or $(wildcard .venv/bin/python),$(PYTHON)) benchmarks
# XLA's pool is three quarters of a GPU's memory by default.
LARGE = XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 $(BENCH)
TARGET_SECONDS ?= 400
END_TO_END_SECONDS ?= 300
ABLATIONS_SECONDS ?= 150
PROFILE_SECONDS ?= 120
PLANNER_SECONDS ?= 120
SHAPES_SECONDS ?= 240
VERIFY_SECONDS ?= 100
# The checkpoint that is measured: the one of the committed results, or what bench-target leaves, where it has run.
TRAINED = bench-run/long/checkpoint
CHECKPOINT ?= $(if $(wildcard $(TRAINED)),$(TRAINED),benchmarks/target)
PROFILE_AT ?= --context 4096 --context 65536

# What is trained: the embedded model, stretched to 64K tokens.
TARGET ?= --init embedded --train-options=--no-remat --warmup 30

bench:
	@for part in $(BENCHES); do $(MAKE) $$part || failed="$$failed $$part"; done; \
		test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

bench-target:
	rm -rf bench-run
	$(BENCH)/train_target.py $(TARGET) --seconds $(TARGET_SECONDS) --measure 0 --keep bench-run --out

bench-end-to-end:
	$(BENCH)/end_to_end.py --checkpoint $(CHECKPOINT) --resume --budget $(END_TO_END_SECONDS) --out
	$(BENCH)/end_to_end.py --checkpoint $(CHECKPOINT) --dtype float32 --precisions exact --contexts 65536 --batches 1 \
		--temperatures 0 --strategies lookup@chain:16 --resume --budget 40 --out
	$(BENCH)/dense_decode.py --checkpoint $(CHECKPOINT) --resume --budget 40 --out

# The engine finds both in the checkpoint's directory: what comes after is planned by the profile, in class approx among
# the schedules whose divergence is measured. (benchmarks/target has that already.)
bench-profile:
	$(if $(wildcard $(TRAINED)),$(subst benchmarks,-m specsa_jax,$(BENCH)) precision $(CHECKPOINT) --schedule every:3 \
		--windows 8 --context 4096 --context 65280)
	$(subst benchmarks,-m specsa_jax,$(BENCH)) profile $(CHECKPOINT) $(PROFILE_AT) --budget $(PROFILE_SECONDS)

bench-planner:
	$(BENCH)/planner.py --checkpoint $(CHECKPOINT) --resume --budget $(PLANNER_SECONDS) --out

bench-ablations:
	$(BENCH)/ablations.py --checkpoint $(CHECKPOINT) --resume --budget $(ABLATIONS_SECONDS) --out

bench-shapes:
	$(LARGE)/shapes.py --resume --budget $(SHAPES_SECONDS) --out
	$(LARGE)/dense_decode.py --preset 8b --contexts 65536 --batches 1 --resume --budget 60 --out
	$(LARGE)/memory.py --out

bench-loop:
	$(BENCH)/overhead.py --checkpoint $(CHECKPOINT) --strategies none lookup@chain:16 --presets 8b --widths 1 --out

bench-kernels:
	$(BENCH)/verify_layer.py --heads 32x8 --context 64 --width 8,16,64 --group auto --overlap 70,real --stages --xla --resume \
		--budget $(VERIFY_SECONDS) --out
	$(BENCH)/verify_layer.py --overlap 70,real,50,90 --stages --xla --resume --budget 30 --out
	$(BENCH)/selection.py --seconds 0.05 --out
	$(BENCH)/commit.py --seconds 0.05 --out
	$(BENCH)/compress.py --seconds 0.05 --out

bench-model:
	$(LARGE)/refresh_reuse.py --preset 1b --context 65536 --batch 8 --refresh 16 6 5 1 --out
	$(LARGE)/refresh_reuse.py --preset 1b --context 65536 --batch 8 --width 64 --refresh 16 6 5 1 --out
	$(LARGE)/prefill.py --preset 8b --tokens 65536 --dense --out

bench-report:
	$(BENCH)/plots.py
	$(BENCH)/readme_table.py

bench-cpu:
	$(BENCH)/end_to_end.py --contexts 2048 --workloads code edit --temperatures 0 --precisions exact \
		--strategies lookup@chain:4 lookup+head@best:16:6 --prompts 1 --budget 100 --resume --out
	$(BENCH)/shapes.py --widths 1 4 16 --out
	$(BENCH)/dense_decode.py --contexts 4096 --batches 1 --out
	$(BENCH)/overhead.py --context 2048 --new-tokens 64 --strategies none lookup@chain:4 --buffers on --out
	$(BENCH)/memory.py --out
	$(BENCH)/plots.py
	$(BENCH)/readme_table.py

clean:
	rm -rf .venv .venv312 bench-run bench-programs build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
