"""The helper with which tests run a recipe."""

import subprocess

from conftest import ROOT, run
from forks import stand_ins


def recipe(name, *args, cwd=ROOT, ok=True):
    """Run a recipe in this environment, marked as up to date so that set-up installs nothing."""
    home = stand_ins()
    wanted = subprocess.run(
        ["bash", "-c", "cat setup.py constraints.txt recipes/lib/ve-fairseq.txt | cksum"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.strip()
    for extras in ("plots", "plots,langid", "hub,plots"):
        with open(f"{home}/.evomoe-{extras}", "w") as f:
            f.write(f"{wanted}-build\n")
    script = ROOT / f"recipes/{name}/run.sh"
    return run("bash", script, *args, cwd=cwd, env={"EVOMOE_VENV": home}, ok=ok)
