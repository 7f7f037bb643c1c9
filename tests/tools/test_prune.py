"""tools/prune.py: unused experts are removed, and both reported losses are what fairseq prints."""

import importlib
import json
import re
import shutil

import pytest
import torch
from conftest import USER_DIR, run, tool, train, train_args
from fairseq import checkpoint_utils

from fairseq_evomoe.tools import export, prune
from fairseq_evomoe.tools.checkpoint import build, load, write

PLUGIN = ("--user-dir", USER_DIR, "--cpu", "--num-workers", "0")
HARD = ("--max-update", 6, "--evo-spawn-update", 1, "--dts-anneal-updates", 2)


def pruned(path, out, *flags):
    report = out.with_suffix(".json")
    command = (path, "--output", out, "--cpu", "--max-tokens", 400, "--json", report, *flags)
    prune.main([str(a) for a in command])
    return json.loads(report.read_text())


@pytest.fixture(scope="module", params=["translation", "lm", "mlm"])
def checkpoint(request, toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"prune-{request.param}")
    train(*train_args(toy, folder, *HARD, family=request.param))
    return request.param, folder / "checkpoint_last.pt"


def test_losses_are_those_of_fairseq_validate(checkpoint, toy, tmp_path):
    """The losses before and after are those that the real command prints for both checkpoints."""
    family, path = checkpoint
    report = pruned(path, tmp_path / "p.pt", "--keep", 2)
    data, task = ("bin", "translation") if family == "translation" else ("mono", family)
    task = {"lm": "language_modeling", "mlm": "masked_lm"}.get(task, task)
    lengths = () if family == "translation" else ("--tokens-per-sample", "32")
    lengths += () if family == "translation" else ("--sample-break-mode", "eos")
    for file, key in ((path, "loss_before"), (tmp_path / "p.pt", "loss_after")):
        out = run(
            *(tool("fairseq-validate"), toy / data, *PLUGIN, "--path", file, "--seed", "7"),
            *("--task", f"{task}_evomoe", "--max-tokens", "400", "--log-format", "json", *lengths),
            *("--required-batch-size-multiple", "1"),
        )
        printed = json.loads(re.findall(r"\| valid \| (\{.*\})", out)[-1])
        assert float(printed["valid_loss"]) == pytest.approx(report[key], abs=2e-3)
    assert (report["experts_before"], report["experts_after"]) == (4, 2)
    state = load(tmp_path / "p.pt")
    assert all(v.size(0) == 2 for n, v in state["model"].items() if n.endswith("experts.w1"))


def test_an_unused_expert_costs_nothing(toy, tmp_path):
    """Experts that no token chooses are removed by default, which leaves the loss exactly equal."""
    train(*train_args(toy, tmp_path, *HARD))
    checkpoint = load(tmp_path / "checkpoint_last.pt")
    for name, value in checkpoint["model"].items():
        if name.endswith("experts.b2"):
            # experts 1 and 2 have huge outputs, which no token uses
            value[1:3] = 1e6
        if name.endswith("gate.weight"):
            value[1:3] = 0
            # logits so large that no probability is left for the others
            value[0] *= 1e6
            value[3] = -value[0]
    write(checkpoint, tmp_path / "idle.pt")
    report = pruned(tmp_path / "idle.pt", tmp_path / "p.pt")
    assert report["experts_after"] == 2
    assert all(k == [0, 3] for k in report["kept"].values())
    assert report["loss_after"] == report["loss_before"]
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "p.pt")])
    assert model.encoder.layers[1].moe_layer.gate.weight.size(0) == 2


@pytest.mark.parametrize(
    "flags",
    [
        ("--moe-shared-expert",),
        ("--moe-gate", "switch", "--moe-balance-bias", 0.1),
        ("--moe-gate", "stable", "--stable-freeze-update", 2),
        ("--moe-gate", "base"),
        ("--moe-gate", "switch", "--moe-gate-token-bias", 1),
        ("--evo-spawn-update", 0, "--dts-hard-update", 0),
    ],
    ids=str,
)
def test_every_kind_of_state_shrinks(toy, tmp_path, flags):
    """The pruned model loads and keeps the rows of its experts, for every kind of gate state."""
    train(*train_args(toy, tmp_path, *HARD, *flags))
    path = tmp_path / "checkpoint_last.pt"
    report = pruned(path, tmp_path / "p.pt", "--keep", 3)
    assert report["experts_after"] == 3
    (old,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    (new,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "p.pt")])
    for name, kept in report["kept"].items():
        a, b = old.get_submodule(name), new.get_submodule(name)
        shared = int("--moe-shared-expert" in flags)
        rows = [0] * shared + [e + shared for e in kept]
        assert torch.equal(b.experts.w1, a.experts.w1[rows])
        assert torch.equal(b.gate.weight, a.gate.weight[kept])
        assert b.cfg.threshold == pytest.approx(a.cfg.threshold) or flags[0] == "--moe-gate"
        assert b.phase == a.phase


@pytest.mark.parametrize("shared", [(), ("--moe-shared-expert",)], ids=["plain", "shared"])
def test_experts_in_int8(toy, tmp_path, shared):
    """A checkpoint that was converted first is what the pruned one would be converted to."""
    train(*train_args(toy, tmp_path, *HARD, *shared))
    path, small = tmp_path / "checkpoint_last.pt", tmp_path / "small.pt"
    export.main([str(path), "--experts", "int8", "--output", str(small)])
    report = pruned(small, tmp_path / "a.pt", "--keep", 2)
    write(
        prune.prune(path, keep=2, min_share=0, subset="valid", max_tokens=400, cpu=True)[0],
        tmp_path / "b.pt",
    )
    export.main([str(tmp_path / "b.pt"), "--experts", "int8", "--output", str(tmp_path / "c.pt")])
    a, c = load(tmp_path / "a.pt")["model"], load(tmp_path / "c.pt")["model"]
    assert report["experts_after"] == 2 and list(a) == list(c)
    assert all(torch.equal(a[name], c[name]) for name in a)


def test_words_keep_their_expert(toy, tmp_path):
    """StableMoE's frozen words keep their expert unless it is removed."""
    train(*train_args(toy, tmp_path, "--moe-gate", "stable", "--stable-freeze-update", 2,
                      "--max-update", 12))  # fmt: skip
    path = tmp_path / "checkpoint_last.pt"
    report = pruned(path, tmp_path / "p.pt", "--keep", 3)
    old, new = load(path)["model"], load(tmp_path / "p.pt")["model"]
    for name, kept in report["kept"].items():
        a, b = old[f"{name}.gate.table"], new[f"{name}.gate.table"]
        stays = torch.isin(a, torch.tensor(kept))
        assert torch.equal(torch.tensor(kept)[b[stays]], a[stays])
        assert 0 < stays.float().mean() < 1 and b.max() < 3


def test_refusals(checkpoint, toy, tmp_path, capsys):
    """Impossible counts, gates and models are refused with the reason, and no file is written."""
    _, path = checkpoint

    def fails(path, message, *flags):
        with pytest.raises(SystemExit):
            pruned(path, tmp_path / "p.pt", *flags)
        assert message in capsys.readouterr().err and not (tmp_path / "p.pt").exists()

    fails(path, "--keep 9: choose 1 (what the gate's flags need) to 4 (all)", "--keep", 9)
    fails(path, "--min-share -1.0", "--min-share", -1)
    train(*train_args(toy, tmp_path / "h", "--moe-gate", "hash", "--max-update", 1))
    fails(tmp_path / "h/checkpoint_last.pt", "--moe-gate hash")
    train(*train_args(toy, tmp_path / "k", "--moe-gate", "gshard", "--max-update", 1))
    fails(tmp_path / "k/checkpoint_last.pt", "--keep 1: choose 2", "--keep", 1)
    early = ("--evo-spawn-update", 2, "--max-update", 3, "--save-interval-updates", 1)
    train(*train_args(toy, tmp_path / "s", *early))
    fails(tmp_path / "s/checkpoint_1_1.pt", "from before the split")
    train(*train_args(toy, tmp_path / "d", "--moe-freq", 0, "--max-update", 1))
    fails(tmp_path / "d/checkpoint_last.pt", "holds no MoE layer")


@pytest.mark.parametrize("name", ["prune", "upcycle", "memorise"])
def test_data_of_another_vocabulary(checkpoint, toy, tmp_path, name):
    """Every tool that builds the model says in one line that the dictionary is another one."""
    family, path = checkpoint
    data = tmp_path / "data"
    shutil.copytree(toy / ("bin" if family == "translation" else "mono"), data)
    for dictionary in data.glob("dict*.txt"):
        words = dictionary.read_text().split("\n")
        dictionary.write_text("\n".join(words[: len(words) // 2]) + "\n")
    with pytest.raises(
        ValueError, match=r"was trained with \d+ words, but the dictionary in .* has"
    ):
        build(path, str(data))
    module = importlib.import_module(f"fairseq_evomoe.tools.{name}")
    flags = {"upcycle": ("--experts", "2"), "memorise": ()}.get(name, ())
    with pytest.raises(SystemExit):
        module.main([str(path), "--output", str(tmp_path / "o.pt"), "--data", str(data), *flags])
    assert not (tmp_path / "o.pt").exists()
