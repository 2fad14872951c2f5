# `make demo` and `make test` each set up all they need; nothing but Python 3.11, make and the package index is required.
PYTHON ?= python3
PORT ?= 5000
STAMP := .venv/.installed
# The environment's programs come first, so that `mlflow run --env-manager local` finds its python.
ENV := PATH="$(CURDIR)/.venv/bin:$$PATH" MLFLOW_DISABLE_TELEMETRY=true
# MLflow's own default quotes the path: in one with a space, it would make a second folder with %20 in its name.
STORE := MLFLOW_TRACKING_URI="sqlite:///$(CURDIR)/mlflow.db"

.PHONY: help setup demo test generate docs lint ui server clean

help:  ## show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1	/'

setup: $(STAMP)  ## make .venv with qexp and its tools; re-used while pyproject.toml is the same

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "qexp needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[dev]'
	touch $(STAMP)

demo: setup  ## train SmallNet on digits, quantize, measure, register: report/report.html and make ui show the result
	$(ENV) $(STORE) mlflow run . --env-manager local -e main --experiment-name qexp-digits -P output_dir=report
	@echo 'the report: report/report.html; the runs and models: make ui'

# Tests of one file share what its fixtures have made. OpenMP's threads must not spin while those of others want the core.
test: setup  ## all tests, slow ones included
	$(ENV) OMP_WAIT_POLICY=passive python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

generate: setup  ## write config.yaml and MLproject from the options
	$(ENV) PYTHONPATH=. python .ci/generate.py

docs: setup  ## this documentation as a site in build/site; fails on a link that leads nowhere
	$(ENV) NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

lint: setup  ## ruff and mypy
	$(ENV) ruff check .
	$(ENV) ruff format --check .
	$(ENV) mypy

ui: setup  ## the MLflow UI on 127.0.0.1:$(PORT) for the runs made here
	$(ENV) MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow server --host 127.0.0.1 --port $(PORT) --backend-store-uri sqlite:///mlflow.db

# BACKEND_STORE_URI names a database that is there, ARTIFACTS_DESTINATION another folder or an s3:// address,
# SERVER_OPTIONS more options of `mlflow server`.
server: setup  ## MLflow's server with PostgreSQL (Debian's package) and an artifact folder on 127.0.0.1:$(PORT)
	@$(ENV) python -m entrypoints.server --port $(PORT) $(SERVER_OPTIONS)

clean:  ## remove the environment and caches; runs, models and reports stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find qexp entrypoints tests -name __pycache__ -type d -prune -exec rm -rf {} +
