# `make demo` and `make test` each set up all they need; nothing but Python 3.11, make and the package index is required.
PYTHON ?= python3
PORT ?= 5000
STAMP := .venv/.installed
LOWEST := .venv-lowest/.installed
# The environment's programs come first, so that `mlflow run --env-manager local` finds its python.
ENV := PATH="$(CURDIR)/.venv/bin:$$PATH" MLFLOW_DISABLE_TELEMETRY=true
# MLflow's own default quotes the path: in one with a space, it would make a second folder with %20 in its name.
STORE := MLFLOW_TRACKING_URI="sqlite:///$(CURDIR)/mlflow.db"

.PHONY: help setup demo test test-quick test-long test-lowest generate golden lock docs lint ui server clean

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1	/'

setup: $(STAMP)  ## make .venv with qexp and its tools, in the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "qexp needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: setup  ## train SmallNet on digits, quantize, measure, register: report/report.html and make ui show the result
	$(ENV) $(STORE) mlflow run . --env-manager local -e main --experiment-name qexp-digits -P quick=true -P output_dir=report
	@echo 'the report: report/report.html; the runs and models: make ui'

# Tests of one file share what its fixtures have made. OpenMP's threads must not spin while those of others want the core.
PYTEST := OMP_WAIT_POLICY=passive python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: setup  ## all tests but the long ones
	$(ENV) $(PYTEST)

# What needs neither a trained model nor a server, a browser or another process; of the engines only fx.
test-quick: setup  ## the tests of plain functions, for the inner loop
	$(ENV) $(PYTEST) -m 'not slow and not long'

# More classifiers with every engine, and `mlflow run` in an environment that it builds itself.
test-long: setup  ## the tests that take minutes each and that `make test` leaves out
	$(ENV) QEXP_LONG_TESTS=1 $(PYTEST) -m long

test-lowest: $(LOWEST)  ## the quick tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	PATH="$(CURDIR)/.venv-lowest/bin:$$PATH" MLFLOW_DISABLE_TELEMETRY=true $(PYTEST) -m 'not slow and not long'

$(LOWEST): $(STAMP)
	.venv/bin/python .ci/lowest.py .venv-lowest
	touch $(LOWEST)

generate: setup  ## write config.yaml, MLproject and docs/reference/options.md from the options
	$(ENV) PYTHONPATH=. python .ci/generate.py

golden: setup  ## write the reports that the tests compare with anew, tests/report/golden/
	$(ENV) UPDATE_GOLDEN=1 python -m pytest --quiet tests/report/test_golden.py

lock: setup  ## write constraints.txt and conda.yaml from the versions in .venv
	$(ENV) python .ci/lock.py

docs: setup  ## this documentation as a site in build/site; fails on a link that leads nowhere
	$(ENV) NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

lint: setup  ## ruff and mypy
	$(ENV) ruff check .
	$(ENV) ruff format --check .
	$(ENV) mypy

ui: setup  ## the MLflow UI on 127.0.0.1:$(PORT) for the runs made here
	$(ENV) MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow server --host 127.0.0.1 --port $(PORT) --backend-store-uri sqlite:///mlflow.db

# From the environment: BACKEND_STORE_URI, a database (it may hold a password, which a command line would show to other
# users); ARTIFACTS_DESTINATION, a folder or an s3:// address; SERVER_OPTIONS, more options of `mlflow server`.
server: setup  ## MLflow's server for a team on 127.0.0.1:$(PORT), on the database BACKEND_STORE_URI (SQLite unless set)
	@unset MLFLOW_TRACKING_URI; MLFLOW_BACKEND_STORE_URI="$${BACKEND_STORE_URI:-sqlite:///mlflow.db}" \
		MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(ENV) mlflow server --host 127.0.0.1 --port $(PORT) \
		--artifacts-destination "$${ARTIFACTS_DESTINATION:-mlartifacts}" $(SERVER_OPTIONS)

clean:  ## remove the environments and caches; runs, models and reports stay
	rm -rf .venv .venv-lowest build .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find qexp entrypoints tests -name __pycache__ -type d -prune -exec rm -rf {} +
