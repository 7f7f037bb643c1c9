"""--memory-spawn-update: dense layers become look-ups in the middle of a run."""

import re

import pytest
import torch
from conftest import FAMILIES, build, run, tool, train, train_args, valid_batch
from fairseq import checkpoint_utils
from torch.nn import functional as F

from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.memory.layer import MemoryFFN, MemoryLayer
from fairseq_evomoe.tasks.spawning import batches, spawn, units_of
from fairseq_evomoe.tools import export
from fairseq_evomoe.tools.cost import per_token
from fairseq_evomoe.tools.to_hf.describe import describe

FLAGS = (
    *("--memory-ffn", "--memory-attention", "--moe-freq", 0, "--memory-bits", 4),
    *("--memory-score", "l1", "--memory-linear", "--memory-straight-through"),
    *("--memory-lr-scale", 1, "--memory-out-proj", "dense", "--memory-spawn-update", 8),
)


def parts_of(model):
    return [m for m in model.modules() if isinstance(m, MemoryLayer | MemoryFFN)]


def state_of(folder):
    return torch.load(folder / "checkpoint_last.pt", weights_only=True)


def test_a_layer_is_dense_at_first(toy):
    """A projection multiplies by its linear part, and an FFN is FC2 act(FC1 x)."""
    _, _, model = build(toy, *FLAGS)
    model.eval()
    layer = model.decoder.layers[0]
    x = torch.randn(5, model.decoder.layers[0].embed_dim)
    qkv = layer.self_attn.qkv
    weight = torch.cat([qkv.linear.reshape(-1, qkv.linear.size(-1))[: x.size(1)]])
    assert torch.allclose(qkv(x), x @ weight + qkv.bias, atol=1e-6)
    assert qkv.tables.abs().max() == 0
    ffn = layer.memory_ffn
    assert torch.allclose(ffn(x), ffn.fc2(F.relu(ffn.fc1(x))), atol=1e-6)
    assert all(m.is_dense for m in parts_of(model))


def test_what_the_look_ups_keep(toy):
    """Each look-up comes near what the dense part computed, on other batches as well."""
    _, task, model = build(toy, *FLAGS)
    task.load_dataset("train")
    model.eval()
    found = list(batches(task, model, tokens=3000, max_tokens=1000))
    assert sum(b["ntokens"] for b in found) >= 2500 and len(found) == 3
    net_input = valid_batch(task)["net_input"]
    units = units_of(model)
    assert len(units) == 2 * 2 + 2 * 4  # qkv and FFN; qkv, q, kv and FFN
    outputs = {}
    for unit in units:
        unit.source.register_forward_hook(
            lambda m, a, out, n=unit.name: outputs.setdefault(n, []).append(out.detach())
        )
    with torch.no_grad():
        model(**net_input)
        spawn(model, units, found, seed=1)
        for seen in outputs.values():
            del seen[1:]
        model(**net_input)
    assert not any(m.is_dense for m in parts_of(model)) and units_of(model) == []
    kept = []
    for before, after in outputs.values():
        spread = (before - before.mean((0, 1))).square().sum()
        kept.append(float(1 - (after - before).square().sum() / spread))
    # the decoder of an untrained model hardly tells one position from another
    assert min(kept[:4]) > 0.6 and min(kept) > 0, [round(k, 3) for k in kept]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_is_resumed_does_the_same(toy, tmp_path, family):
    """Before the change, right at it and after it: weights and moments are equal to the bit."""
    flags = (*FLAGS, "--memory-out-proj", "memory", "--dropout", 0.1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    out = run(
        tool("fairseq-train"),
        *train_args(toy, whole, *flags, "--max-update", 14, family=family),
    )
    assert "dense layers have become look-ups (--memory-spawn-update)" in out
    assert all(0 < float(x) <= 1 for x in re.findall(r"keeps ([\d.]+) of the variance", out))
    losses = [float(x) for x in re.findall(r'"loss": "([\d.]+)"', out)]
    assert losses[-1] < losses[0]
    for stop in (5, 8, 11, 14):
        train(*train_args(toy, cut, *flags, "--max-update", stop, family=family))
    one, other = state_of(whole), state_of(cut)
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    spawned = [v for k, v in one["model"].items() if k.endswith("spawned")]
    assert spawned and all(spawned)
    moments = [s["last_optimizer_state"]["state"] for s in (one, other)]
    assert moments[0].keys() == moments[1].keys()
    for key, state in moments[0].items():
        assert torch.equal(state["exp_avg_sq"], moments[1][key]["exp_avg_sq"])
    (model,), *_ = checkpoint_utils.load_model_ensemble_and_task(
        [str(whole / "checkpoint_last.pt")]
    )
    assert not any(m.is_dense for m in parts_of(model))


@pytest.mark.parametrize(
    "more",
    [
        ("--bf16",),
        ("--bf16", "--memory-efficient-bf16"),
        ("--amp",),
        ("--optimizer", "adafactor", "--lr", "1e-3"),
        ("--distributed-world-size", 2),
        ("--checkpoint-activations",),
    ],
    ids=lambda more: more[-2 if len(more) > 3 else 0],
)
def test_optimizers_and_workers(toy, tmp_path, more):
    """Training goes on after the change in every layout of the optimizer, and on two workers."""
    flags = (*FLAGS, "--memory-spawn-update", 4, "--max-update", 12, *more)
    out = run(tool("fairseq-train"), *train_args(toy, tmp_path, *flags))
    assert "dense layers have become look-ups" in out
    losses = [float(x) for x in re.findall(r'"loss": "([\d.]+)"', out)]
    assert len(losses) >= 12 and losses[-1] < losses[0]
    state = state_of(tmp_path)["model"]
    tables = [v for k, v in state.items() if k.endswith("qkv.tables")]
    assert len(tables) == 4 and all(v.abs().max() > 0 for v in tables)


@pytest.mark.parametrize("more", [("--bf16",), ("--bf16", "--memory-efficient-bf16")])
def test_the_optimizer_steps_the_fitted_tables(toy, tmp_path, more):
    """With a rate of next to nothing the tables stay as fitted: float32 copies have them too."""
    flags = (*FLAGS, "--memory-spawn-update", 4, "--max-update", 6, "--lr", 1e-6, *more)
    train(*train_args(toy, tmp_path, *flags))
    tables = [v for k, v in state_of(tmp_path)["model"].items() if k.endswith("qkv.tables")]
    assert len(tables) == 4 and all(v.abs().max() > 0.1 for v in tables)


def test_a_dense_twin_translates_the_same(toy, tmp_path):
    """Saved before the change, the model is dense, and beam search gives what a pass gives."""
    flags = (*FLAGS, "--memory-spawn-update", 100, "--max-update", 6)
    train(*train_args(toy, tmp_path, *flags))
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(tmp_path / "checkpoint_last.pt")]
    )
    assert all(m.is_dense for m in parts_of(model))
    model.eval()
    task.load_dataset("valid")
    net_input = valid_batch(task, rows=3)["net_input"]
    previous, state = net_input["prev_output_tokens"], {}
    with torch.no_grad():
        whole = model(**net_input)[0]
        encoded = model.encoder(net_input["src_tokens"], net_input["src_lengths"])
        for n in range(1, previous.size(1) + 1):
            step = model.decoder(previous[:, :n], encoded, incremental_state=state)[0][:, -1]
            real = previous[:, n - 1] != task.target_dictionary.pad()
            assert torch.allclose(step[real], whole[real, n - 1], atol=1e-4)


def test_what_is_left_for_inference(toy, tmp_path):
    """Export drops the dense layers and keeps the outputs; before the change it says when it is."""
    flags = (*FLAGS, "--memory-spawn-update", 4, "--max-update", 8, "--save-interval-updates", 3)
    train(*train_args(toy, tmp_path, *flags))
    early = tmp_path / "checkpoint_1_3.pt"
    with pytest.raises(ValueError, match="from before update 4"):
        export.converted(early, tables="fp32")
    small = tmp_path / "small.pt"
    last = tmp_path / "checkpoint_last.pt"
    export.main([str(last), "--tables", "fp32", "--output", str(small)])
    (ours, exported), _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(last), str(small)]
    )
    task.load_dataset("valid")
    net_input = valid_batch(task)["net_input"]
    with torch.no_grad():
        logits = [model.eval()(**net_input)[0] for model in (ours, exported)]
    assert torch.allclose(*logits, atol=1e-5)
    assert not [n for n in exported.state_dict() if "fc1" in n or "spawned" in n]
    costs = [per_token(m, ours.args, context=10, dtype="fp32") for m in (ours, exported)]
    for kind in ("ffn", "attention"):
        assert costs[0][kind]["macs"] == costs[1][kind]["macs"] < costs[0][kind]["dense_macs"]
    (before,), *_ = checkpoint_utils.load_model_ensemble_and_task([str(early)])
    cost = per_token(before, ours.args, context=10, dtype="fp32")["total"]
    assert cost["macs"] == cost["dense_macs"]
    with pytest.raises(ValueError, match="--memory-spawn-update"):
        describe(ours, ours.args, 0.0)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"memory_linear": False}, "give --memory-linear"),
        ({"memory_attention": True}, "give --memory-out-proj dense or memory"),
        ({"memory_parallel": True}, "leave out --memory-parallel"),
        ({"memory_spawn_update": -1}, "must be 0 or more"),
    ],
)
def test_what_cannot_work_is_refused(changes, said):
    """By flag, before anything is built."""
    good = {"memory_ffn": True, "memory_linear": True, "memory_spawn_update": 5}
    MemoryConfig(**good).check()
    with pytest.raises(ValueError, match=f"--memory-spawn-update.*{said}"):
        MemoryConfig(**{**good, **changes}).check()
