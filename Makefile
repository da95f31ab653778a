# `make demo` trains the embedded model; `make test` and `make lint` check a change.
PYTHON ?= python3
BIN := .venv/bin
# Threads that wait asleep: spinning ones slow everything down tenfold when another program wants a core.
export OMP_WAIT_POLICY ?= passive

.PHONY: setup demo test lint

setup: .venv/installed

# The stamp is older than pyproject.toml after a change to it, and then the installation is brought up to date.
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e '.[test]'
	touch $@

demo: setup
	rm -rf runs/demo
	$(BIN)/flowalign train toyworld_ocr_crd run.folder=runs/demo

# Both parts run, whatever becomes of the first; two tests at a time, each on one core. The model's precision is the
# processor's; `FLOWALIGN_AUTO_DTYPE=bf16 make test` (or fp32) runs them in the other one.
test: setup
	@status=0; \
	$(BIN)/python -m pytest -n 2 -m 'not slow' || status=1; \
	$(BIN)/python -m pytest -n 2 -m slow || status=1; \
	exit $$status

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
