#!/usr/bin/env bash
# Makes .venv if missing, installs, and runs everything that must hold: lint, types, tests.
# Arguments go to pytest:  bash scripts/test.sh tests/algorithms -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh dev vllm deepspeed
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
.venv/bin/mypy
if [ $# -gt 0 ]; then exec .venv/bin/python -m pytest "$@"; fi
# The equations are covered to the last branch; elsewhere the tests themselves are the measure, and none pays for tracing.
.venv/bin/python -m pytest tests/algorithms --cov=remix.algorithms --cov-branch --cov-report=term-missing:skip-covered --cov-fail-under=100
# Two files at a time: most of a test is one thread, and tests of a file share what takes long to start. In the order of
# tests/conftest.py: by itself xdist takes the files with few tests last, which the longest are among.
.venv/bin/python -m pytest --ignore=tests/algorithms -n 2 --dist loadfile --no-loadscope-reorder --durations=10
