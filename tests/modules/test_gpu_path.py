"""The MoE layer on the GPU's path, run on a GPU if there is one, else by Triton's interpreter."""

import pytest
import torch
from conftest import DEVICE
from layer_kit import PLANS, B, D, E, L, ids, layer

from fairseq_evomoe.kernels import backend
from fairseq_evomoe.kernels.experts import gpu
from fairseq_evomoe.modules.plan import TokenBatch

pytestmark = pytest.mark.slow


def run(flags, device):
    made = layer(**flags).to(device).train()
    tokens = TokenBatch(ids([5, 3, 4]).to(device), 1)
    torch.manual_seed(4)
    x = torch.randn(L, B, D).to(device).requires_grad_()
    direction = torch.randn(L, B, D).to(device)
    plans = []
    made.gate.register_forward_hook(lambda m, args, plan: plans.append(plan))
    y = made(x, tokens)
    y.backward(direction)
    grads = [x.grad, *(p.grad for p in made.parameters())]
    return plans[0], y.detach().cpu(), [None if g is None else g.cpu() for g in grads]


@pytest.mark.parametrize("name", PLANS)
def test_same_as_on_a_cpu(name, triton_can, monkeypatch, force):
    """For every kind of plan, the output and all gradients equal those of torch's path."""
    force(backend.use("torch"))
    _, want, want_grads = run(PLANS[name], DEVICE)
    force(backend.use("" if DEVICE == "cuda" else "triton"))
    served = []
    real = gpu.sparse_ffn
    spy = lambda *args, **kw: served.append(kw["max_pairs"]) or real(*args, **kw)
    monkeypatch.setattr(gpu, "sparse_ffn", spy)
    plan, have, grads = run(PLANS[name], DEVICE)
    room = int(plan.active.sum()) if plan.max_active is None else plan.max_active * len(plan.active)
    room += len(plan.active) * ("shared" in name)
    # if every expert takes every token, nothing is dispatched
    assert served == ([] if plan.active.all() else [room])
    assert torch.allclose(have, want, atol=1e-5)
    for a, b in zip(grads, want_grads, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-4))


@pytest.mark.parametrize("name", PLANS)
def test_no_token_has_more_experts_than_the_plan_says(name):
    """`max_active` limits the active experts of a token, and is None if all may be active."""
    plan, *_ = run(PLANS[name], "cpu")
    assert (plan.max_active is None) == (name == "dts soft")
    if plan.max_active is not None:
        assert plan.active.sum(1).max() <= plan.max_active <= E
