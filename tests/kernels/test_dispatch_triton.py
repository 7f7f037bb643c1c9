"""GPU dispatch: on a GPU where there is one, else by Triton's interpreter."""

import pytest
import torch
from conftest import DEVICE
from test_grouped_ffn import by_loops, problem
from torch.nn import functional as F

from fairseq_evomoe.kernels import routing
from fairseq_evomoe.kernels.dispatch_triton import (
    add_bias,
    combine,
    dispatch,
    expert_of_rows,
    places,
)
from fairseq_evomoe.kernels.grouped_ffn_gpu import sparse_ffn, why_not

CASES = [
    (7, 3, 4, 8, 0.5, ()),
    (1, 4, 4, 4, 0.6, ()),  # one token
    (0, 2, 4, 4, 0.5, ()),  # no token at all
    (9, 1, 4, 4, 1.0, ()),  # one expert
    (13, 5, 12, 20, 0.4, (0, 3)),  # experts without tokens, no powers of two
    (6, 4, 4, 4, 0.0, ()),  # nobody goes anywhere
    (11, 4, 4, 8, 1.0, ()),  # everybody goes everywhere
    (150, 2, 4, 8, 0.9, ()),  # more rows of an expert than a block
]


@pytest.mark.parametrize("activation", [F.relu, F.gelu], ids=["relu", "gelu"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_whole_path(case, activation):
    """Output and every gradient equal those of loops over tokens and experts in float64."""
    x, w, active, gate = problem(*case[:5], empty=case[5])
    dy = torch.randn_like(x)
    leaves = [x, *w, gate]
    by_loops(x, w, active, gate, activation).backward(dy)
    want = [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves]
    ours = [p.detach().float().to(DEVICE).requires_grad_() for p in leaves]
    x2, w2, gate2 = ours[0], ours[1:5], ours[5]
    on = active.to(DEVICE)
    y = sparse_ffn(
        x2, *w2, weight=gate2 * on, active=on, pairs=int(active.sum()), activation=activation
    )
    y.backward(dy.float().to(DEVICE))
    expected = by_loops(x, w, active, gate, activation)
    assert torch.allclose(y.cpu().double(), expected, atol=1e-4)
    for have, p in zip(ours, want, strict=True):
        found = torch.zeros_like(have) if have.grad is None else have.grad
        assert torch.allclose(found.cpu().double(), p, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (17, 5), (40, 8)])
def test_places_are_the_sorted_order(shape):
    """The same order as the CPU's: experts ascending, tokens ascending within an expert."""
    active = torch.rand(shape) < 0.4
    place, ends = places(active.to(DEVICE))
    token, counts = routing.sort_pairs(active)
    assert ends.tolist() == torch.tensor(counts).cumsum(0).tolist()
    assert torch.equal(place.cpu() >= 0, active)
    for t, e in active.nonzero().tolist():
        at = int(place[t, e])
        assert int(token[at]) == t and (ends[e] - counts[e]) <= at < ends[e]


def test_bfloat16_sums_in_float32():
    """300 experts of weight and output 1: the sum counts them all, where bfloat16 would not."""
    experts = 300
    active = torch.ones(2, experts, dtype=torch.bool, device=DEVICE)
    place, ends = places(active)
    x = torch.ones(2, 8, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    rows, expert = dispatch(x, place, 2 * experts), expert_of_rows(ends, 2 * experts)
    assert rows.dtype == torch.bfloat16 and torch.equal(rows, torch.ones_like(rows))
    assert expert.tolist() == [e for e in range(experts) for _ in range(2)]
    y = combine(rows, torch.ones(2, experts, device=DEVICE), place)
    assert torch.equal(y.float(), torch.full((2, 8), 300.0, device=DEVICE))
    y.sum().backward()
    assert torch.equal(x.grad.float(), torch.full((2, 8), 300.0, device=DEVICE))


def test_bias_gradient_of_experts_without_rows_is_zero():
    """Nothing is left unwritten: an expert without rows gets exactly 0."""
    ends = torch.tensor([0, 3, 3, 5], dtype=torch.int32, device=DEVICE)
    expert = torch.tensor([1, 1, 1, 3, 3], dtype=torch.int32, device=DEVICE)
    h = torch.randn(5, 6, device=DEVICE, requires_grad=True)
    bias = torch.randn(4, 6, device=DEVICE, requires_grad=True)
    y = add_bias(h, bias, expert, ends)
    assert torch.allclose(y, h + bias[expert.long()])
    dy = torch.randn_like(y)
    y.backward(dy)
    want = torch.stack([dy[:0].sum(0), dy[:3].sum(0), dy[:0].sum(0), dy[3:].sum(0)])
    assert torch.allclose(bias.grad, want) and torch.equal(h.grad, dy)


def test_what_it_cannot_serve_is_said():
    """Each reason names itself."""
    x = torch.zeros(2, 8)
    w = torch.zeros(2, 16, 8)
    assert "not on cpu" in why_not(x, w)
    meta = torch.zeros(2, 6, device="meta")
    assert why_not(meta, w)
