"""modules/memory_experts.py: memory FFNs as experts, under every gate and through the split."""

import pytest
import torch
from conftest import build, train, train_args, valid_batch
from torch import nn

from fairseq_evomoe.kernels.experts.values import Routing
from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.memory.experts import MemoryBank
from fairseq_evomoe.memory.layer import MemoryFFN
from fairseq_evomoe.modules.gates import GATES
from fairseq_evomoe.modules.moe_layer import moe_layers
from fairseq_evomoe.modules.split import Split, SplitRule, diversity
from fairseq_evomoe.options import Diversify

T, D, E = 9, 12, 3
MEMORY = ("--moe-expert-type", "memory", "--memory-bits", 4)


def flags(**changes):
    return MemoryConfig(**{"memory_bits": 4, "memory_lr_scale": 2.0, **changes}).check()


def bank(experts=E, **changes):
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(5)
    cfg = flags(**changes)
    made = MemoryBank(D, cfg, num_experts=experts, dropout=0.0, generator=generator)
    for p in made.parameters():
        if p.dim() == 2:
            nn.init.normal_(p)
    return made


def alone(made, e, norm="layer", **changes):
    """Expert e as a separate MemoryFFN."""
    ffn = MemoryFFN(D, flags(memory_norm=norm, **changes))
    state = {
        "first.tables": made.tables1[e],
        "first.bias": made.bias1[e],
        "norm.weight": made.norm_weight[e],
        "second.tables": made.tables2[e],
        "second.bias": made.bias2[e],
    }
    if made.norm_bias is not None:
        state["norm.bias"] = made.norm_bias[e]
    if made.linear1 is not None:
        state |= {"first.linear": made.linear1[e], "second.linear": made.linear2[e]}
    ffn.load_state_dict({k: v.detach() for k, v in state.items()})
    return ffn


LINEAR = {"memory_score": "l1", "memory_linear": True, "memory_straight_through": True}


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("form", [{}, LINEAR], ids=["rows", "linear part"])
def test_forward_and_gradients(norm, density, form):
    """The output sum_e w_te FFN_e(x_t) and every gradient equal those of separate MemoryFFNs."""
    made = bank(memory_norm=norm, **form)
    active = torch.rand(T, E) < density
    weights = (torch.rand(T, E) * active).requires_grad_()
    x = torch.randn(T, D, requires_grad=True)
    y = made(x, Routing(weights, active))
    singles = [alone(made, e, norm, **form) for e in range(E)]
    x2, w2 = x.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    want = sum(w2[:, e : e + 1] * singles[e](x2) for e in range(E))
    assert torch.allclose(y, want, atol=1e-5)
    dy = torch.randn(T, D)
    (y * dy).sum().backward()
    (want * dy).sum().backward()
    assert torch.allclose(x.grad, x2.grad, atol=1e-4)
    assert torch.allclose(weights.grad[active], w2.grad[active], atol=1e-4)
    for e, ffn in enumerate(singles):
        used = 1.0 * bool(active[:, e].any())
        assert torch.allclose(made.tables1.grad[e], used * ffn.first.tables.grad, atol=1e-4)
        assert torch.allclose(made.tables2.grad[e], used * ffn.second.tables.grad, atol=1e-4)
        assert torch.allclose(made.norm_weight.grad[e], used * ffn.norm.weight.grad, atol=1e-4)
        if form:
            assert torch.allclose(made.linear1.grad[e], used * ffn.first.linear.grad, atol=1e-4)
            assert torch.allclose(made.linear2.grad[e], used * ffn.second.linear.grad, atol=1e-4)


def test_no_tokens():
    """A batch without tokens passes, and every parameter has a gradient of 0."""
    made = bank()
    none = torch.zeros(0, E)
    y = made(torch.zeros(0, D, requires_grad=True), Routing(none, none.bool()))
    y.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in made.parameters())


@pytest.mark.parametrize("mode", [m.value for m in Diversify])
@pytest.mark.parametrize("grain", ["unit", "weight"])
@pytest.mark.parametrize("linear", [False, True])
def test_split(mode, grain, linear):
    """Copies follow the base and differ as the mode says; the base stays exact."""
    made = bank(memory_linear=linear)
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    decided = Split(SplitRule(mode=mode, ratio=0.5, grain=grain), made, seed=4)
    x = torch.randn(50, D)
    output = made.run_base(x).detach()
    for name, p in made.named_parameters():
        decided.weights_(name, p.data)
        assert torch.equal(p[0], before[name][0])
        if mode != "noise":
            same = ~decided.replaced(name, p.shape)
            assert torch.equal(p[same], p[:1].expand_as(p)[same])
    found = diversity(made, x, output)
    if mode == "copy":
        assert found.drift < 1e-6 and found.outputs > 0.9999
    else:
        assert found.drift > 1e-3 and found.outputs < 0.9999
    if mode == "mask":
        share = (made.tables1[1] == 0).float().mean().item()
        assert share == pytest.approx(0.5, abs=0.1)
        assert torch.equal(made.tables2[1], made.tables2[0])


@pytest.mark.parametrize("gate", [g for g in GATES if g != "expert_choice"])
def test_every_gate_trains_them(toy, gate):
    """Under every gate, memory experts have a finite loss and a gradient for each parameter."""
    flags = ("--moe-gate", gate, "--evo-spawn-update", 0, "--max-update", 9)
    cfg, task, model = build(toy, *MEMORY, *flags)
    model.train()
    loss, *_ = task.build_criterion(cfg.criterion)(model, valid_batch(task))
    loss.backward()
    assert torch.isfinite(loss)
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(isinstance(layer.experts, MemoryBank) for _, layer in moe_layers(model))


def test_diversify_is_the_memory_model_to_the_bit(toy):
    """Before the split the loss equals that of a model with a plain memory FFN, to the bit."""
    losses = []
    for own in (("--moe-freq", 2, *MEMORY), ("--moe-freq", 0, "--memory-layers", "1")):
        extra = ("--memory-ffn", "--memory-layers", "1", "--memory-bits", 4)
        cfg, task, model = build(toy, *extra, *own, "--evo-spawn-update", 9, "--dropout", 0.2)
        criterion = task.build_criterion(cfg.criterion)
        model.train()
        torch.manual_seed(3)
        losses.append(criterion(model, valid_batch(task))[0])
    assert torch.equal(*losses)


@pytest.mark.parametrize("mode", [m.value for m in Diversify])
def test_they_evolve(toy, tmp_path, mode):
    """One run passes through all stages, and a run resumed after the split logs the same losses."""
    stages = ("--evo-spawn-update", 3, "--dts-anneal-updates", 3, "--dts-hard-update", 7)
    common = (*MEMORY, *stages, "--evo-diversify", mode, "--max-update", 9)
    rows = train(*train_args(toy, tmp_path / "a", *common, "--save-interval-updates", 5))
    assert [r["moe_stage"] for r in rows] == [0] * 3 + [1] * 4 + [2] * 2
    assert rows[3]["moe_active_experts"] >= 0.95 * 4 and rows[-1]["moe_active_experts"] == 1
    if mode == "mask":
        (saved,) = (tmp_path / "a").glob("checkpoint_*_5.pt")
        more = train(*train_args(toy, tmp_path / "b", *common, "--restore-file", saved))
        assert [r["loss"] for r in more] == [r["loss"] for r in rows[5:]]
