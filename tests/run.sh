#!/usr/bin/env bash
# Sets up the environment from scratch and runs all checks: style, types and tests. With --quick, it leaves out the tests that
# train models, run commands or compile. All other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
quick=()
if [ "${1:-}" = --quick ]; then
    quick=(-m "not slow")
    shift
fi
# compiled, because the wheel lacks what the BASE gate uses; one test takes the wheel
export EVOMOE_FAIRSEQ=${EVOMOE_FAIRSEQ:-build}
extras=dev,docs,hub,langid,plots,tensorboard . recipes/lib/environment.sh
bash tests/lint.sh
# beside the environment, because fairseq imports wandb at every start if it finds it, which takes a second; the
# checker of accessibility is one file of a package whose other parts are not needed, and there can be only one fairseq in
# an environment
beside=$(cat tests/run.sh constraints.txt recipes/lib/ve-fairseq.txt | cksum)
if [ "$(cat "$VENV/beside/made_from" 2>/dev/null)" != "$beside" ]; then
    rm -rf "$VENV/beside"
    pip="python -m pip install -q --disable-pip-version-check -c constraints.txt --target $VENV/beside"
    $pip wandb aim
    $pip --no-deps axe-playwright-python
    python -m pip install -q --disable-pip-version-check --no-deps --require-hashes --target "$VENV/beside/ve-fairseq" \
        -r recipes/lib/ve-fairseq.txt
    echo "$beside" >"$VENV/beside/made_from"
fi
# the tests start hundreds of processes, and each would compile all modules again if the shell forbids to keep them compiled
unset PYTHONDONTWRITEBYTECODE
# one process per core; all tests of a file run in one process, so that they share its trained models; files in the order in
# which they are collected, not those with the most tests first
OMP_NUM_THREADS=1 python -m pytest -n auto --dist loadfile --no-loadscope-reorder ${quick[@]+"${quick[@]}"} "$@"
