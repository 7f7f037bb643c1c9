# Creates the project's virtual environment, or does nothing if it is up to date. Source it:
#   extras=plots; . recipes/lib/environment.sh
# Afterwards $VENV/bin is on the PATH. EVOMOE_VENV chooses another folder, PYTHON another interpreter.
#
# fairseq has no wheel for Python 3.11 of its own, so it is compiled, by default. EVOMOE_FAIRSEQ=wheel takes the wheel of
# another distribution of it instead, whose contents are checked against lib/ve-fairseq.txt; no compiler is needed then.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
VENV=${EVOMOE_VENV:-$ROOT/.venv}
PYTHON=${PYTHON:-python3}
EVOMOE_FAIRSEQ=${EVOMOE_FAIRSEQ:-build}

_fail() { echo "set-up: $*" >&2; exit 1; }
_do() { "$@" || _fail "this failed: $*"; }

# Build isolation is off, because an isolated build would download torch a second time. If CUDA_HOME is set, fairseq
# builds CUDA sources, which its release does not contain.
_build_fairseq() {
    env -u CUDA_HOME MAX_JOBS=$(nproc) CFLAGS=-g0 $pip wheel -q --no-build-isolation --no-deps $constraints \
        --wheel-dir "$VENV/wheels" fairseq-fixed
}

_install() {
    "$PYTHON" -c 'import sys, venv; assert (3, 11) <= sys.version_info < (3, 13)' 2>/dev/null ||
        _fail "Python 3.11 or 3.12 with venv is needed; set PYTHON to one (Debian: apt-get install python3-venv)"
    case $EVOMOE_FAIRSEQ in
        build)
            for tool in gcc g++; do
                command -v $tool >/dev/null ||
                    _fail "$tool is needed to compile fairseq (Debian: apt-get install g++); or set EVOMOE_FAIRSEQ=wheel"
            done ;;
        wheel) ;;
        *) _fail "EVOMOE_FAIRSEQ=$EVOMOE_FAIRSEQ: choose build or wheel" ;;
    esac
    local pip="$VENV/bin/python -m pip --disable-pip-version-check" constraints="-c $ROOT/constraints.txt" building=
    # modules are compiled when they are imported, since most never are
    local install="_do $pip install -q --no-compile"
    [ -x "$VENV/bin/python" ] || _do "$PYTHON" -m venv "$VENV"
    rm -rf "$VENV/wheels"
    $install $constraints torch numpy cython setuptools wheel ninja
    _do "$VENV/bin/python" "$ROOT/recipes/lib/requirements.py" "$extras" >"$VENV/requirements.txt"
    # fairseq is compiled on one core while the other one installs the rest
    if [ "$EVOMOE_FAIRSEQ" = build ]; then
        _build_fairseq &
        building=$!
    fi
    $install $constraints -r "$VENV/requirements.txt"
    $pip uninstall -q -y fairseq-fixed ve-fairseq 2>/dev/null
    if [ -n "$building" ]; then
        wait "$building" || _fail "fairseq could not be compiled; see above, or set EVOMOE_FAIRSEQ=wheel"
        _do $pip install -q --no-deps "$VENV"/wheels/fairseq_fixed-*.whl
    else
        _do $pip install -q --no-deps --require-hashes -r "$ROOT/recipes/lib/ve-fairseq.txt"
    fi
    $install --no-build-isolation --no-deps -e "$ROOT"
    _do "$VENV/bin/python" -c 'import fairseq, fairseq_evomoe'
}

extras=${extras:-plots}
_stamp=$VENV/.evomoe-$extras
_wanted=$(cat "$ROOT/setup.py" "$ROOT/constraints.txt" "$ROOT/recipes/lib/ve-fairseq.txt" | cksum)-$EVOMOE_FAIRSEQ
if [ "$(cat "$_stamp" 2>/dev/null)" != "$_wanted" ]; then
    echo "set-up: $VENV ($extras)"
    _start=$SECONDS
    _install
    echo "$_wanted" >"$_stamp"
    echo "set-up: done in $((SECONDS - _start)) s"
fi
PATH=$VENV/bin:$PATH
