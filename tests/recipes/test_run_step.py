"""recipes/steps/run_step.py: progress, failure and interruption of a recipe's commands."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

SCRIPT = ROOT / "recipes/steps/run_step.py"
TRAIN = """
import json, sys, time
for n in range(10, 60, 10):
    row = {"num_updates": n, "loss": "4.21", "moe_active_experts": "1.25", "wps": "12345.6"}
    print("2026-01-01 | INFO | train_inner |", json.dumps(row), flush=True)
    time.sleep(0.4)
"""


def start(*args, seconds="0.1", **more):
    env = {**os.environ, "EVOMOE_PROGRESS_SECONDS": seconds, "EVOMOE_RECIPE": "bash r.sh --seed 1"}
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.Popen(command, text=True, env=env, **more)


def finish(*args, **more):
    process = start(*args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_a_training_says_how_far_it_is(tmp_path):
    """Lines name the update, the loss, the active experts, the speed and the time that is left, and
    the log holds what the command printed."""
    log = tmp_path / "new/train.log"
    code = (sys.executable, "-c", TRAIN)
    status, out, err = finish("--step", "train", "--log", log, "--updates", 50, "--", *code)
    assert status == 0 and out == ""
    lines = err.splitlines()
    assert lines[-1].startswith("train: update 50 of 50, loss 4.21, 1.2 active experts, 12,346 tok")
    assert any("about 1 s left" in x or "about 2 s left" in x for x in lines)
    assert len(log.read_text().splitlines()) == 5
    # a second training goes on in the same log, and counts from its own start
    status, _, err = finish(
        *("--step", "train", "--log", log, "--append", "--updates", 60, "--", *code)
    )
    assert status == 0 and "of 60" in err and len(log.read_text().splitlines()) == 10


def test_a_translation_counts_its_sentences(tmp_path):
    """Hypotheses are counted in standard output, which stays apart from the log."""
    code = (
        "import sys, time; print('x', file=sys.stderr)\n"
        "for i in range(4): print(f'S-{i}\\nH-{i}', flush=True); time.sleep(0.3)"
    )
    log, out = tmp_path / "log", tmp_path / "out"
    flags = ("--step", "translate", "--log", log, "--stdout", out, "--sentences", 4)
    status, _, err = finish(*flags, "--", sys.executable, "-c", code)
    assert status == 0 and "translate: 4 of 4 sentences" in err
    assert log.read_text() == "x\n" and out.read_text().count("H-") == 4


def test_a_short_step_is_quiet(tmp_path):
    """A step that ends before the first line is due prints nothing."""
    status, out, err = finish("--step", "x", "--log", tmp_path / "log", "--", "true", seconds="30")
    assert (status, out, err) == (0, "", "")


def test_a_failure_names_step_log_and_commands(tmp_path):
    """The last lines of the log come first, then what failed, where, and how to go on."""
    code = "for i in range(50): print('line', i)\nraise SystemExit(7)"
    log = tmp_path / "log"
    status, _, err = finish("--step", "clean", "--log", log, "--", sys.executable, "-c", code)
    assert status == 7
    assert "line 49" in err and "line 30" in err and "line 29\n" not in err
    assert f"step clean failed with status 7; these are the last lines of its log, {log}" in err
    assert f"The step alone: {sys.executable} -c" in err
    assert err.endswith("Go on with the same command: bash r.sh --seed 1\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_stops_the_command(tmp_path, number):
    """The command gets the signal and ends before the script does, which says how to go on."""
    code = (
        "import time\n"
        "try: print('ready', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt: print('saved', flush=True)"
    )
    log = tmp_path / "log"
    flags = ("--step", "train", "--log", log, "--updates", 9, "--", sys.executable, "-c", code)
    process = start(*flags, stderr=subprocess.PIPE, seconds="30")
    while not (log.exists() and "ready" in log.read_text()):
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and log.read_text() == "ready\nsaved\n"
    assert err == "train: stopped at: starting. Go on with the same command: bash r.sh --seed 1\n"


def test_a_terminal_shows_one_line(tmp_path):
    """On a terminal the line is rewritten in place and removed at the end."""
    outside, inside = pty.openpty()
    code = TRAIN.replace("0.4", "0.8")
    flags = ("--step", "train", "--log", tmp_path / "log", "--updates", 50)
    process = start(*flags, "--", sys.executable, "-c", code, stderr=inside)
    assert process.wait(30) == 0
    os.close(inside)
    said = os.read(outside, 100_000).decode()
    assert said.count("\r\x1b[Ktrain: update") >= 2 and "\n" not in said
    assert said.endswith("\r\x1b[K")
