"""The MoE layer on the GPU's path: there on a GPU, here by Triton's interpreter."""

import pytest
import torch
from conftest import DEVICE
from test_moe_layer import B, D, E, L, ids, layer

from fairseq_evomoe.kernels import backend, grouped_ffn_gpu
from fairseq_evomoe.modules.plan import TokenBatch

GATES = {
    "dts soft": dict(moe_gate="dts", n=6, spawned=True, dts_noise="none"),
    "dts capped": dict(
        moe_gate="dts", n=8, spawned=True, dts_noise="none", dts_max_experts=2, dts_threshold=0.3
    ),
    "dts capped at 1": dict(
        moe_gate="dts", n=8, spawned=True, dts_noise="none", dts_max_experts=1, dts_threshold=0.1
    ),
    "dts hard": dict(moe_gate="dts", n=20, spawned=True, dts_noise="none"),
    "dense": dict(moe_gate="dense", schedule=None),
    "switch": dict(moe_gate="switch", schedule=None),
    "switch, capacity": dict(moe_gate="switch", schedule=None, moe_capacity_factor=0.5),
    "gshard": dict(moe_gate="gshard", schedule=None, moe_second_expert_policy="all"),
    "topk": dict(moe_gate="topk", schedule=None, moe_top_k=3),
    "base": dict(moe_gate="base", schedule=None),
    "shared": dict(moe_gate="switch", schedule=None, moe_shared_expert=True),
}


def run(flags, device):
    made = layer(**flags).to(device).train()
    made.tokens = TokenBatch(ids([5, 3, 4]).to(device), 1)
    torch.manual_seed(4)
    x = torch.randn(L, B, D).to(device).requires_grad_()
    direction = torch.randn(L, B, D).to(device)
    plans = []
    made.gate.register_forward_hook(lambda m, args, plan: plans.append(plan))
    y = made(x)
    y.backward(direction)
    grads = [x.grad, *(p.grad for p in made.parameters())]
    return plans[0], y.detach().cpu(), [None if g is None else g.cpu() for g in grads]


@pytest.mark.parametrize("name", GATES)
def test_same_as_on_a_cpu(name, triton_can, monkeypatch):
    """Every kind of plan: output and all gradients equal those of torch's path."""
    monkeypatch.setattr(backend, "forced", "torch")
    _, want, want_grads = run(GATES[name], DEVICE)
    monkeypatch.setattr(backend, "forced", "")
    served = []
    real = grouped_ffn_gpu.sparse_ffn
    spy = lambda *args, **kw: served.append(kw["pairs"]) or real(*args, **kw)
    monkeypatch.setattr(grouped_ffn_gpu, "sparse_ffn", spy)
    plan, have, grads = run(GATES[name], DEVICE)
    room = int(plan.active.sum()) if plan.at_most is None else plan.at_most * len(plan.active)
    room += len(plan.active) * ("shared" in name)
    # where every expert takes every token nothing is dispatched
    assert served == ([] if plan.active.all() else [room])
    assert torch.allclose(have, want, atol=1e-5)
    for a, b in zip(grads, want_grads, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-4))


@pytest.mark.parametrize("name", GATES)
def test_no_token_has_more_experts_than_the_plan_says(name):
    """`at_most` is a limit, or None where all may be active."""
    plan, *_ = run(GATES[name], "cpu")
    assert (plan.at_most is None) == (name == "dts soft")
    if plan.at_most is not None:
        assert plan.active.sum(1).max() <= plan.at_most <= E
