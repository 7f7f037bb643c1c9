"""csrc/few_rows.cpp: experts for few tokens, every instruction set against loops in float64."""

import pytest
import torch
from expert_kit import by_loops
from isa_kit import every_isa
from torch.nn import functional as F

from fairseq_evomoe.kernels import backend
from fairseq_evomoe.kernels.experts import few_rows, serve
from fairseq_evomoe.kernels.experts.values import ExpertWeights, Routing
from fairseq_evomoe.kernels.lookup.score import quantise

SHAPES = (
    (1, 1, 4, 4),  # T, E, D, F
    (5, 3, 16, 24),
    (7, 4, 13, 21),  # no multiple of a register
    (64, 8, 33, 70),
    (40, 5, 200, 3),
    (3, 2, 520, 129),
    (0, 2, 4, 4),
)


isa = every_isa(few_rows, "few_rows_isa")


def drawn(shape, density=0.5):
    tokens, experts, width, hidden = shape
    shapes = ((hidden, width), (hidden,), (width, hidden), (width,))
    weights = ExpertWeights(*(torch.randn(experts, *s) for s in shapes))
    active = torch.rand(tokens, experts) < density
    return torch.randn(tokens, width), weights, Routing(torch.randn(tokens, experts), active)


def expected(x, weights, routing, activation=F.relu):
    exact = [w.double() for w in weights]
    return by_loops(x.double(), exact, routing.active, routing.weights.double(), activation)


def error(have, want):
    return float((have - want).abs().max() / want.abs().max().clamp_min(1)) if len(want) else 0.0


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output(shape, density, isa):
    """Any number of experts per token, experts without tokens and tokens without experts."""
    x, weights, routing = drawn(shape, density)
    for activation in (F.relu, F.gelu, torch.tanh):
        have = few_rows.ffn(x, weights, routing, activation=activation)
        assert error(have, expected(x, weights, routing, activation)) < 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8(shape, isa):
    """int8 rows with their scales are read as the values that they encode. Inputs are rounded to 16
    bits, which is a hundredth of what rounding the weights has changed."""
    x, weights, routing = drawn(shape)
    (w1, s1), (w2, s2) = quantise(weights.w1), quantise(weights.w2)
    stored = weights._replace(w1=w1, w2=w2)
    have = few_rows.ffn(x, stored, routing, activation=F.relu, scales=(s1, s2))
    wide = weights._replace(w1=w1 * s1[..., None], w2=w2 * s2[..., None])
    assert error(have, expected(x, wide, routing)) < 1e-4


@pytest.mark.parametrize("shape", [(1, 4, 4), (5, 13, 70), (33, 520, 1001), (0, 8, 8)], ids=str)
def test_one_matrix_in_int8(shape, isa):
    """One matrix is what an expert is that every token visits: x W^T, with W widened in float64."""
    rows, width, words = shape
    x = torch.randn(rows, width)
    small, scale = quantise(torch.randn(words, width))
    expected = x.double() @ (small.double() * scale[:, None].double()).T
    found = few_rows.int8_linear(x, small, scale)
    half_a_step = x.abs().amax(1, keepdim=True).double() / 32767 / 2 if rows else 0
    bound = half_a_step * (small.double().abs() * scale[:, None]).sum(1) + 1e-5
    assert found.shape == (rows, words) and bool(((found - expected).abs() <= bound).all())


@pytest.mark.parametrize("width", [1024, 40_000])
def test_int8_sums_do_not_overflow(width, isa):
    """The largest weights and inputs, all of one sign, have the sum that they should have."""
    weight = torch.full((5, width), 127, dtype=torch.int8)
    weight[1] = -127
    found = few_rows.int8_linear(torch.full((1, width), 3.0), weight, torch.full((5,), 0.5))
    exact = torch.tensor([[1.0, -1.0, 1.0, 1.0, 1.0]]) * (127 * 0.5 * 3 * width)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=0)


def test_int8_with_values_that_are_not_finite(isa):
    """A row with NaN or infinity gives NaN and leaves the other rows alone; zeros give zeros, and a
    row is the same to the bit whatever rows are beside it."""
    x = torch.randn(6, 20)
    small, scale = quantise(torch.randn(9, 20))
    alone = torch.cat([few_rows.int8_linear(row[None], small, scale) for row in x])
    x[1, 3], x[2, 0], x[3], x[4] = torch.nan, torch.inf, 0.0, x[4] * 1e30
    found = few_rows.int8_linear(x, small, scale)
    assert found[1:3].isnan().all() and not found[3].any()
    assert torch.equal(found[[0, 5]], alone[[0, 5]])
    assert found[4].isfinite().all() and found[4].abs().max() > 1e28


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_gradients(density):
    """Every gradient equals that of loops in float64, and a tensor that needs none gets none."""
    x, weights, routing = drawn((11, 5, 16, 24), density)
    leaves = [t.clone().requires_grad_() for t in (x, *weights, routing.weights)]
    y = few_rows.ffn(
        *(leaves[0], ExpertWeights(*leaves[1:5]), Routing(leaves[5], routing.active)),
        activation=F.gelu,
    )
    dy = torch.randn_like(y)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = by_loops(exact[0], exact[1:5], routing.active, exact[5], F.gelu)
    found = torch.autograd.grad(y, leaves, dy)
    wanted = torch.autograd.grad(want, exact, dy.double(), materialize_grads=True)
    for have, expect in zip(found, wanted, strict=True):
        assert error(have, expect) < 1e-5
    with torch.no_grad():
        plain = few_rows.ffn(x, weights, routing, activation=F.gelu)
    assert torch.equal(plain, y), "with and without gradients"
    only = x.clone().requires_grad_()
    few_rows.ffn(only, weights, routing, activation=F.gelu).backward(dy)
    assert torch.allclose(only.grad, found[0]) and weights.w1.grad is None


def test_a_token_does_not_know_its_batch(isa):
    """A token's output is the same to the bit alone, in a batch and on any number of threads."""
    x, weights, routing = drawn((50, 4, 100, 300))
    whole = few_rows.ffn(x, weights, routing, activation=F.relu)
    for t in (0, 17, 49):
        part = Routing(routing.weights[t : t + 1], routing.active[t : t + 1])
        alone = few_rows.ffn(x[t : t + 1], weights, part, activation=F.relu)
        assert torch.equal(alone[0], whole[t])
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(few_rows.ffn(x, weights, routing, activation=F.relu), whole)
    torch.set_num_threads(before)


def served(monkeypatch, x, weights, routing, **more):
    """Whether the dispatcher lets this op serve."""
    calls = []
    real = few_rows.ffn
    monkeypatch.setattr(few_rows, "ffn", lambda *a, **kw: calls.append(1) or real(*a, **kw))
    y = serve.run_experts(x, weights, routing, activation=F.relu, **more)
    monkeypatch.setattr(few_rows, "ffn", real)
    assert error(y.detach(), expected(x, weights, routing).detach()) < 0.05
    return bool(calls)


def test_when_it_serves(monkeypatch):
    """It serves few float32 tokens on a CPU without dropout, unless another backend is forced.
    Where it is forced but cannot serve, torch does, so that training goes on."""
    x, weights, routing = drawn((9, 3, 16, 24))
    assert served(monkeypatch, x, weights, routing)
    with backend.use("native"):
        assert served(monkeypatch, x, weights, routing)
    for other in ("torch", "reference"):
        with backend.use(other):
            assert not served(monkeypatch, x, weights, routing)
    half = ExpertWeights(*(w.bfloat16() for w in weights))
    assert not served(monkeypatch, x.bfloat16(), half, routing)
    many = drawn((few_rows.FEW + 1, 3, 16, 24))
    assert not served(monkeypatch, *many)
    with backend.use("native"):
        assert served(monkeypatch, *many), "one path for all numbers of tokens"
        assert not served(monkeypatch, x.bfloat16(), half, routing)


def test_without_a_compiler(monkeypatch):
    """Without the op, torch serves."""
    monkeypatch.setattr(few_rows, "unavailable", lambda: "no C++ compiler")
    assert not served(monkeypatch, *drawn((9, 3, 16, 24)))
