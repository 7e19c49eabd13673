# make demo   install, start Ray and MLflow on loopback, run both jobs: minutes on a laptop
# make test   the tests that CI runs        make check  format, lint, types, import contracts
# make test-fast                            the part without servers: minutes
# make test-long                            what CI has no time for: more kills, a partition, autoscaling, other examples
# make chaos                                the fault campaign: at least 100 faults, half an hour or more
# make up / make down                       start the two servers / stop exactly what was started here
# make s3                                   start an S3 server on loopback, print what to export
# make demo-s3                              the demo with shards, stores, checkpoints and artifacts in that server
# make image                                the images for Kubernetes, by docker, podman or buildah: cluster/image
# make install                              .venv with everything (what the others begin with)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := .venv/bin/python
.DEFAULT_GOAL := help
.PHONY: help install demo demo-s3 up down s3 test test-fast test-long chaos check format pins image

help:
	@sed -n 's/^# make/make/p' Makefile

install: .venv/.installed

# One requirements file pins everything; uv installs it in under a minute.
.venv/.installed: requirements.txt pyproject.toml $(wildcard cir_core/search/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { echo "error: Python 3.11 is needed; install it, or run: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	test -x .venv/bin/uv || $(PY) -m pip install --quiet --disable-pip-version-check uv
	.venv/bin/uv pip sync --quiet --python $(PY) requirements.txt
	.venv/bin/uv pip install --quiet --python $(PY) --no-deps --editable .
	@touch $@

demo: install
	@$(PY) cluster/local/cluster.py demo

demo-s3: install
	@$(PY) cluster/local/cluster.py demo-s3

up: install
	@$(PY) cluster/local/cluster.py up

s3: install
	@$(PY) cluster/local/cluster.py s3

down:
	@if test -x $(PY); then $(PY) cluster/local/cluster.py down; else echo "nothing to stop"; fi

test: install
	$(PY) -m pytest -m "not slow" -n 2
	$(PY) -m pytest -m "slow and not long"

test-long: install
	$(PY) -m pytest -m "not slow" -n 2 --hypothesis-profile=random
	$(PY) -m pytest -m long

test-fast: install
	$(PY) -m pytest -m "not slow" -n 2

check: install
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

format: install
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

# Newest versions that satisfy pyproject.toml.
pins: install
	.venv/bin/uv pip compile --quiet --no-header --no-annotate --all-extras --upgrade pyproject.toml -o requirements.txt
	.venv/bin/uv pip compile --quiet --no-header --no-annotate --extra ann --extra tracking-server --constraint requirements.txt pyproject.toml -o cluster/image/requirements.txt

image:
	@cluster/image/build.sh $(ARGS)

chaos: install
	$(PY) tests/chaos/campaign.py
