"""kernels/grouped_ffn.py and routing.py, compared with plain loops."""

import os
import subprocess
import sys

import pytest
import torch
from expert_kit import by_loops, grouped, problem
from torch.nn import functional as F

from fairseq_evomoe.kernels import backend
from fairseq_evomoe.kernels.experts import pairs, reference
from fairseq_evomoe.kernels.experts.eager import filled_up
from fairseq_evomoe.kernels.experts.moe_ffn import moe_ffn
from fairseq_evomoe.kernels.experts.serve import run_pairs
from fairseq_evomoe.kernels.experts.values import ExpertWeights, Pairs, Routing

CASES = [
    (7, 3, 5, 6, 0.5, ()),
    (1, 4, 3, 2, 0.6, ()),  # one token
    (0, 2, 3, 4, 0.5, ()),  # no token at all
    (9, 1, 4, 3, 1.0, ()),  # one expert
    (13, 5, 4, 7, 0.4, (0, 3)),  # experts without tokens, odd sizes
    (6, 4, 4, 4, 0.0, ()),  # no active pair
    (11, 4, 3, 5, 1.0, ()),  # all pairs active
]


@pytest.mark.parametrize("backend_name", ["torch", "reference"])
@pytest.mark.parametrize("activation", [F.relu, F.gelu, torch.tanh], ids=["relu", "gelu", "tanh"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_grouped_ffn(case, activation, backend_name, force):
    """Output and every gradient equal those of loops over tokens and experts."""
    force(backend.use(backend_name))
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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_groups_filled_up_to_few_sizes(case):
    """Pairs of weight 0 that fill up the groups change no output and no gradient."""
    *sizes, density, empty = case
    x, w, active, gate = problem(*sizes, density, empty=empty)
    expert, token = active.t().nonzero(as_tuple=True)
    counts = torch.bincount(expert, minlength=active.size(1)).tolist()
    plain = lambda: Pairs(gate[token, expert], token, counts)
    filled = filled_up(plain(), multiple=4)
    assert all(n % 4 == 0 and n - m < 4 for n, m in zip(filled.counts, counts, strict=True))
    assert [n == 0 for n in filled.counts] == [n == 0 for n in counts]
    run = lambda pairs: run_pairs(x, ExpertWeights(*w), pairs, activation=F.relu)
    want, have = run(plain()), run(filled)
    assert torch.allclose(have, want)
    direction, leaves = torch.randn_like(want), [x, *w, gate]
    for a, b in zip(
        torch.autograd.grad(have, leaves, direction),
        torch.autograd.grad(want, leaves, direction),
        strict=True,
    ):
        assert torch.allclose(a, b)


def test_dense_form_equals_sparse_form():
    """With every pair active, rows in place and gathered rows give equal outputs and gradients."""
    x, w, active, gate = problem(8, 3, 4, 5, 1.0)
    active[:] = True
    sparse = grouped(x, w, active, gate, F.relu)
    every = Pairs(gate.t().reshape(-1), None, [8] * 3)
    dense = run_pairs(x, ExpertWeights(*w), every, activation=F.relu)
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
    x, w, active, _gate = problem(5, 3, 3, 4, 0.6)
    token, counts = (None, [5] * 3) if dense else pairs.expert_order(active)
    weight = torch.rand(15 if dense else token.numel(), dtype=torch.float64, requires_grad=True)

    def f(x, w1, b1, w2, b2, weight):
        experts = ExpertWeights(w1, b1, w2, b2)
        return run_pairs(x, experts, Pairs(weight, token, counts), activation=torch.tanh)

    assert torch.autograd.gradcheck(f, (x, *w, weight))


@pytest.mark.parametrize("activation", [F.relu, F.gelu], ids=["relu", "gelu"])
@pytest.mark.parametrize("dense", [True, False])
def test_dropout(dense, activation):
    """Backward uses the mask of forward; the expectation is the output without dropout."""
    x, w, active, _gate = problem(6, 2, 4, 8, 0.8)
    token, counts = (None, [6] * 2) if dense else pairs.expert_order(active)
    weight = torch.rand(12 if dense else token.numel(), dtype=torch.float64, requires_grad=True)

    def f(x, w1, b1, w2, b2, weight, dropout=0.4):
        torch.manual_seed(3)
        experts = ExpertWeights(w1, b1, w2, b2)
        return run_pairs(
            x, experts, Pairs(weight, token, counts), activation=activation, dropout=dropout
        )

    assert torch.autograd.gradcheck(f, (x, *w, weight))
    plain = f(x, *w, weight, dropout=0.0)
    torch.manual_seed(0)
    mean = torch.zeros_like(plain)
    for _ in range(4000):
        mean += run_pairs(
            x,
            ExpertWeights(*w),
            Pairs(weight, token, counts),
            activation=activation,
            dropout=0.4,
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
    """The result is a permutation of the active pairs, sorted by expert and then by token."""
    active = torch.rand(shape) < 0.4
    token, counts = pairs.expert_order(active)
    expert = torch.arange(shape[1]).repeat_interleave(torch.tensor(counts))
    rebuilt = torch.zeros_like(active)
    rebuilt[token, expert] = True
    assert torch.equal(rebuilt, active)
    assert token.numel() == sum(counts) == int(active.sum())
    want_token, want_counts = reference.expert_order(active)
    assert torch.equal(token, want_token) and counts == want_counts


def test_pairs_must_add_up():
    """Counts that do not cover the pairs are refused, not read out of bounds."""
    x, w, active, _gate = problem(5, 3, 4, 4, 0.5)
    token, counts = pairs.expert_order(active)
    wrong = Pairs(torch.ones(token.numel()), token, [counts[0] + 1, *counts[1:]])
    with pytest.raises(ValueError, match="pairs"):
        run_pairs(x, ExpertWeights(*w), wrong, activation=F.relu)


def test_forced_backend():
    """One policy: a forced backend holds for ops that have it, and raises if it cannot serve them.

    An op that lacks the forced backend chooses automatically.
    """
    able = {
        "native": lambda: "no compiler",
        "torch": backend.supported,
        "reference": backend.supported,
    }
    assert backend.choose_backend(**able) == "torch"
    assert backend.choose_backend(**able | {"native": backend.supported}) == "native"
    with backend.use("reference"):
        assert backend.choose_backend(**able) == "reference"
        assert backend.choose_backend(torch=backend.supported) == "torch"
        with backend.use(""):
            assert backend.choose_backend(**able) == "torch"
    with backend.use("native"), pytest.raises(ValueError, match="'native'.*no compiler"):
        backend.choose_backend(**able)
    with pytest.raises(ValueError, match="'quantum': choose one of"), backend.use("quantum"):
        pass
    assert backend.forced_backend() == "", "nothing is left behind"


def test_every_backend_can_be_forced_on_an_moe_layer():
    """`native` and `triton`, which MoE layers on CPUs lack or cannot use, behave as documented."""
    x, w, active, gate = problem(6, 3, 4, 5, 0.6)
    routing = Routing(gate * active, active)
    expected = by_loops(x, w, active, gate, F.relu)
    for name in ("native", "torch", "reference"):
        with backend.use(name):
            assert torch.allclose(
                moe_ffn(x, ExpertWeights(*w), routing, activation=F.relu), expected
            )
    with backend.use("triton"), pytest.raises(ValueError, match="'triton' cannot serve"):
        moe_ffn(x.cpu(), ExpertWeights(*w), routing, activation=F.relu)


@pytest.mark.slow
@pytest.mark.parametrize("value, error", [("torch", ""), ("", ""), ("quantum", "choose one of")])
def test_the_environment_forces_a_backend(value, error):
    """EVOMOE_BACKEND is read at import, and an unknown name is an error at the first choice."""
    code = (
        "from fairseq_evomoe.kernels import backend as b;"
        "print(b.choose_backend(torch=b.supported, reference=b.supported))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "EVOMOE_BACKEND": value},
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == (not error)
    assert (error or "torch") in done.stdout + done.stderr
