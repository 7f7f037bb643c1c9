"""kernels/gate.py and gate_triton.py: one rule, two implementations, every gradient."""

import math

import pytest
import torch
from conftest import DEVICE

from fairseq_evomoe.kernels import gate
from fairseq_evomoe.kernels.gate import COMBINE, Rule
from fairseq_evomoe.kernels.gate_triton import fused_gate

RULES = {
    "threshold": {"threshold": 0.1},
    "cap": {"threshold": 0.02, "cap": 2},
    "cap of 1": {"threshold": 0.02, "cap": 1},
    "hard": {"exactly": 1},
    "two": {"exactly": 2},
    "all": {"threshold": 0.0},
    "argmax": {"threshold": 0.99},
}
SHAPES = [(1, 1), (5, 3), (33, 8), (0, 4), (7, 65)]


def loops(logits, rule, bias):
    """The rule, token by token."""
    probs = logits.softmax(-1)
    p = (logits / rule.temperature).softmax(-1)
    by = p if bias is None else ((logits + bias) / rule.temperature).softmax(-1)
    active = torch.zeros_like(logits, dtype=torch.bool)
    for t in range(len(logits)):
        order = sorted(range(logits.size(1)), key=lambda e: (-by[t, e].item(), e))
        most = rule.exactly or rule.cap or len(order)
        for place, e in enumerate(order[:most]):
            if rule.exactly or place == 0 or by[t, e] >= rule.threshold:
                active[t, e] = True
    return gate.combine(probs, p, active, rule.combine), active, probs


def inputs(shape, dtype=torch.float32):
    logits = torch.randn(shape, dtype=dtype, device=DEVICE)
    return logits, torch.randn(shape[1], dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_follow_the_rule(shape, kind, combine, biased):
    """Weights, choice, softmax and the gradient of the logits, against loops in float64."""
    if RULES[kind].get("exactly", 1) > shape[1]:
        pytest.skip("more experts than there are")
    rule = Rule(0.7, combine=combine, **RULES[kind])
    logits, bias = inputs(shape)
    bias = bias if biased else None
    grad = [torch.randn(shape, device=DEVICE) for _ in range(2)]
    z = logits.double().requires_grad_()
    want = loops(z, rule, None if bias is None else bias.double())
    (dz,) = torch.autograd.grad((want[0] * grad[0]).sum() + (want[2] * grad[1]).sum(), z)
    for implementation in (
        lambda z: gate.dense_to_sparse(z, rule, bias),
        lambda z: fused_gate(z, rule, bias, 0),
    ):
        own = logits.clone().requires_grad_()
        have = implementation(own)
        assert torch.equal(have[1], want[1])
        for a, b in ((have[0], want[0]), (have[2], want[2])):
            assert torch.allclose(a.double(), b, atol=1e-6)
        loss = (have[0] * grad[0]).sum() + (have[2] * grad[1]).sum()
        assert torch.allclose(torch.autograd.grad(loss, own)[0].double(), dz, atol=1e-5)


@pytest.mark.parametrize("block", [1, 2, 16])
def test_noise_is_the_seed_s_own(block):
    """The same seed gives the same result whatever the block; another seed gives another."""
    logits, _ = inputs((37, 6))
    rule = Rule(0.5, noise=1.0, threshold=0.1, combine="raw")
    want = fused_gate(logits, rule, None, 11)
    have = fused_gate(logits, rule, None, 11, block=block)
    assert all(torch.equal(a, b) for a, b in zip(want, have, strict=True))
    other = fused_gate(logits, rule, None, 12)
    assert not torch.equal(other[0], want[0])
    assert torch.equal(other[2], want[2]), "softmax(z) knows no noise"


def test_noise_is_gumbel():
    """With full noise the argmax is a draw from softmax(z), at any temperature."""
    z = torch.tensor([1.0, 0.0, -1.0, 0.5], device=DEVICE)
    n = 20000
    _, active, _ = fused_gate(z.expand(n, 4), Rule(0.3, noise=1.0, exactly=1), None, 5, block=64)
    share, want = active.float().mean(0), z.softmax(0)
    # five standard deviations of a share
    assert ((share - want).abs() < 5 * (want * (1 - want) / n).sqrt()).all()


def test_noise_in_backward_is_that_of_forward():
    """Finite differences at fixed noise equal the gradient."""
    rule = Rule(0.8, noise=1.0, threshold=0.05, combine="renorm")
    logits, _ = inputs((3, 4))
    grad = torch.randn(3, 4, device=DEVICE)
    value = lambda z: (fused_gate(z, rule, None, 3)[0].double() * grad).sum()
    z = logits.clone().requires_grad_()
    value(z).backward()
    step = 1e-2
    for t, e in ((0, 0), (1, 2), (2, 3)):
        moved = torch.zeros_like(logits)
        moved[t, e] = step
        slope = (value(logits + moved) - value(logits - moved)) / (2 * step)
        assert math.isclose(slope.item(), z.grad[t, e].item(), abs_tol=2e-3)


def test_extreme_logits_stay_finite():
    """Large logits and a low temperature give weights that sum to 1, and finite gradients."""
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e4, 3e4, 3e4]], device=DEVICE, requires_grad=True)
    weights, active, _ = fused_gate(
        logits, Rule(0.1, noise=1.0, threshold=0.1, combine="renorm"), None, 1
    )
    assert torch.allclose(weights.sum(1), torch.ones(2, device=DEVICE)) and active.any(1).all()
    weights.square().sum().backward()
    assert logits.grad.isfinite().all()
