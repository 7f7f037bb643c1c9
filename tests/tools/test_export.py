"""tools/export.py: export to safetensors and JSON, and back, exact to the bit."""

import copy
import json
from argparse import Namespace

import pytest
import torch
from conftest import USER_DIR, run, tool, train, train_args, valid_batch
from fairseq import checkpoint_utils

from fairseq_evomoe.kernels.experts import few_rows
from fairseq_evomoe.tools import export, json_values
from fairseq_evomoe.tools.cost import costs

PLUGIN = ("--user-dir", USER_DIR, "--cpu", "--num-workers", "0")


@pytest.fixture(scope="module", params=["translation", "lm", "mlm"])
def checkpoint(request, toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"export-{request.param}")
    flags = ("--max-update", 4, "--evo-spawn-update", 1)
    train(*train_args(toy, folder, *flags, family=request.param))
    return request.param, folder / "checkpoint_last.pt"


def test_there_and_back(checkpoint, tmp_path):
    """Weights, evolution state, tied tensors and flags are restored exactly, without a pickle."""
    _, path = checkpoint
    export.main([str(path), "--output", str(tmp_path / "out")])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    export.main([str(tmp_path / "out"), "--output", str(tmp_path / "back.pt")])
    before = torch.load(path, weights_only=False)
    after = torch.load(tmp_path / "back.pt", weights_only=False)
    assert list(before["model"]) == list(after["model"])
    for name, value in before["model"].items():
        assert value.dtype == after["model"][name].dtype
        assert torch.equal(value, after["model"][name]), name
    assert after["cfg"] == before["cfg"]
    updates = lambda c: c["optimizer_history"][-1]["num_updates"]
    assert updates(after) == updates(before) == 4
    assert "last_optimizer_state" not in after


def test_the_restored_checkpoint_works(checkpoint, toy, tmp_path):
    """fairseq's own commands (generate, eval-lm, validate) load the restored checkpoint."""
    family, path = checkpoint
    export.main([str(path), "--output", str(tmp_path / "out")])
    export.main([str(tmp_path / "out"), "--output", str(tmp_path / "back.pt")])
    back = ("--path", tmp_path / "back.pt")
    if family == "translation":
        languages = ("-s", "en", "-t", "de", "--beam", "1", "--max-len-b", "5")
        out = run(tool("fairseq-generate"), toy / "bin", *PLUGIN, *back, *languages)
        assert "H-0" in out
    elif family == "lm":
        flags = ("--tokens-per-sample", "32", "--sample-break-mode", "eos")
        out = run(tool("fairseq-eval-lm"), toy / "mono", *PLUGIN, *back, *flags)
        assert "Perplexity" in out
    else:
        flags = ("--task", "masked_lm_evomoe", "--max-tokens", "400", "--tokens-per-sample", "32")
        out = run(tool("fairseq-validate"), toy / "mono", *PLUGIN, *back, *flags)
        assert "moe_active_experts" in out


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, "x"], "t": (1, (2,))},
        Namespace(x=1, y=Namespace(z=[(1, 2)])),
        {1: "int keys", "s": {("a", 1): 2}},
        {"__python__": "a name of ours"},
        float("inf"),
    ],
    ids=str,
)
def test_json_keeps_python_types(value):
    """What comes back through JSON is equal in value and type."""
    back = json_values.decode(json.loads(json.dumps(json_values.encode(value))))
    assert back == value and type(back) is type(value)


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="cannot write a Tensor as JSON"):
        json_values.encode({"x": torch.zeros(1)})


def test_half_written_and_foreign_folders_are_refused(checkpoint, tmp_path, capsys):
    """Each fault is reported in one line, and an existing folder is left alone."""
    _, path = checkpoint
    folder = tmp_path / "out"
    export.main([str(path), "--output", str(folder)])

    def fails(source, output, message):
        with pytest.raises(SystemExit):
            export.main([str(source), "--output", str(output)])
        assert message in capsys.readouterr().err

    fails(path, folder, "is not overwritten")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text("{")
    fails(folder, tmp_path / "x.pt", "is damaged")
    (folder / "config.json").write_text(json.dumps({"format": "other"}))
    fails(folder, tmp_path / "x.pt", "is not of format")
    changed = json.loads(config)
    changed["order"].append("more")
    (folder / "config.json").write_text(json.dumps(changed))
    fails(folder, tmp_path / "x.pt", "lacks more")
    (folder / "config.json").unlink()
    fails(folder, tmp_path / "x.pt", "holds no config.json")
    torch.save({"no": "model"}, tmp_path / "foreign.pt")
    fails(tmp_path / "foreign.pt", tmp_path / "y", "is not a checkpoint of fairseq")
    (tmp_path / "noise.pt").write_bytes(b"no checkpoint at all")
    fails(tmp_path / "noise.pt", tmp_path / "y", "is not a checkpoint, or a damaged one")
    (tmp_path / "half.pt").write_bytes(path.read_bytes()[:5000])
    fails(tmp_path / "half.pt", tmp_path / "y", "is not a checkpoint, or a damaged one")
    fails(path, tmp_path / "no/such/folder", "no such folder")
    assert not (tmp_path / "x.pt").exists() and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("dtype", "more"),
    [("bf16", ()), ("int8", ()), ("int8", ("--memory-linear",)), ("fp32", ("--memory-linear",))],
)
def test_smaller_tables(toy, tmp_path, dtype, more, capsys):
    """--tables writes a checkpoint without optimizer state and linear parts, which fairseq-generate
    reads, with nearly equal outputs.

    Outputs are compared for one look-up only. A small change before a hash may flip a bit and so
    fetch another row, so that for the whole model only the loss is compared.
    """
    memory = ("--memory-ffn", "--memory-attention", "--moe-freq", 0, "--memory-bits", 4)
    train(*train_args(toy, tmp_path, *memory, *more, "--max-update", 3))
    path, small = tmp_path / "checkpoint_last.pt", tmp_path / "small.pt"
    export.main([str(path), "--tables", dtype, "--output", str(small)])
    outputs, losses = [], []
    x = torch.randn(50, 32)
    for file in (path, small):
        (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(file)])
        with torch.no_grad():
            outputs.append(model.eval().encoder.layers[0].memory_ffn.first(x))
            loss, size, _ = task.build_criterion(cfg.criterion)(model, valid_batch(task))
            losses.append(loss.item() / int(size))
    error = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    assert error < (1e-6 if dtype == "fp32" else 0.01)
    assert dtype == "fp32" or error > 0
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    stored = torch.load(small, weights_only=False)["model"]
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[dtype]
    tables = {n: v for n, v in stored.items() if n.endswith(".tables")}
    assert tables and all(v.dtype == wanted for v in tables.values())
    assert not any(n.endswith(".linear") for n in stored)
    languages = ("-s", "en", "-t", "de", "--beam", "1", "--max-len-b", "5")
    assert "H-0" in run(tool("fairseq-generate"), toy / "bin", *PLUGIN, "--path", small, *languages)
    with pytest.raises(ValueError, match="are for inference"):
        model.train()(**valid_batch(task)["net_input"])
    with pytest.raises(SystemExit):
        export.main([str(small), "--tables", dtype, "--output", str(tmp_path / "again.pt")])
    assert "are converted already" in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--moe-shared-expert",)], ids=["plain", "shared"])
def test_experts_in_int8(toy, tmp_path, more, capsys):
    """--experts int8 writes a checkpoint a quarter of the size whose loss and translations are
    nearly those of the original, with many tokens (widened) and with few (in place)."""
    switch = ("--moe-gate", "switch", "--moe-expert-count", 8, "--moe-freq", 1, *more)
    train(*train_args(toy, tmp_path, *switch, "--max-update", 30))
    path, small = tmp_path / "checkpoint_last.pt", tmp_path / "small.pt"
    export.main([str(path), "--experts", "int8", "--output", str(small)])
    losses, outputs, sizes, x = [], [], [], torch.randn(3, 1, 32)
    for file in (path, small):
        (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(file)])
        model.eval()
        with torch.no_grad():
            loss, size, _ = task.build_criterion(cfg.criterion)(model, valid_batch(task))
            losses.append(loss.item() / int(size))
            layer = model.encoder.layers[0].moe_layer
            hidden = {"encoder": 64, "decoder": 64}
            sizes.append(sum(part.parameters for part in costs(model, context=9, hidden=hidden)))
            outputs.append([layer(x.expand(-1, n, -1)) for n in (1, few_rows.FEW_INT8)])
    for plain, rounded in zip(*outputs, strict=True):
        assert 0 < (rounded - plain).norm() / plain.norm() < 0.02
    # in place, the inputs are rounded to 16 bits
    assert torch.allclose(outputs[1][0][:, 0], outputs[1][1][:, 0], atol=4e-5)
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert sizes[0] == sizes[1], "a report counts the weights in either form"
    # scales stay float32 where the rest does not
    bank = copy.deepcopy(model).half().encoder.layers[0].moe_layer.experts
    assert bank.scale1.dtype == torch.float32 and bank.w1.dtype == torch.int8
    languages = ("-s", "en", "-t", "de", "--beam", "1", "--max-len-b", "5")
    assert "H-0" in run(tool("fairseq-generate"), toy / "bin", *PLUGIN, "--path", small, *languages)
    with pytest.raises(ValueError, match="--moe-expert-storage int8 is for inference"):
        model.train()(**valid_batch(task)["net_input"])
    with pytest.raises(SystemExit):
        export.main([str(small), "--experts", "int8", "--output", str(tmp_path / "again.pt")])
    assert "are converted already" in capsys.readouterr().err


def test_experts_of_a_model_without_them(toy, tmp_path, capsys):
    """A dense model has none, and memory experts have no such form."""
    for flags, said in (
        (("--moe-freq", 0), "has no experts"),
        (("--moe-expert-type", "memory", "--memory-bits", 4), "memory experts"),
    ):
        folder = tmp_path / said.replace(" ", "_")
        train(*train_args(toy, folder, *flags, "--max-update", 1))
        path = str(folder / "checkpoint_last.pt")
        with pytest.raises(SystemExit):
            export.main([path, "--experts", "int8", "--output", str(tmp_path / "x.pt")])
        assert said in capsys.readouterr().err


def test_tables_of_a_model_without_look_ups(checkpoint, tmp_path, capsys):
    """Nothing to convert is an error, not a copy."""
    with pytest.raises(SystemExit):
        export.main([str(checkpoint[1]), "--tables", "int8", "--output", str(tmp_path / "x.pt")])
    assert "has no look-up layer" in capsys.readouterr().err
