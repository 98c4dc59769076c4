PYTHON ?= python3
BASE = $(PYTHON)
# python3.12 may be a pyenv shim that exists but does not run, hence the trial; expanded only where it is used.
PYTHON312 ?= $(shell for p in python3.12 "$$(pyenv root 2>/dev/null)"/versions/3.12*/bin/python3.12; do \
	"$$p" -c '' 2>/dev/null && echo "$$p" && break; done)
TESTS312 = $(wildcard tests/test_kernels*.py tests/test_engine*.py)
# Workers start with adjacent tests, which share compiled programs, and steal from each other at the end.
PYTEST = pytest -n 2 --dist worksteal

.PHONY: help demo test test312 embedded draft clean

help:
	@echo 'make demo     generate with and without speculation from the embedded model, and compare'
	@echo 'make test     lint, type-check and run the test suite'
	@echo 'make test312  kernel and engine tests, but the slow ones, on Python 3.12 with the newest jax'
	@echo 'make embedded train the embedded model again (two runs; a GPU and Python 3.12 to get the shipped one)'
	@echo 'make draft    train the embedded model'"'"'s draft head again (a GPU and Python 3.12 to get the shipped one)'
	@echo 'make clean    remove environments, caches and build products'

demo: .venv/.stamp
	.venv/bin/specsa generate --compare --json

test: .venv/.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/$(PYTEST)

# Without paths pytest would run everything.
test312: .venv312/.stamp
	$(if $(TESTS312),,$(error test312: no test file matches))
	.venv312/bin/$(PYTEST) -m 'not slow' $(TESTS312)

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

clean:
	rm -rf .venv .venv312 build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
