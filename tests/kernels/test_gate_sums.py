"""Sums of a gate for losses and metrics, run on a GPU if there is one, else by the interpreter."""

import pytest
import torch
from conftest import DEVICE

from fairseq_evomoe.kernels.gate.sums import routing_sums, unpack_sums, unsupported
from fairseq_evomoe.kernels.gate.sums_triton import fused_sums

BOTH = [routing_sums, lambda *args: unpack_sums(fused_sums(*args))]
SHAPES = [(0, 3), (1, 1), (7, 3), (300, 5), (33, 64), (5, 300)]


def by_loops(logits, probs, wanted):
    """The sums, token by token, in float64."""
    load, total = torch.zeros(probs.size(1)), torch.zeros_like(probs[:0].sum(0))
    z = entropy = probs.sum() * 0
    for t in range(len(probs)):
        load += wanted[t]
        total = total + probs[t]
        z = z + torch.log(torch.exp(logits[t]).sum()) ** 2
        entropy = entropy - (probs[t] * torch.log(probs[t])).sum()
    return load, total, z, entropy


@pytest.mark.parametrize("serving", BOTH, ids=["torch", "triton"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_loops(shape, serving):
    """Every sum equals the loop's, and so do the gradients through all of them at once."""
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    probs = torch.randn(shape, dtype=torch.float64).softmax(-1).requires_grad_()
    wanted = torch.rand(shape) < 0.4
    pull = torch.randn(shape[1], dtype=torch.float64)
    load, total, z, entropy = by_loops(logits, probs, wanted)
    ((pull * total).sum() + 0.3 * z - 0.7 * entropy).backward()
    ours = [p.detach().float().to(DEVICE).requires_grad_() for p in (logits, probs)]
    sums = serving(*ours, wanted.to(DEVICE))
    assert not sums.load.requires_grad and sums.load.cpu().tolist() == load.tolist()
    for have, want in zip(sums[1:], (total, z, entropy), strict=True):
        assert have.dtype == torch.float32
        assert torch.allclose(have.detach().cpu().double(), want.detach(), rtol=1e-4, atol=1e-5)
    weighed = (pull.float().to(DEVICE) * sums.probs).sum() + 0.3 * sums.z - 0.7 * sums.entropy
    weighed.backward()
    for have, want in zip(ours, (logits, probs), strict=True):
        grad = torch.zeros_like(want) if want.grad is None else want.grad
        assert torch.allclose(have.grad.cpu().double(), grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("serving", BOTH, ids=["torch", "triton"])
def test_a_probability_of_zero(serving):
    """A zero probability adds 0 to entropy and gradient, although the slope there is infinite."""
    probs = torch.tensor([[1.0, 0.0]], device=DEVICE, requires_grad=True)
    logits = torch.zeros(1, 2, device=DEVICE, requires_grad=True)
    sums = serving(logits, probs, probs > 0)
    assert sums.entropy.item() == 0 and sums.probs.tolist() == [1, 0]
    (0 * sums.entropy + sums.probs.sum()).backward()
    assert probs.grad.tolist() == [[1, 1]] and (logits.grad is None or not logits.grad.any())


def test_what_it_cannot_serve_is_said():
    assert "not on cpu" in unsupported(torch.zeros(2, 3), torch.zeros(2, 3))


def test_the_op_keeps_its_promises():
    """The op passes torch.library.opcheck (schema, fake tensors, autograd)."""
    logits = torch.randn(9, 5, device=DEVICE)
    probs = logits.softmax(-1).requires_grad_()
    args = (logits.requires_grad_(), probs.detach().requires_grad_(), probs > 0.2)
    torch.library.opcheck(torch.ops.evomoe.routing_sums, args)
