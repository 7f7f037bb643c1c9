"""Runs that are killed, disks that are full, files that are damaged: nothing is lost."""

import json
import sys
from pathlib import Path

from conftest import run


def test_a_run_killed_again_and_again_ends_the_same(toy, tmp_path):
    """kill -9 in every stage, within writes, copies and the split: the same weights, to the bit."""
    script = Path(__file__).with_name("soak.py")
    out = run(sys.executable, script, toy, tmp_path, "--rounds", 3)
    rows = [json.loads(x) for x in out.splitlines() if x.startswith("{")]
    *kills, result = rows
    assert result["kills"] == len(kills) >= 20
    assert {k["stage"] for k in kills} == {"diversify", "sparsify", "hard"}
    assert {k["moment"][0] for k in kills} == {"update", "write", "copy", "split"}
    assert result["weights"] == result["moments"] == result["loss"] == 0
