"""modules/experts.py: the bank computes the weighted sum of experts that a plan describes."""

import pytest
import torch
from bank_kit import D, E, H, T, bank
from torch import nn
from torch.nn import functional as F

from fairseq_evomoe.kernels.experts.values import Routing
from fairseq_evomoe.modules.experts import ExpertBank


def plan(density):
    active = torch.rand(T, E) < density
    weights = torch.rand(T, E) * active
    return Routing(weights, active)


@pytest.mark.parametrize("density", [0.0, 0.4, 0.98, 1.0])
def test_forward_is_the_weighted_sum_of_experts(density):
    """Sparse, nearly dense and dense plans all give sum_e w_e FFN_e(x)."""
    made, routed, x = bank(), plan(density), torch.randn(T, D)
    want = torch.zeros(T, D)
    for e in range(E):
        h = F.relu(x @ made.w1[e].t() + made.b1[e])
        want += routed.weights[:, e : e + 1] * (h @ made.w2[e].t() + made.b2[e])
    assert torch.allclose(made(x, routed), want, atol=1e-6)


def test_nearly_dense_plans_leave_inactive_pairs_out():
    """In a plan so dense that rows stay in place, inactive pairs still contribute nothing."""
    active = torch.ones(200, E, dtype=torch.bool)
    active[0, 1] = False
    weights = torch.rand(200, E) * active
    made, x = bank(), torch.randn(200, D)
    y = made(x, Routing(weights, active))
    with torch.no_grad():
        made.w1[1] += 1
    again = made(x, Routing(weights, active))
    assert torch.equal(again[0], y[0]) and not torch.equal(again[1], y[1])


def test_base_is_the_dense_layer_to_the_bit():
    """Expert 0 is the dense FFN, and initialising the others does not advance the random stream."""
    torch.manual_seed(4)
    fc1, fc2 = nn.Linear(D, H), nn.Linear(H, D)
    made = ExpertBank(
        fc1, fc2, num_experts=E, activation=F.relu, dropout=0.0, generator=torch.Generator()
    )
    after = torch.rand(1)
    torch.manual_seed(4)
    nn.Linear(D, H), nn.Linear(H, D)
    assert torch.equal(torch.rand(1), after)
    x = torch.randn(3, 5, D)
    assert torch.equal(made.run_base(x), fc2(F.relu(fc1(x))))


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_shared_expert(density):
    """The output is half of expert 0 for every token plus half of the routed experts 1 to E."""
    torch.manual_seed(1)
    made = ExpertBank(
        nn.Linear(D, H),
        nn.Linear(H, D),
        num_experts=E + 1,
        activation=F.relu,
        dropout=0.0,
        generator=torch.Generator().manual_seed(3),
        shared=True,
    )
    routed, x = plan(density), torch.randn(T, D)
    want = 0.5 * made.run_base(x)
    for e in range(E):
        h = F.relu(x @ made.w1[e + 1].t() + made.b1[e + 1])
        want = want + 0.5 * routed.weights[:, e : e + 1] * (h @ made.w2[e + 1].t() + made.b2[e + 1])
    assert torch.allclose(made(x, routed), want, atol=1e-6)


def test_bert_initialisation_draws_as_the_dense_layer_does():
    """Weights are N(0, 0.02), biases 0; the base expert has the dense layer's draws, w1 then w2."""
    made = bank()
    torch.manual_seed(6)
    made.reset_normal_(0.02, torch.Generator().manual_seed(1))
    after = torch.rand(1)
    torch.manual_seed(6)
    w1, w2 = torch.empty(H, D).normal_(0, 0.02), torch.empty(D, H).normal_(0, 0.02)
    assert torch.equal(made.w1[0], w1) and torch.equal(made.w2[0], w2)
    assert torch.equal(torch.rand(1), after) and made.b1.abs().sum() == 0
    assert made.w1[1:].std().item() == pytest.approx(0.02, rel=0.1)
