"""kernels/experts/gated.py: gated experts against a float64 reference, and every gradient."""

import pytest
import torch
from torch.nn import functional as F

from fairseq_evomoe.kernels.experts import gated
from fairseq_evomoe.kernels.experts.gated import GatedWeights, gated_ffn
from fairseq_evomoe.kernels.experts.values import Pairs

TOKENS, WIDTH, HIDDEN, EXPERTS = 19, 6, 5, 4


def case(dtype, *, biased, counts=(7, 0, 19, 3)):
    """Random experts and pairs, as leaves."""
    draw = lambda *shape: torch.randn(*shape, dtype=dtype).requires_grad_()
    weights = GatedWeights(
        draw(EXPERTS, 2 * HIDDEN, WIDTH),
        draw(EXPERTS, 2 * HIDDEN) if biased else None,
        draw(EXPERTS, WIDTH, HIDDEN),
        draw(EXPERTS, WIDTH) if biased else None,
    )
    token = torch.cat(
        [torch.randperm(TOKENS)[:n].sort().values for n in map(min, counts, [19] * 4)]
    )
    counts = [min(n, 19) for n in counts]
    return draw(TOKENS, WIDTH), weights, Pairs(draw(sum(counts)), token, counts)


def reference(x, weights, pairs, activation):
    """The same sum, one expert after another, by autograd."""
    y, start = torch.zeros_like(x), 0
    for e, n in enumerate(pairs.counts):
        rows = pairs.token[start : start + n]
        both = x[rows] @ weights.gate_up[e].t()
        if weights.gate_up_bias is not None:
            both = both + weights.gate_up_bias[e]
        gate, up = both.chunk(2, -1)
        out = (activation(gate) * up) @ weights.down[e].t()
        if weights.down_bias is not None:
            out = out + weights.down_bias[e]
        y = y.index_add(0, rows, out * pairs.weight[start : start + n, None])
        start += n
    return y


@pytest.mark.parametrize("block", [1, 8, 1000])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", [F.silu, F.gelu])
def test_values_and_gradients(block, biased, activation, monkeypatch):
    """In float64, whether blocks are single experts or all of them; an idle expert gets zeros."""
    monkeypatch.setattr(gated, "BLOCK", block)
    x, weights, pairs = case(torch.float64, biased=biased)
    leaves = [x, pairs.weight, *(w for w in weights if w is not None)]
    have = gated_ffn(x, weights, pairs, activation=activation)
    want = reference(x, weights, pairs, activation)
    torch.testing.assert_close(have, want)
    direction = torch.randn_like(want)
    for one, other in zip(
        torch.autograd.grad(have, leaves, direction),
        torch.autograd.grad(want, leaves, direction),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    assert not torch.autograd.grad(
        gated_ffn(x, weights, pairs, activation=activation).sum(), weights.gate_up
    )[0][1].any()


@pytest.mark.parametrize("frozen", ["x", "gate_up", "down", "weight"])
def test_what_needs_no_gradient_gets_none(frozen):
    """The other gradients are the same."""
    x, weights, pairs = case(torch.float64, biased=True)
    leaves = {"x": x, "weight": pairs.weight, "gate_up": weights.gate_up, "down": weights.down}
    gated_ffn(x, weights, pairs, activation=F.silu).sum().backward()
    want = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        leaf.grad = None
        leaf.requires_grad_(name != frozen)
    gated_ffn(x, weights, pairs, activation=F.silu).sum().backward()
    assert leaves[frozen].grad is None
    for name in set(leaves) - {frozen}:
        torch.testing.assert_close(leaves[name].grad, want[name])


@pytest.mark.parametrize("leaves", [True, False])
@torch.no_grad()
def test_inference_keeps_its_input(leaves, monkeypatch):
    """Without gradients steps run in place, but never in the caller's tensors."""
    x, weights, pairs = case(torch.float32, biased=False)
    if not leaves:
        for tensor in (x, pairs.weight, weights.gate_up, weights.down):
            tensor.requires_grad_(False)
    in_place, original = [], torch.Tensor.mul_
    monkeypatch.setattr(torch.Tensor, "mul_", lambda *a: in_place.append(1) or original(*a))
    before = [t.clone() for t in (x, pairs.weight, weights.gate_up, weights.down)]
    have = gated_ffn(x, weights, pairs, activation=lambda z: z)
    torch.testing.assert_close(have, reference(x, weights, pairs, lambda z: z))
    assert in_place
    for one, other in zip(before, (x, pairs.weight, weights.gate_up, weights.down), strict=True):
        assert torch.equal(one, other)
