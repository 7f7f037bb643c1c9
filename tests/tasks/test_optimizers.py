"""The split under every optimizer of fairseq: copies go on from the base expert's past."""

import copy

import pytest
import torch
from conftest import build
from fairseq import optim
from fairseq.optim.fp16_optimizer import FP16Optimizer

from fairseq_evomoe.modules.moe_layer import moe_layers
from fairseq_evomoe.tasks.splitting import split_when_due

OPTIMIZERS = {
    "adam": ("--adam-betas", "(0.9, 0.98)"),
    "adam with weight decay": ("--weight-decay", 0.1),
    "adamax": (),
    "adagrad": (),
    "adadelta": ("--lr", 100),
    "nag": ("--momentum", 0.9),
    "sgd": ("--momentum", 0.9),
    "adafactor": (),
    "adafactor with a first moment": ("--beta1", 0.9),
}
"""Those that need no further package: lamb needs apex, cpu_adam needs deepspeed."""
LAYOUTS = ("fp32", "bf16", "fp16 flat")


def started(toy, name, layout, monkeypatch):
    """(task, model, optimizer) before the first update."""
    flags = ("--evo-spawn-update", 5, "--evo-diversify", "copy", "--lr", 0.01)
    flags += ("--optimizer", name.split()[0], *OPTIMIZERS[name])
    cfg, task, model = build(toy, *flags)
    params = [p for p in model.parameters() if p.requires_grad]
    if layout == "fp32":
        return task, model, optim.build_optimizer(cfg.optimizer, params)
    if layout == "bf16":
        model.bfloat16()
        cfg.common.bf16 = True
    else:
        model.half()
        cfg.common.fp16 = True
        monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    return task, model, FP16Optimizer.build_optimizer(cfg, params)


def step(optimizer, model, seed, *, alike):
    """One update with random gradients, in the experts for the base alone or for all alike."""
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    for name, p in model.named_parameters():
        grad = torch.randn(p.shape, generator=generator) * 0.01
        if ".experts." in name:
            grad = grad[:1].expand_as(grad).clone()
            if not alike:
                grad[1:] = 0
        p.grad = grad.to(p)
    if hasattr(optimizer, "_needs_sync"):
        optimizer._needs_sync = True
    optimizer.step()


@pytest.mark.parametrize(
    ("name", "layout"),
    # fairseq itself refuses adagrad and adafactor with flattened masters
    [
        (n, x)
        for n in OPTIMIZERS
        for x in LAYOUTS
        if x != "fp16 flat" or n.split()[0] not in ("adagrad", "adafactor")
    ],
)
def test_copies_move_as_the_base_does(toy, name, layout, monkeypatch):
    """After the split, experts with equal weights and gradients make equal steps.

    An optimizer without a past for the copies would send them elsewhere. The base's own step is
    what it would have been without the split, unless the optimizer looks at the whole tensor.
    """
    task, model, optimizer = started(toy, name, layout, monkeypatch)
    for seed in range(3):
        step(optimizer, model, seed, alike=False)
    (_, layer), *_ = moe_layers(model)
    split_when_due(model, optimizer, task.flags, 5)
    before = {n: p.detach().clone() for n, p in layer.experts.named_parameters()}
    for seed in range(3, 6):
        step(optimizer, model, seed, alike=True)
    for part, p in layer.experts.named_parameters():
        assert not torch.equal(p, before[part])
        assert torch.equal(p, p[:1].expand_as(p)), part


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if "adafactor" not in n])
def test_the_base_goes_on_undisturbed(toy, name, monkeypatch):
    """The base expert's steps after the split are those of a run in which it never splits."""
    ends = []
    for splits in (True, False):
        task, model, optimizer = started(toy, name, "fp32", monkeypatch)
        for seed in range(3):
            step(optimizer, model, seed, alike=False)
        if splits:
            split_when_due(model, optimizer, task.flags, 5)
        step(optimizer, model, 3, alike=splits)
        (_, layer), *_ = moe_layers(model)
        ends.append([p[0].detach().clone() for p in layer.experts.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("part", ["w1", "b1"])
def test_factored_moments_say_the_same_of_every_expert(toy, part, monkeypatch):
    """Adafactor's estimate of g^2, from its factors, is the base's own for each copy."""
    task, model, optimizer = started(toy, "adafactor", "fp32", monkeypatch)
    step(optimizer, model, 1, alike=False)
    (_, layer), *_ = moe_layers(model)
    p = getattr(layer.experts, part)
    estimate = lambda: optimizer.optimizer._approx_sq_grad(
        *(copy.deepcopy(optimizer.optimizer.state[p][f"exp_avg_sq_{x}"]) for x in ("row", "col"))
    )
    base = estimate()[0]
    split_when_due(model, optimizer, task.flags, 5)
    for found in estimate():
        assert torch.allclose(found, base, rtol=1e-5)
