"""--amp on a CPU: bfloat16 products, float32 weights, router and loss; exact resume."""

import pytest
import torch
from conftest import FAMILIES, build, train, train_args, valid_batch
from torch import nn

from fairseq_evomoe.criterions import moe_cross_entropy
from fairseq_evomoe.kernels.transformer import output_loss
from fairseq_evomoe.kernels.transformer.matmul import MOST_ERROR, by_onednn, measure
from fairseq_evomoe.modules.gates.base import ScoreGate

STAGES = ("--evo-spawn-update", 4, "--dts-anneal-updates", 4, "--dts-hard-update", 9)
KINDS = {
    "dense": ("--moe-freq", 0),
    "evomoe": STAGES,
    "switch": ("--moe-gate", "switch"),
    "memoryformer": ("--moe-freq", 0, "--memory-ffn", "--memory-attention", "--memory-bits", 4),
    "memory experts": (*STAGES, "--moe-expert-type", "memory", "--memory-bits", 4),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_curve_is_that_of_float32(toy, tmp_path, kind, family):
    """Twenty updates lose as much as in float32 to a few hundredths; weights stay float32."""
    flags = (*KINDS[kind], "--dropout", 0, "--max-update", 20)
    plain = train(*train_args(toy, tmp_path / "plain", *flags, family=family))
    mixed = train(*train_args(toy, tmp_path / "mixed", *flags, "--amp", family=family))
    assert [r["num_updates"] for r in mixed] == list(range(1, 21))
    assert mixed[0]["loss"] == pytest.approx(plain[0]["loss"], abs=0.02)
    assert mixed[-1]["loss"] == pytest.approx(plain[-1]["loss"], abs=0.15)
    one, other = (
        torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=False)["model"]
        for name in ("plain", "mixed")
    )
    assert {n: v.dtype for n, v in one.items()} == {n: v.dtype for n, v in other.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_products_by_onednn(toy, tmp_path, kind, family, monkeypatch):
    """With --cpu-matmul onednn the same run differs in roundings alone, and all of its products
    are made in that way. On processors with matrix units for bfloat16, where `auto` does not choose
    it, the roundings are those of --amp."""
    seen = set()

    def note(matrices):
        return lambda *args, **kw: seen.add(by_onednn()) or matrices(*args, **kw)

    flags = (*KINDS[kind], "--dropout", 0, "--max-update", 20, "--cpu-matmul")
    plain = train(*train_args(toy, tmp_path / "plain", *flags, "torch", family=family))
    monkeypatch.setattr(output_loss.F, "linear", note(output_loss.F.linear))
    monkeypatch.setattr(torch, "mm", note(torch.mm))
    other = train(*train_args(toy, tmp_path / "other", *flags, "onednn", family=family))
    assert seen == {True} and not by_onednn()
    exact = measure().error <= MOST_ERROR
    assert other[0]["loss"] == pytest.approx(plain[0]["loss"], abs=2e-3 if exact else 0.02)
    assert other[-1]["loss"] == pytest.approx(plain[-1]["loss"], abs=0.05 if exact else 0.15)


def test_validation_and_generation_by_onednn(toy, monkeypatch):
    """Their products are made in the same way as those of training."""
    flags = ("--moe-gate", "switch", "--evo-spawn-update", 0, "--cpu-matmul")
    linear = nn.Linear.forward
    for way in ("onednn", "torch"):
        cfg, task, model = build(toy, *flags, way)
        batch, seen = valid_batch(task), []

        def note(self, x, seen=seen):
            seen.append(by_onednn())
            return linear(self, x)

        monkeypatch.setattr(nn.Linear, "forward", note)
        task.valid_step(batch, model, task.build_criterion(cfg.criterion))
        validated = len(seen)
        generator = task.build_generator([model.eval()], task.cfg)
        generator.max_len_b = 3
        task.inference_step(generator, [model], batch)
        assert len(seen) > validated > 0 and set(seen) == {way == "onednn"}
        assert not by_onednn()


def test_what_runs_in_which_dtype(toy, tmp_path, monkeypatch):
    """Linear layers multiply in bfloat16, routers get and make float32, and so does the loss."""
    seen = {"linear": set(), "logits": set(), "loss": set()}
    linear, route = nn.Linear.forward, ScoreGate.forward
    forward = moe_cross_entropy.MoECrossEntropyCriterion.forward

    def keep_linear(self, x):
        y = linear(self, x)
        seen["linear"].add(y.dtype)
        return y

    def keep_plan(self, *args, **kwargs):
        plan = route(self, *args, **kwargs)
        seen["logits"].add(plan.probs.dtype)
        return plan

    def keep_loss(self, *args, **kwargs):
        found = forward(self, *args, **kwargs)
        seen["loss"].add(found[0].dtype)
        return found

    monkeypatch.setattr(nn.Linear, "forward", keep_linear)
    monkeypatch.setattr(ScoreGate, "forward", keep_plan)
    monkeypatch.setattr(moe_cross_entropy.MoECrossEntropyCriterion, "forward", keep_loss)
    flags = ("--moe-gate", "switch", "--amp", "--max-update", 2)
    train(*train_args(toy, tmp_path, *flags, family="lm"))
    assert seen == {
        "linear": {torch.bfloat16},
        "logits": {torch.float32},
        "loss": {torch.float32},
    }


@pytest.mark.parametrize("kind", ["dense", "evomoe", "memoryformer"])
def test_recomputed_layers_run_as_before(toy, tmp_path, kind):
    """With --checkpoint-activations the second pass of a layer is in bfloat16 like the first."""
    flags = (*KINDS[kind], "--evo-spawn-update", 0) if kind == "evomoe" else KINDS[kind]
    flags = (*flags, "--amp", "--max-update", 1)
    train(*train_args(toy, tmp_path / "plain", *flags))
    train(*train_args(toy, tmp_path / "again", *flags, "--checkpoint-activations"))
    one, other = (
        torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=False)
        for name in ("plain", "again")
    )
    # Adam's first moment is a tenth of the gradient
    states = (x["last_optimizer_state"]["state"].values() for x in (one, other))
    a, b = (torch.cat([s["exp_avg"].flatten() for s in each]) for each in states)
    # what is left is the rounding of sums in bfloat16; in float32 it was 1 %, or 38 % with look-ups
    assert (a - b).norm() < 3e-3 * a.norm()


RESUMED = {
    "amp": ("--amp",),
    "bf16": ("--bf16",),
    "fp16": ("--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", 4),
}


@pytest.mark.parametrize("how", RESUMED)
def test_resume_is_exact(toy, tmp_path, how):
    """A run that stops and resumes gives the curve of one that does not, across the split."""
    flags = (*STAGES, *RESUMED[how], "--max-update", 12)
    whole = train(*train_args(toy, tmp_path / "whole", *flags, "--save-interval-updates", 3))
    for update in (3, 6):
        (saved,) = (tmp_path / "whole").glob(f"checkpoint_*_{update}.pt")
        folder = tmp_path / f"rest{update}"
        rest = train(*train_args(toy, folder, *flags, "--restore-file", saved))
        keep = lambda rows: [(r["loss"], r["gnorm"]) for r in rows]
        assert keep(rest) == keep(whole[update:])


def test_changed_weights_win_over_saved_ones(toy, tmp_path):
    """If a tool has changed the weights in a checkpoint, the old float32 weights are not used."""
    flags = ("--bf16", "--moe-freq", 0, "--max-update", 3)
    train(*train_args(toy, tmp_path / "a", *flags))
    path = tmp_path / "a/checkpoint_last.pt"
    state = torch.load(path, weights_only=False)
    saved = state["last_optimizer_state"]["fp32_masters"]
    assert len(saved) > 10 and all(m.dtype == torch.float32 for m in saved)
    for value in state["model"].values():
        if value.is_floating_point() and value.numel() > 1:
            value.mul_(0.5)
    torch.save(state, path)
    flags = ("--bf16", "--moe-freq", 0, "--max-update", 4)
    train(*train_args(toy, tmp_path / "b", *flags, "--restore-file", path, "--lr", 1e-9))
    after = torch.load(tmp_path / "b/checkpoint_last.pt", weights_only=False)["model"]
    name = "encoder.layers.0.fc1.weight"
    assert torch.equal(after[name], state["model"][name])
