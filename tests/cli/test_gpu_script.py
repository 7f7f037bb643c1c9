"""benchmarks/gpu.sh on a CPU, so that it does not rot between two loans of a GPU."""

import csv
import os
import subprocess
from pathlib import Path

import pytest
from forks import stand_ins

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TABLES = ("dispatch", "mixtral", "layer", "permute", "lookup", "model")


def script(*args, **env):
    env = {**os.environ, "PYTHON": str(stand_ins() / "bin/python"), "OMP_NUM_THREADS": "1", **env}
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=500)


def test_every_part_runs_and_is_not_repeated(tmp_path):
    """Each part leaves rows that name the device, and a second call does nothing."""
    done = script("--device", "cpu", "--tiny", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in TABLES:
        with (tmp_path / f"{part}.csv").open(encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
        assert rows and all(r["device"] and r["torch"] for r in rows), part
    assert "tests collected" in (tmp_path / "tests.log").read_text()
    again = script("--device", "cpu", "--tiny", "--out", tmp_path)
    assert again.returncode == 0
    lines = again.stdout.splitlines()
    # what lacks its tool or its data is no part that has been done
    assert lines[-1] == "quality: left out: --data is not given"
    assert [x for x in lines if not x.startswith(("quality", "sanitizer"))] == [
        f"{part}: done before" for part in ("tests", *TABLES)
    ]
    # nor is a part done at full size because it was done at the tiny one
    (tmp_path / "permute.done").write_text("cpu full\n")
    assert (
        "permute: done in"
        in script("--device", "cpu", "--tiny", "--out", tmp_path, "permute").stdout
    )


def test_a_part_that_fails_or_takes_too_long(tmp_path):
    """Such a part names its log and is tried again; the others still run."""
    flags = ("--device", "cpu", "--tiny", "--out", tmp_path, "mixtral", "quality")
    done = script(*flags, EVOMOE_PART_SECONDS="1")
    assert done.returncode == 1
    assert f"the log is {tmp_path}/mixtral.log" in done.stdout
    assert "quality: left out" in done.stdout
    done = script(*flags)
    assert done.returncode == 0 and "mixtral: done in" in done.stdout


def test_what_cannot_work(tmp_path):
    """Unknown options and parts, and a device that is missing, are refused at once."""
    for args, said in (
        (("--tine",), "unknown option --tine"),
        (("--device", "cpu", "speed"), "unknown part speed"),
    ):
        done = script(*args, "--out", tmp_path)
        assert done.returncode == 2 and said in done.stderr
    done = script("--out", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "torch finds no CUDA device" in done.stderr
