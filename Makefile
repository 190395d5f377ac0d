# `make demo` and `make test` set themselves up: they make .venv when there is none.
PYTHON ?= python3
BIN := .venv/bin
RUNS ?= runs

.PHONY: demo test slow check docs constraints fix clean services services-stop

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

demo: .venv/.installed  ## train the embedded tiny model and show that it writes better than before
	$(BIN)/calligrapher train params/tiny-nft.yaml run=demo runs_dir=$(RUNS)

test: .venv/.installed check  ## the default tests, two files at a time: under 5 minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

slow: .venv/.installed  ## real servers, kills and longer runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m slow --durations=25

check: .venv/.installed  ## what a reviewer should not have to say
	$(BIN)/pip check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

services: .venv/.installed  ## Prefect server and workers, MLflow server; then: prefect deployment run rl-train/tiny-nft --watch
	$(BIN)/python -m flows.services start --runs-dir $(RUNS)

services-stop: .venv/.installed  ## stop exactly those
	$(BIN)/python -m flows.services stop --runs-dir $(RUNS)

docs: .venv/.installed  ## the docs as a site, with search; then: python3 -m http.server -d site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

constraints: .venv/.installed  ## the exact versions of everything installed, for: pip install -c constraints.txt -e '.[dev]'
	$(BIN)/pip freeze --exclude-editable | sed -n 's/^\([A-Za-z0-9._-]*==[^+ ]*\).*/\1/p' > constraints.txt

fix: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs site
