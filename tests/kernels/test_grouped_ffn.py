"""kernels/grouped_ffn.py and routing.py against plain loops."""

import importlib

import pytest
import torch
from torch.nn import functional as F

from fairseq_evomoe.kernels import backend, reference, routing
from fairseq_evomoe.kernels.grouped_ffn import grouped_ffn


def problem(T, E, D, F_, density, dtype=torch.float64, empty=()):
    """Random states, weights and active pairs; experts in `empty` get nobody."""
    x = torch.randn(T, D, dtype=dtype, requires_grad=True)
    w = [
        torch.randn(shape, dtype=dtype).mul(0.3).requires_grad_()
        for shape in ((E, F_, D), (E, F_), (E, D, F_), (E, D))
    ]
    active = torch.rand(T, E) < density
    active[:, list(empty)] = False
    gate = torch.rand(T, E, dtype=dtype, requires_grad=True)
    return x, w, active, gate


def by_loops(x, w, active, gate, activation):
    """One token, one expert at a time."""
    w1, b1, w2, b2 = w
    rows = []
    for t in range(x.size(0)):
        y = x[t] * 0
        for e in range(w1.size(0)):
            if active[t, e]:
                y = y + gate[t, e] * (w2[e] @ activation(w1[e] @ x[t] + b1[e]) + b2[e])
        rows.append(y)
    return torch.stack(rows) if rows else x * 1


def grouped(x, w, active, gate, activation, dropout=0.0):
    token, counts = routing.sort_pairs(active)
    weight = gate.t().masked_select(active.t())
    return grouped_ffn(
        x, *w, weight=weight, token=token, counts=counts, activation=activation, dropout=dropout
    )


CASES = [
    (7, 3, 5, 6, 0.5, ()),
    (1, 4, 3, 2, 0.6, ()),  # one token
    (0, 2, 3, 4, 0.5, ()),  # no token at all
    (9, 1, 4, 3, 1.0, ()),  # one expert
    (13, 5, 4, 7, 0.4, (0, 3)),  # experts without tokens, odd sizes
    (6, 4, 4, 4, 0.0, ()),  # nobody goes anywhere
    (11, 4, 3, 5, 1.0, ()),  # everybody goes everywhere
]


@pytest.mark.parametrize("backend_name", ["torch", "reference"])
@pytest.mark.parametrize("activation", [F.relu, F.gelu, torch.tanh], ids=["relu", "gelu", "tanh"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_grouped_ffn(case, activation, backend_name, monkeypatch):
    """Output and every gradient equal those of loops over tokens and experts."""
    monkeypatch.setattr(backend, "forced", backend_name)
    *sizes, density, empty = case
    x, w, active, gate = problem(*sizes, density, empty=empty)
    expected = by_loops(x, w, active, gate, activation)
    got = grouped(x, w, active, gate, activation)
    assert torch.allclose(got, expected)
    direction = torch.randn_like(expected)
    leaves = [x, *w, gate]
    want = torch.autograd.grad(expected, leaves, direction, allow_unused=True)
    have = torch.autograd.grad(got, leaves, direction, allow_unused=True)
    for a, b, leaf in zip(have, want, leaves, strict=True):
        zero = torch.zeros_like(leaf)
        assert torch.allclose(zero if a is None else a, zero if b is None else b)


def test_dense_form_equals_sparse_form():
    """With every pair active, working in place and gathering rows give the same, gradients too."""
    x, w, active, gate = problem(8, 3, 4, 5, 1.0)
    active[:] = True
    sparse = grouped(x, w, active, gate, F.relu)
    dense = grouped_ffn(
        x, *w, weight=gate.t().reshape(-1), token=None, counts=[8] * 3, activation=F.relu
    )
    assert torch.allclose(dense, sparse)
    direction = torch.randn_like(dense)
    leaves = [x, *w, gate]
    for a, b in zip(
        torch.autograd.grad(dense, leaves, direction),
        torch.autograd.grad(sparse, leaves, direction),
        strict=True,
    ):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("dense", [True, False])
def test_gradcheck(dense):
    """Analytic gradients match finite differences in float64, in both forms."""
    x, w, active, gate = problem(5, 3, 3, 4, 0.6)
    token, counts = (None, [5] * 3) if dense else routing.sort_pairs(active)
    pairs = 15 if dense else token.numel()
    weight = torch.rand(pairs, dtype=torch.float64, requires_grad=True)

    def f(x, w1, b1, w2, b2, weight):
        return grouped_ffn(
            x, w1, b1, w2, b2, weight=weight, token=token, counts=counts, activation=torch.tanh
        )

    assert torch.autograd.gradcheck(f, (x, *w, weight))


@pytest.mark.parametrize("activation", [F.relu, F.gelu], ids=["relu", "gelu"])
@pytest.mark.parametrize("dense", [True, False])
def test_dropout(dense, activation):
    """Backward uses the mask of forward; the expectation is the output without dropout."""
    x, w, active, gate = problem(6, 2, 4, 8, 0.8)
    token, counts = (None, [6] * 2) if dense else routing.sort_pairs(active)
    weight = torch.rand(12 if dense else token.numel(), dtype=torch.float64, requires_grad=True)

    def f(x, w1, b1, w2, b2, weight, dropout=0.4):
        torch.manual_seed(3)
        return grouped_ffn(
            x,
            *(w1, b1, w2, b2),
            weight=weight,
            token=token,
            counts=counts,
            activation=activation,
            dropout=dropout,
        )

    assert torch.autograd.gradcheck(f, (x, *w, weight))
    plain = f(x, *w, weight, dropout=0.0)
    torch.manual_seed(0)
    mean = torch.zeros_like(plain)
    for _ in range(4000):
        mean += grouped_ffn(
            x, *w, weight=weight, token=token, counts=counts, activation=activation, dropout=0.4
        ).detach()
    assert (mean / 4000 - plain).abs().max() < 0.15 * plain.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """In half precision the result has the input's dtype and stays near float64."""
    x, w, active, gate = problem(16, 4, 8, 16, 0.5)
    expected = grouped(x, w, active, gate, F.relu)
    got = grouped(x.to(dtype), [p.to(dtype) for p in w], active, gate.float(), F.relu)
    assert got.dtype == dtype
    assert (got.double() - expected).norm() < 0.02 * expected.norm()


def test_autocast():
    """Under autocast the experts compute in its dtype and gradients come back in float32."""
    x, w, active, gate = problem(16, 4, 8, 16, 0.5, dtype=torch.float32)
    expected = grouped(x, w, active, gate, F.relu)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = grouped(x, w, active, gate, F.relu)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() < 0.02 * expected.norm()
    got.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in (x, *w))


def test_same_twice():
    """Two runs agree to the bit, forward and backward."""
    x, w, active, gate = problem(64, 4, 16, 32, 0.6, dtype=torch.float32)
    runs = []
    for _ in range(2):
        y = grouped(x, w, active, gate, F.relu)
        runs.append([y, *torch.autograd.grad(y.square().sum(), [x, *w, gate])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (17, 5), (40, 2)])
def test_sort_pairs(shape):
    """A permutation of the active pairs: experts ascending, tokens ascending within."""
    active = torch.rand(shape) < 0.4
    token, counts = routing.sort_pairs(active)
    expert = torch.arange(shape[1]).repeat_interleave(torch.tensor(counts))
    rebuilt = torch.zeros_like(active)
    rebuilt[token, expert] = True
    assert torch.equal(rebuilt, active)
    assert token.numel() == sum(counts) == int(active.sum())
    want_token, want_counts = reference.sort_pairs(active)
    assert torch.equal(token, want_token) and counts == want_counts


def test_pairs_must_add_up():
    """Counts that do not cover the pairs are refused, not read out of bounds."""
    x, w, active, gate = problem(5, 3, 4, 4, 0.5)
    token, counts = routing.sort_pairs(active)
    with pytest.raises(ValueError, match="pairs"):
        grouped_ffn(
            x,
            *w,
            weight=torch.ones(token.numel()),
            token=token,
            counts=[counts[0] + 1, *counts[1:]],
            activation=F.relu,
        )


def test_forced_backend(monkeypatch):
    """EVOMOE_BACKEND chooses; a name that cannot be served raises instead of falling back."""
    able = {"native": lambda: "no compiler", "torch": backend.always, "reference": backend.always}
    monkeypatch.setattr(backend, "forced", "")
    assert backend.choose(**able) == "torch"
    assert backend.choose(**able | {"native": backend.always}) == "native"
    monkeypatch.setattr(backend, "forced", "reference")
    assert backend.choose(**able) == "reference"
    for name, why in (
        ("quantum", "'quantum': choose one of"),
        ("native", "no compiler"),
    ):
        monkeypatch.setattr(backend, "forced", name)
        with pytest.raises(ValueError, match=why):
            backend.choose(**able)
    with pytest.raises(ValueError, match="it has torch"):
        backend.choose(torch=backend.always)
    for value in ("torch", ""):
        monkeypatch.setenv("EVOMOE_BACKEND", value)
        assert importlib.reload(backend).forced == value
