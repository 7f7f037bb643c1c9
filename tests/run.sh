#!/usr/bin/env bash
# Sets everything up from nothing and runs all checks: style, types, tests. Further words go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=dev,docs,hub,langid,plots,tensorboard . recipes/environment.sh
bash tests/lint.sh
# one process a core; a test file stays in one process, which then shares its trained models
OMP_NUM_THREADS=1 python -m pytest -n auto --dist loadfile "$@"
