# Creates the project's virtual environment, or does nothing if it is up to date. Source it:
#   extras=plots; . recipes/lib/environment.sh
# Afterwards $VENV/bin is on the PATH. EVOMOE_VENV chooses another folder, PYTHON another interpreter.
#
# fairseq has no wheel for Python 3.11, so it is compiled. torch and the build tools are installed
# first and build isolation is off, because an isolated build would download torch a second time.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
VENV=${EVOMOE_VENV:-$ROOT/.venv}
PYTHON=${PYTHON:-python3}

_fail() { echo "set-up: $*" >&2; exit 1; }

_install() {
    "$PYTHON" -c 'import sys, venv; assert (3, 11) <= sys.version_info < (3, 13)' 2>/dev/null ||
        _fail "Python 3.11 or 3.12 with venv is needed; set PYTHON to one (Debian: apt-get install python3-venv)"
    for tool in gcc g++; do
        command -v $tool >/dev/null || _fail "$tool is needed to compile fairseq (Debian: apt-get install g++)"
    done
    local pip="$VENV/bin/python -m pip --disable-pip-version-check"
    local constraints="-c $ROOT/constraints.txt"
    [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
    $pip install -q $constraints torch numpy cython setuptools wheel ninja
    # if CUDA_HOME is set, fairseq builds CUDA sources, which its release does not contain
    env -u CUDA_HOME MAX_JOBS=$(nproc) CFLAGS=-g0 \
        $pip install -q --no-build-isolation $constraints fairseq-fixed
    $pip install -q --no-build-isolation $constraints -e "$ROOT[$extras]"
    "$VENV/bin/python" -c 'import fairseq, fairseq_evomoe'
}

extras=${extras:-plots}
_stamp=$VENV/.evomoe-$extras
_wanted=$(cat "$ROOT/setup.py" "$ROOT/constraints.txt" | cksum)
if [ "$(cat "$_stamp" 2>/dev/null)" != "$_wanted" ]; then
    echo "set-up: $VENV ($extras)"
    _start=$SECONDS
    _install
    echo "$_wanted" >"$_stamp"
    echo "set-up: done in $((SECONDS - _start)) s"
fi
PATH=$VENV/bin:$PATH
