"""The stand-ins with which the tests run shell scripts do what the real programs do."""

import os
import subprocess
import sys

import pytest
from forks import stand_ins


def say(text, home):
    """What a line of the shell prints."""
    env = {**os.environ, "PATH": f"{home}/bin:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "python -c 'import sys; print(sys.argv, sys.path[0]); sys.exit(7)' a b; echo $?",
        "echo 'import sys; print(sys.stdin.read(), sys.argv)' | python - a",
        "cd /; python -m json.tool <<<'{\"a\": [1]}'; pwd",
        "cd /; python -c 'import os; print(os.getcwd())'",
        "python -c 1/0 2>&1 | tail -1",
        "python -c 'exit(\"no\")'; echo $?",
        "echo 'import sys; print(sys.argv, __name__, sys.path[0])' >$TMP/x.py; python $TMP/x.py -b",
        "PYTHONPATH=/known python -c 'import sys; print(sys.path[:2])'",
        "V=1 python -c 'import os; print(os.environ[\"V\"])'",
        "python -c 'import time; time.sleep(60)' & sleep .3; kill $!; wait $! 2>/dev/null; echo $?",
        "evomoe-prune --keep 2>&1 | tail -1",
    ],
)
def test_as_the_real_program(tmp_path, monkeypatch, text):
    """Output, exit status, arguments, standard input, folder, variables and signals agree."""
    monkeypatch.setenv("TMP", str(tmp_path))
    assert say(text, stand_ins()) == say(text, sys.prefix) != ""


@pytest.mark.parametrize(
    ("how", "who"), [("kill -9 $!", "True"), ("kill -- -$!", "os.fork() == 0")], ids=["9", "group"]
)
def test_nothing_is_left_behind(how, who, tmp_path):
    """The fork ends with its stand-in; its own forks end with the process group, as they would."""
    code = f'import os, time; {who} and open("pid", "w").write(str(os.getpid())); time.sleep(60)'
    alive = "kill -0 $(cat pid) 2>/dev/null"
    until = "for i in $(seq 200); do {} && break; sleep .1; done"
    begin = f"set -m; cd {tmp_path}; python -c '{code}' & {until.format('[ -s pid ]')}"
    end = f"{until.format('! ' + alive)}; {alive} || echo gone"
    assert "gone" in say(f"{begin}; {alive} && {how}; {end}", stand_ins())
