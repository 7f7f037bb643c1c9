"""Nothing is lost if a run is killed, a disk is full or a file is damaged."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run, tool, train, train_args


def test_a_run_killed_again_and_again_ends_the_same(toy, tmp_path):
    """After kill -9 in every stage and during writes, copies and splits, weights are identical."""
    script = Path(__file__).with_name("soak.py")
    out = run(sys.executable, script, toy, tmp_path, "--rounds", 3)
    rows = [json.loads(x) for x in out.splitlines() if x.startswith("{")]
    *kills, result = rows
    assert result["kills"] == len(kills) >= 20
    assert {k["stage"] for k in kills} == {"diversify", "sparsify", "hard"}
    assert {k["moment"][0] for k in kills} == {"update", "write", "copy", "split"}
    assert result["weights"] == result["moments"] == result["loss"] == 0


STEP = ("--evo-spawn-update", 2, "--dts-anneal-updates", 2, "--save-interval-updates", 2)


@pytest.fixture(scope="module")
def begun(toy, tmp_path_factory):
    """Folder of a run of four updates."""
    folder = tmp_path_factory.mktemp("begun")
    train(*train_args(toy, folder, *STEP, "--max-update", 4))
    return folder


def copied(folder, target):
    target.mkdir()
    for path in folder.glob("*.pt"):
        (target / path.name).write_bytes(path.read_bytes())
    return target / "checkpoint_last.pt"


def test_a_full_disk_leaves_the_last_checkpoint(begun, toy, tmp_path):
    """If there is no room to save, the run ends with an error and the last checkpoint is kept."""
    last = copied(begun, tmp_path / "full")
    before = last.read_bytes()
    limit = len(before) // 2
    args = train_args(toy, last.parent, *STEP, "--max-update", 6)
    done = subprocess.run(
        [tool("fairseq-train"), *args],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "File too large" in done.stderr + done.stdout
    assert last.read_bytes() == before
    for left in last.parent.glob("*.tmp"):
        left.unlink()
    rows = train(*train_args(toy, last.parent, *STEP, "--max-update", 6))
    assert [r["num_updates"] for r in rows] == [5, 6]


def test_a_damaged_checkpoint_is_named(begun, toy, tmp_path):
    """If a file is truncated or foreign, the error names it and the fix, and the file is kept."""
    last = copied(begun, tmp_path / "cut")
    whole = last.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no checkpoint at all"):
        last.write_bytes(content)
        with pytest.raises(ValueError, match="checkpoint_last.pt is damaged.*--restore-file"):
            train(*train_args(toy, last.parent, *STEP, "--max-update", 6))
        assert last.read_bytes() == content


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--moe-expert-count", 6), "encoder.1: the checkpoint has 4 experts; give --moe-expert-c"),
        (("--moe-expert-type", "memory", "--memory-bits", 4), "has no such experts"),
        (
            ("--moe-gate-token-bias", 1),
            "encoder.1: the checkpoint has no bias of the token id; give",
        ),
        (("--moe-freq", 1), "encoder.0: the checkpoint has no such experts; evomoe-upcycle"),
    ],
    ids=str,
)
def test_other_experts_are_named(begun, toy, tmp_path, flags, said):
    """If a checkpoint's experts differ from the flags, the error names the layer and the fix."""
    last = copied(begun, tmp_path / "other")
    before = last.read_bytes()
    with pytest.raises(Exception, match="Cannot load model parameters") as caught:
        train(*train_args(toy, last.parent, *STEP, *flags, "--max-update", 6))
    assert said in str(caught.value.__context__)
    assert last.read_bytes() == before


class Bomb:
    """An object that would write a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "ran")


def test_a_pickle_runs_no_code(begun, toy, tmp_path):
    """A checkpoint with code in it is refused by fairseq's commands and by every tool of ours."""
    last = copied(begun, tmp_path / "bomb")
    state = torch.load(last, weights_only=False)
    state["extra_state"]["bomb"] = Bomb(tmp_path / "ran")
    torch.save(state, last)
    generate = ("--path", last, "--user-dir", Path(__file__).parents[2] / "fairseq_evomoe", "--cpu")
    run(tool("fairseq-generate"), toy / "bin", *generate, ok=False)
    tools = {
        "evomoe-upcycle": ("--output", tmp_path / "x.pt"),
        "evomoe-memorise": ("--output", tmp_path / "x.pt"),
        "evomoe-prune": ("--output", tmp_path / "x.pt", "--keep", 2),
        "evomoe-export": ("--output", tmp_path / "x"),
        "evomoe-average": ("--output", tmp_path / "x.pt"),
    }
    for name, flags in tools.items():
        run(tool(name), last, *flags, ok=False)
    run(tool("evomoe-report"), "flops", last, ok=False)
    assert not (tmp_path / "ran").exists()
