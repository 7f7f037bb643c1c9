"""recipes/lib/environment.sh: which fairseq the set-up takes, and what it says where it cannot."""

import shutil
import subprocess

import pytest
from conftest import ROOT

PYTHON = """#!/bin/bash
# notes what it is asked for, and does nothing
echo "${PYTHONDONTWRITEBYTECODE:+uncompiled }$*" >>"$(dirname "$0")/../asked"
case "$*" in
    *" download "*) exit $WHEEL ;;
    *" wheel -q "*) exit $BUILD ;;
esac
"""


@pytest.fixture
def home(tmp_path):
    """A virtual environment without packages, whose Python only notes what it is asked for."""
    (tmp_path / "venv/bin").mkdir(parents=True)
    python = tmp_path / "venv/bin/python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path / "venv"


def set_up(home, choice="", wheel=0, build=0, extras="plots", programs="gcc g++"):
    """Source the script as a recipe does; return its status, what it says, what it asked for."""
    tools = home.parent / "tools"
    shutil.rmtree(tools, ignore_errors=True)
    tools.mkdir()
    for program in ("bash", "cat", "cksum", "dirname", "nproc", "env", "rm", "mkdir"):
        (tools / program).symlink_to(shutil.which(program))
    for program in programs.split():
        (tools / program).symlink_to("/bin/true")
    (home / "asked").unlink(missing_ok=True)
    chosen = {"EVOMOE_FAIRSEQ": choice} if choice else {}
    done = subprocess.run(
        [tools / "bash", "-c", f"set -euo pipefail; extras={extras} . recipes/lib/environment.sh"],
        cwd=ROOT,
        env={"PATH": str(tools), "EVOMOE_VENV": str(home), "PYTHON": str(home / "bin/python")}
        | {"WHEEL": str(wheel), "BUILD": str(build), "PYTHONDONTWRITEBYTECODE": "1", **chosen},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    asked = (home / "asked").read_text() if (home / "asked").exists() else ""
    return done.returncode, done.stdout, asked


def compiled(asked):
    return " wheel -q " in asked


def test_a_new_environment_takes_the_wheel(home):
    """It is not compiled, the last line says so, and the next set-up has nothing to do."""
    status, said, asked = set_up(home)
    assert status == 0 and said.splitlines()[-1].endswith("with fairseq from a wheel")
    assert not compiled(asked)
    assert "ve_fairseq" in asked and "uninstall -q -y fairseq-fixed" in asked
    assert set_up(home) == (0, "", "")
    assert set_up(home, programs="") == (0, "", "")


def test_modules_are_kept_compiled(home):
    """The set-up ends with an import that writes compiled modules, though the shell forbids it."""
    _, _, asked = set_up(home)
    *_, last = asked.splitlines()
    assert last.endswith("import fairseq, fairseq_evomoe") and not last.startswith("uncompiled")
    assert asked.count("uncompiled ") == len(asked.splitlines()) - 1


def test_where_there_is_no_wheel_it_is_compiled(home):
    """The reason is said, and the other distribution of fairseq is removed."""
    status, said, asked = set_up(home, wheel=1)
    assert status == 0 and "compiling fairseq instead" in said
    assert said.splitlines()[-1].endswith("with fairseq compiled here")
    assert compiled(asked) and "uninstall -q -y ve-fairseq" in asked


@pytest.mark.parametrize("first", ["build", "wheel"])
def test_without_a_choice_an_environment_keeps_its_own(home, first):
    """Other extras change nothing in the fairseq that is there; a choice changes it."""
    set_up(home, first)
    if first == "build":
        (home / "lib/python3.11/site-packages/fairseq_fixed-0.dist-info").mkdir(parents=True)
    status, _, asked = set_up(home, extras="hub")
    assert status == 0 and compiled(asked) == (first == "build")
    other = {"build": "wheel", "wheel": "build"}[first]
    status, _, asked = set_up(home, other)
    assert status == 0 and compiled(asked) == (other == "build")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"choice": "conda"}, "EVOMOE_FAIRSEQ=conda: choose build or wheel"),
        ({"choice": "wheel", "wheel": 1}, "EVOMOE_FAIRSEQ=build compiles fairseq instead"),
        ({"choice": "build", "programs": ""}, "gcc is needed to compile fairseq"),
        ({"choice": "build", "programs": "gcc"}, "g++ is needed to compile fairseq"),
        ({"choice": "build", "build": 1}, "or set EVOMOE_FAIRSEQ=wheel"),
    ],
)
def test_what_cannot_work(home, how, said):
    """The error names the variable that helps, and the next set-up begins anew."""
    status, printed, _ = set_up(home, **how)
    assert status != 0 and said in printed
    assert not list(home.glob(".evomoe-*"))
    assert set_up(home)[0] == 0
