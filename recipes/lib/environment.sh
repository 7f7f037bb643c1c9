# Creates the project's virtual environment, or does nothing if it is up to date. Source it:
#   extras=plots; . recipes/lib/environment.sh
# Afterwards $VENV/bin is on the PATH. EVOMOE_VENV chooses another folder, PYTHON another interpreter.
#
# fairseq itself has no wheel for Python 3.11, and its wheel for 3.12 was built for another torch, which one of its modules
# does not load with. Compiling it takes longer than all the rest. EVOMOE_FAIRSEQ=wheel takes the wheel of another
# distribution of it, whose contents are checked against lib/ve-fairseq.txt; no compiler is needed.
# EVOMOE_FAIRSEQ=build compiles it. Without a choice, an environment keeps the one it has, and a new one takes the wheel
# where there is one for this machine.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
VENV=${EVOMOE_VENV:-$ROOT/.venv}
PYTHON=${PYTHON:-python3}

_fail() { echo "set-up: $*" >&2; exit 1; }
_do() { "$@" || _fail "this failed: $*"; }

# Build isolation is off, because an isolated build would download torch a second time. If CUDA_HOME is set, fairseq
# builds CUDA sources, which its release does not contain.
_build_fairseq() {
    env -u CUDA_HOME MAX_JOBS=$(nproc) CFLAGS=-g0 $pip wheel -q --no-build-isolation --no-deps $constraints \
        --no-binary fairseq-fixed --wheel-dir "$VENV/wheels" fairseq-fixed
}

_install() {
    "$PYTHON" -c 'import sys, venv; assert (3, 11) <= sys.version_info < (3, 13)' 2>/dev/null ||
        _fail "Python 3.11 or 3.12 with venv is needed; set PYTHON to one (Debian: apt-get install python3-venv)"
    local pip="$VENV/bin/python -m pip --disable-pip-version-check" constraints="-c $ROOT/constraints.txt" building=
    # modules are compiled when they are imported, since most never are
    local install="_do $pip install -q --no-compile"
    [ -x "$VENV/bin/python" ] || _do "$PYTHON" -m venv "$VENV"
    rm -rf "$VENV/wheels"
    # another set of extras in the same environment
    [ "$_fairseq" != any ] || ! compgen -G "$VENV/lib/python3*/site-packages/fairseq_fixed-*" >/dev/null || _fairseq=build
    if [ "$_fairseq" != build ]; then
        if $pip download -q --no-deps --require-hashes --dest "$VENV/wheels" -r "$ROOT/recipes/lib/ve-fairseq.txt"; then
            _fairseq=wheel
        elif [ "$_fairseq" = wheel ]; then
            _fail "the wheel of fairseq could not be had, see above; EVOMOE_FAIRSEQ=build compiles fairseq instead"
        else
            echo "set-up: the wheel of fairseq could not be had, see above; compiling fairseq instead" >&2
            _fairseq=build
        fi
    fi
    if [ "$_fairseq" = build ]; then
        for tool in gcc g++; do
            command -v $tool >/dev/null ||
                _fail "$tool is needed to compile fairseq (Debian: apt-get install g++); or set EVOMOE_FAIRSEQ=wheel"
        done
    fi
    $install $constraints torch numpy cython setuptools wheel ninja
    _do "$VENV/bin/python" "$ROOT/recipes/lib/requirements.py" "$extras" >"$VENV/requirements.txt"
    # fairseq is compiled on one core while the other one installs the rest
    if [ "$_fairseq" = build ]; then
        _build_fairseq &
        building=$!
    fi
    $install $constraints -r "$VENV/requirements.txt"
    $pip uninstall -q -y $([ "$_fairseq" = build ] && echo ve-fairseq || echo fairseq-fixed) 2>/dev/null
    if [ -n "$building" ]; then
        wait "$building" || _fail "fairseq could not be compiled; see above, or set EVOMOE_FAIRSEQ=wheel"
        _do $pip install -q --no-deps --force-reinstall "$VENV"/wheels/fairseq_fixed-*.whl
    else
        $install --no-deps "$VENV"/wheels/ve_fairseq-*.whl
    fi
    $install --no-build-isolation --no-deps -e "$ROOT"
    # compiled now, even if the user's shell forbids it, because compiling them again would take ten seconds at every start;
    # one of the wheel's modules warns when it is compiled
    _do env -u PYTHONDONTWRITEBYTECODE "$VENV/bin/python" -W ignore::SyntaxWarning -c 'import fairseq, fairseq_evomoe'
}

extras=${extras:-plots}
_stamp=$VENV/.evomoe-$extras
_wanted=$(cat "$ROOT/setup.py" "$ROOT/constraints.txt" "$ROOT/recipes/lib/ve-fairseq.txt" | cksum)
_found=$(cat "$_stamp" 2>/dev/null || true)
_fairseq=${EVOMOE_FAIRSEQ:-any}
case $_fairseq in
    any | build | wheel) ;;
    *) _fail "EVOMOE_FAIRSEQ=$EVOMOE_FAIRSEQ: choose build or wheel" ;;
esac
if [ "${_found%-*}" != "$_wanted" ] || { [ "$_fairseq" != any ] && [ "${_found##*-}" != "$_fairseq" ]; }; then
    echo "set-up: $VENV ($extras)"
    _start=$SECONDS
    _install
    echo "$_wanted-$_fairseq" >"$_stamp"
    echo "set-up: done in $((SECONDS - _start)) s, with fairseq $([ "$_fairseq" = wheel ] && echo from a wheel || echo compiled here)"
fi
PATH=$VENV/bin:$PATH
