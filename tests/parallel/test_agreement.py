"""Workers agree on every collective and on every key, whatever each of them draws."""

import os

import pytest
import torch
from conftest import train_args, train_workers
from fairseq import utils

STAGES = ("--evo-spawn-update", 2, "--dts-anneal-updates", 3, "--dts-hard-update", 6)
DRAWS = ("--dropout", 0.2, "--attention-dropout", 0.1, "--activation-dropout", 0.1)
DROP = ("--encoder-layerdrop", 0.5, "--decoder-layerdrop", 0.5)
LEGACY = ("--ddp-backend", "legacy_ddp")
UNUSED = ("--find-unused-parameters",)


@pytest.fixture
def own_streams(monkeypatch):
    """Give every worker a random stream of its own, where fairseq gives all the same."""
    seed = utils.set_torch_seed

    class Own(seed):
        def __init__(self, value):
            super().__init__(value + 1000 * int(os.environ["RANK"]))

    monkeypatch.setattr(utils, "set_torch_seed", Own)


CASES = {
    "dts, layers dropped": (*STAGES, *DROP, *LEGACY),
    "dts, layers dropped, torch's DDP": (*STAGES, *DROP, *UNUSED),
    "dts, gumbel noise": (*STAGES, "--dts-noise", "gumbel"),
    "switch, layers dropped, balancing bias": (
        *("--moe-gate", "switch", "--moe-balance-bias", 0.01, *DROP, *LEGACY),
    ),
    "switch, capacity": ("--moe-gate", "switch", "--moe-capacity-factor", 0.5),
    "gshard samples": ("--moe-gate", "gshard", "--moe-balance-all-ranks"),
    "base, layers dropped": ("--moe-gate", "base", *DROP, *LEGACY),
    "hash, layers dropped": ("--moe-gate", "hash", *DROP, *LEGACY),
    "stable, layers dropped": ("--moe-gate", "stable", *DROP, *LEGACY),
    "memory experts, layers dropped": (
        *(*STAGES, "--moe-expert-type", "memory", "--memory-bits", 4, *DROP, *LEGACY),
    ),
    "expert parallel": (*STAGES, "--expert-parallel", "--dts-noise", "gumbel"),
    "expert parallel, base": ("--moe-gate", "base", "--expert-parallel"),
}


@pytest.mark.parametrize("case", CASES)
def test_workers_with_their_own_random_streams(toy, tmp_path, case, own_streams):
    """Eight updates and a validation end; fairseq itself compares the gradients of the workers.

    Workers see batches of different sizes, and the last update of the epoch has none for one of
    them, since a single batch is left.
    """
    args = train_args(toy, tmp_path, *DRAWS, *CASES[case], "--max-update", 8, "--update-freq", 2)
    args.remove("--disable-validation")
    lines = train_workers(2, *args)
    assert [r["num_updates"] for r in lines] == list(range(1, 9))
    assert all(r["moe_active_experts"] >= 0 and r["loss"] > 0 for r in lines)
    saved = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    assert all(torch.isfinite(v.float()).all() for v in saved["model"].values())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ("--moe-gate", "switch", "--moe-balance-all-ranks", *DROP),
            "--encoder-layerdrop: not with --moe-balance-all-ranks on several workers",
        ),
        ((*STAGES, "--expert-parallel", *DROP), "--encoder-layerdrop: not with --expert-parallel"),
        (
            (*STAGES, "--expert-parallel", "--optimizer", "adafactor"),
            "--optimizer adafactor: not with --expert-parallel",
        ),
    ],
)
def test_what_cannot_work_together_is_refused(toy, tmp_path, flags, said):
    """The message names both flags, before anything waits."""
    with pytest.raises(AssertionError, match=said):
        train_workers(2, *train_args(toy, tmp_path, *flags, "--max-update", 8))
