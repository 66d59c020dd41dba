#!/usr/bin/env bash
# What `make lint` runs: the format and style of notebooks and tests, and the types of the package.
set -euo pipefail
cd "$(dirname "$0")/.."

ruff format --check --quiet . || { echo "not formatted: run ruff format"; exit 1; }
ruff check --output-format concise .
mypy
