# Two commands from a bare clone: `make demo` trains the quickstart, `make test` runs every check.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --quiet --disable-pip-version-check --no-input

.PHONY: demo test check package format docs clean

demo: .venv/demo
	$(BIN)/fedloom run

test: .venv/test
	$(BIN)/pytest --numprocesses 2 --dist loadgroup

# Format, lint and types, without the tests.
check: .venv/test
	$(BIN)/ruff format --check src tests benchmarks examples docs
	$(BIN)/ruff check src tests benchmarks examples docs
	$(BIN)/mypy

# Wheel and source distribution, in build/dist, as an index would take them.
package: .venv/test
	rm -rf build/dist
	$(BIN)/python -m build --no-isolation --outdir build/dist .
	$(BIN)/twine check --strict build/dist/*

format: .venv/test
	$(BIN)/ruff format src tests benchmarks examples docs
	$(BIN)/ruff check --fix src tests benchmarks examples docs

# The documentation site, in build/site; a link that leads nowhere is an error.
docs: .venv/docs
	$(BIN)/mkdocs build --strict

.venv/made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedloom needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	touch $@

.venv/demo: .venv/made pyproject.toml requirements/constraints.txt requirements/demo.txt
	$(PIP) install --constraint requirements/constraints.txt --editable .
	$(PIP) install --no-deps --require-hashes --requirement requirements/demo.txt
	touch $@

.venv/test: .venv/made pyproject.toml requirements/constraints.txt requirements/test.txt
	$(PIP) install --constraint requirements/constraints.txt --editable '.[flower,ray,wireless,privacy,quantized,dev]'
	$(PIP) install --no-deps --require-hashes --requirement requirements/test.txt
	touch $@

.venv/docs: .venv/made pyproject.toml requirements/constraints.txt
	$(PIP) install --constraint requirements/constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
