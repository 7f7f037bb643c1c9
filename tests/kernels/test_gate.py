"""kernels/gate.py and gate_triton.py: two implementations of one rule, and their gradients."""

import math

import pytest
import torch
from conftest import DEVICE

from fairseq_evomoe.kernels import backend
from fairseq_evomoe.kernels.gate import gate
from fairseq_evomoe.kernels.gate.gate_triton import fused_gate
from fairseq_evomoe.kernels.gate.rule import COMBINE, Rule, combine_weights
from fairseq_evomoe.kernels.gate.sums import entropy, routing_sums

RULES = {
    "threshold": {"threshold": 0.1},
    "limit": {"threshold": 0.02, "max_active": 2},
    "limit of 1": {"threshold": 0.02, "max_active": 1},
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
        most = rule.exactly or rule.max_active or len(order)
        for place, e in enumerate(order[:most]):
            if rule.exactly or place == 0 or by[t, e] >= rule.threshold:
                active[t, e] = True
    return combine_weights(probs, p, active, rule.combine), active, probs


def fused(logits, rule, bias=None, seed=0, **more):
    return fused_gate(logits, rule, bias, torch.tensor(seed), **more)


def inputs(shape, dtype=torch.float32):
    logits = torch.randn(shape, dtype=dtype, device=DEVICE)
    return logits, torch.randn(shape[1], dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize(
    "kind, shape",
    # a rule may need more experts than a shape has
    [(k, s) for k in RULES for s in SHAPES if RULES[k].get("exactly", 1) <= s[1]],
    ids=str,
)
def test_both_follow_the_rule(shape, kind, combine, biased, triton_can, force):
    """Weights, choice, softmax, sums and the gradient of the logits equal loops in float64."""
    rule = Rule(temperature=0.7, combine=combine, **RULES[kind])
    logits, bias = inputs(shape)
    bias = bias if biased else None
    grad = [torch.randn(shape, device=DEVICE) for _ in range(2)]
    pull = torch.randn(shape[1], device=DEVICE)
    z = logits.double().requires_grad_()
    want = loops(z, rule, None if bias is None else bias.double())

    def loss(weights, probs, total, level, entropy):
        plain = (weights * grad[0]).sum() + (probs * grad[1]).sum()
        return plain + (total * pull).sum() + 0.3 * level - 0.7 * entropy

    level = z.logsumexp(-1).square().sum()
    parts = want[0], want[2], want[2].sum(0), level, entropy(want[2]).sum()
    (dz,) = torch.autograd.grad(loss(*parts), z)
    for serving in ("torch", "triton"):
        force(backend.use(serving))
        own = logits.clone().requires_grad_()
        have = gate.dense_to_sparse(own, rule, bias, sums=True)
        assert torch.equal(have.active, want[1])
        assert (have.sums is None) == (serving == "torch")
        sums = have.sums or routing_sums(own, have.probs, have.active)
        assert not sums.load.requires_grad and torch.equal(sums.load, want[1].sum(0).float())
        found = have.weights, have.probs, *sums[1:]
        for a, b in zip(found, parts, strict=True):
            assert torch.allclose(a.double(), b, atol=1e-6, rtol=1e-5)
        assert torch.allclose(torch.autograd.grad(loss(*found), own)[0].double(), dz, atol=2e-5)


@pytest.mark.parametrize("serving", ["torch", "triton"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("k", "renorm"), [(1, False), (2, True), (5, True)])
def test_top_k(k, renorm, biased, serving, triton_can, force):
    """The k best by z + b get weight softmax(z), or that over its sum; load and gradient match."""
    force(backend.use(serving))
    logits, bias = inputs((19, 5))
    z = logits.double().requires_grad_()
    rows, wanted = [], []
    for row in z:
        score = row + bias if biased else row
        best = sorted(range(5), key=lambda e: -score[e].item())[:k]
        on = torch.tensor([e in best for e in range(5)], device=DEVICE)
        row = row.softmax(0) * on
        rows.append(row / row.sum() if renorm else row)
        wanted.append(on)
    want, on = torch.stack(rows), torch.stack(wanted)
    grad = torch.randn(19, 5, device=DEVICE)
    own = logits.clone().requires_grad_()
    have = gate.top_k(own, k, bias if biased else None, renorm=renorm, sums=True)
    assert torch.equal(have.active, on) and torch.allclose(have.weights.double(), want, atol=1e-6)
    assert (have.sums is None) == (serving == "torch")
    assert have.sums is None or torch.equal(have.sums.load, on.sum(0).float())
    (a,) = torch.autograd.grad((have.weights * grad).sum(), own)
    (b,) = torch.autograd.grad((want * grad).sum(), z)
    assert torch.allclose(a.double(), b, atol=1e-6)


@pytest.mark.parametrize("block", [1, 2, 16])
def test_noise_is_the_seed_s_own(block):
    """A seed gives the same result whatever the block size; another seed gives another result."""
    logits, _ = inputs((37, 6))
    rule = Rule(temperature=0.5, noise=1.0, threshold=0.1, combine="raw")
    want = fused(logits, rule, seed=11)
    have = fused(logits, rule, seed=11, block=block)
    assert torch.equal(want[1], have[1])
    # a block of another size may sum a row in another order
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(want[::2], have[::2], strict=True))
    other = fused(logits, rule, seed=12)
    assert not torch.equal(other[0], want[0])
    assert torch.equal(other[2], want[2]), "softmax(z) contains no noise"


def test_noise_is_gumbel():
    """With full noise the argmax is a draw from softmax(z), at any temperature."""
    z = torch.tensor([1.0, 0.0, -1.0, 0.5], device=DEVICE)
    n = 20000
    _, active, *_ = fused(
        z.expand(n, 4), Rule(temperature=0.3, noise=1.0, exactly=1), seed=5, block=64
    )
    share, want = active.float().mean(0), z.softmax(0)
    # five standard deviations of a share
    assert ((share - want).abs() < 5 * (want * (1 - want) / n).sqrt()).all()


def test_noise_in_backward_is_that_of_forward():
    """Finite differences at fixed noise equal the gradient."""
    rule = Rule(temperature=0.8, noise=1.0, threshold=0.05, combine="renorm")
    logits, _ = inputs((3, 4))
    grad = torch.randn(3, 4, device=DEVICE)
    value = lambda z: (fused(z, rule, seed=3)[0].double() * grad).sum()
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
    rule = Rule(temperature=0.1, noise=1.0, threshold=0.1, combine="renorm")
    weights, active, _, sums = fused(logits, rule, seed=1, sums=True)
    assert sums.isfinite().all()
    assert torch.allclose(weights.sum(1), torch.ones(2, device=DEVICE)) and active.any(1).all()
    (weights.square().sum() + sums.sum()).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("sums", [False, True])
def test_the_op_keeps_its_promises(sums):
    """The op passes torch.library.opcheck with a bias and noise, with and without the sums."""
    logits, bias = inputs((9, 5))
    args = [
        logits.requires_grad_(),
        bias,
        torch.tensor(3),
        0.7,
        1.0,
        0.1,
        2,
        0,
        "straight",
        sums,
        0,
    ]
    torch.library.opcheck(torch.ops.evomoe.gate, args)


def test_one_graph(triton_can):
    """A compiled call draws its noise from torch's stream, as an eager one does."""
    torch._dynamo.reset()
    rule = Rule(temperature=0.7, noise=1.0, threshold=0.1, combine="renorm")
    call = lambda z: gate.dense_to_sparse(z, rule, None, sums=True)
    found = []
    for each in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(6)
        z = inputs((11, 4))[0].requires_grad_()
        made = each(z)
        (made.weights.square().sum() + made.sums.entropy).backward()
        found.append((made.weights, z.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
