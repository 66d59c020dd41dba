#!/usr/bin/env bash
# What `make test` runs: notebooks clean and exported, format and types, then every notebook, then the tests.
set -euo pipefail
cd "$(dirname "$0")/.."

# Temporary files of notebooks and tests, gone at the end however it ends.
TMPDIR=$(mktemp -d "${TMPDIR:-/tmp}/pillsnap-tests.XXXXXX")
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
free=$(($(df -kP "$TMPDIR" | awk 'END {print $4}') / 1000000))
if [ "$free" -lt 5 ]; then
    echo "The tests need 5 GB of disk for temporary files, and $free GB are free in $(dirname "$TMPDIR"):" \
        "make room there, or set TMPDIR to a folder with more."
    exit 1
fi

echo "== notebooks are clean and exported"
before=$(git status --porcelain -- nbs pillsnap | sort)
changes=$(git diff -- nbs pillsnap | sha256sum)
nbdev_clean
nbdev_export
if [ "${CI:-}" ]; then
    git diff --exit-code -- nbs pillsnap
    test -z "$(git status --porcelain -- nbs pillsnap)" || { git status --short -- nbs pillsnap; exit 1; }
elif [ "$changes" != "$(git diff -- nbs pillsnap | sha256sum)" ] \
    || [ "$before" != "$(git status --porcelain -- nbs pillsnap | sort)" ]; then
    git status --short -- nbs pillsnap
    echo "nbdev_clean and nbdev_export changed the files above: look at the changes, then run the tests again."
    exit 1
fi

echo "== format, style and types"
bash tests/lint.sh

echo "== notebooks run"
OMP_NUM_THREADS=1 nbdev_test --n_workers 2  # one thread each, or two notebooks at a time would wait for each other

echo "== tests"
# Two files at a time, with one thread each: many tests wait for servers and for processes that start.
OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile tests \
    --ignore tests/test_training_engine.py --ignore tests/test_ways.py
# Training that is compared bit for bit runs in a process that no other test has run in.
python -m pytest -q tests/test_training_engine.py tests/test_ways.py
