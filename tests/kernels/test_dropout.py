"""transformer/dropout.py: which elements it drops, and that every pass drops the same."""

import pytest
import torch
from isa_kit import every_isa
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fairseq_evomoe.kernels import backend
from fairseq_evomoe.kernels.transformer import cpu
from fairseq_evomoe.kernels.transformer import dropout as module
from fairseq_evomoe.kernels.transformer.dropout import dropout
from fairseq_evomoe.kernels.transformer.functions import fast_functions

isa = every_isa(cpu, "transformer_isa")


def kept(n, p=0.25, seed=1):
    """Which of n elements are kept, as 0 and 1."""
    return (cpu.dropout(torch.ones(n), p, seed) != 0).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1, 7, 16, 37, 70_001])
def test_values(size, dtype, isa):
    """What is kept is divided by 1 - p and rounded as torch rounds; NaN and infinity stay."""
    x = torch.randn(size).to(dtype)
    x[3:5] = torch.tensor([float("nan"), float("-inf")])[: len(x[3:5])]
    y = cpu.dropout(x, 0.25, seed=1)
    keeps = kept(size).bool()
    assert y.dtype == dtype and not y[~keeps].any()
    want = (x.float() * (1 / (1 - 0.25)))[keeps].to(dtype)
    assert torch.equal(y[keeps].nan_to_num(7), want.nan_to_num(7))


@pytest.mark.parametrize("seed", [0, 5, 2**63 - 2])
def test_every_processor_drops_the_same(seed, monkeypatch):
    """The elements depend neither on the instruction set nor on the number of threads."""
    found = []
    threads = torch.get_num_threads()
    for number in range(torch.ops.evomoe.transformer_isa() + 1):
        monkeypatch.setattr(cpu, "isa", lambda number=number: number)
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(kept(300_001, seed=seed))
    torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("p", [1e-4, 0.1, 0.5, 0.9])
def test_as_if_drawn(p):
    """The share is p, and neighbours, rows and seeds have nothing to do with each other.

    All figures are within 5 standard errors of independent draws.
    """
    n = 1 << 20
    first = kept(n, p)
    assert abs(first.mean() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    others = [first.roll(k) for k in (1, 2, 16, 128, 4096)]
    others += [kept(n, p, seed) for seed in (0, 2, 3, 1 + 2**32, 1 + 2**40)]
    spread = p * (1 - p)
    for other in others:
        together = ((first - (1 - p)) * (other - (1 - p))).mean() / spread
        assert abs(together) < 5 / n**0.5
    sums = (first.view(-1, 1024) - (1 - p)).sum(1)
    assert sums.var() == pytest.approx(1024 * spread, rel=5 * (2 / 1024) ** 0.5)


def test_seeded_by_torch():
    """A seed of torch repeats the masks, and each call has another one."""
    x = torch.ones(100, 30)
    torch.manual_seed(3)
    one, two = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5), one) and torch.equal(dropout(x, 0.5), two)
    assert not torch.equal(one, two)


def test_gradients():
    """They pass where elements are kept, of first and second order, in any layout of memory."""
    x = torch.randn(40, 30).t().requires_grad_()
    y = dropout(x, 0.3)
    keeps = (y != 0) / (1 - torch.tensor(0.3))
    assert torch.allclose(y, x * keeps)
    dy = torch.randn(40, 30).t().requires_grad_()
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    assert torch.allclose(dx, dy * keeps)
    (again,) = torch.autograd.grad(dx, dy, x)
    assert torch.allclose(again, x * keeps)


def test_where_torch_serves(monkeypatch):
    """Outside training, in place, at the ends of p, in float64 and where torch is forced."""
    x, calls = torch.ones(50), []
    monkeypatch.setattr(module, "torch_dropout", lambda *a: calls.append(a))
    dropout(x, 0.5, False)
    dropout(x, 0.5, True, True)
    dropout(x, 0.0)
    dropout(x, 1.0)
    dropout(x, -0.1)
    dropout(x.double(), 0.5)
    with backend.use("torch"):
        dropout(x, 0.5)
    assert len(calls) == 7
    dropout(x, 0.5)
    assert len(calls) == 7


def test_modules_train_with_it(monkeypatch):
    """Modules reach it through torch, and a layer that is computed again drops the same units."""
    layer = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 8))
    x = torch.randn(20, 8, requires_grad=True)
    calls = []
    real = cpu.dropout
    monkeypatch.setattr(cpu, "dropout", lambda *a: (calls.append(1), real(*a))[1])
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(1)
        with fast_functions():
            y = run(x)
            found.append((y, *torch.autograd.grad(y.sum(), [x, *layer.parameters()])))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and len(calls) == 5
    layer(x)
    assert len(calls) == 5 and F.dropout is module.torch_dropout
