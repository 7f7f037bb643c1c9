"""modules/losses.py against the formulas, token by token."""

import math

import pytest
import torch

from fairseq_evomoe.kernels.gate.sums import entropy
from fairseq_evomoe.modules.losses import balance_loss
from fairseq_evomoe.modules.plan import RoutingPlan

T, E = 24, 4


def means(logits, probs):
    """The means from which the layer computes its losses."""
    return RoutingPlan(weights=probs, active=probs > 0, probs=probs, logits=logits).means


@pytest.mark.parametrize("k", [1, 2, E])
def test_balance_is_one_at_balance_whatever_is_active(k):
    """Uniform load and uniform mean probability give 1 for 1, 2 and all experts per token."""
    probs = torch.full((T, E), 1 / E)
    assert balance_loss(probs.mean(0), torch.full((E,), T * k / E)).item() == pytest.approx(1)


def test_balance_against_loops_and_its_gradient():
    """The loss is E * sum_e f_e P_e; its gradient, through P alone, pushes busy experts down."""
    logits = torch.randn(T, E, requires_grad=True)
    probs = logits.softmax(-1)
    load = torch.tensor([20.0, 2.0, 1.0, 1.0])
    want = E * sum(
        load[e].item() / 24 * sum(probs[t, e].item() for t in range(T)) / T for e in range(E)
    )
    loss = balance_loss(means(logits, probs).probs, load)
    assert loss.item() == pytest.approx(want, rel=1e-5)
    loss.backward()
    assert logits.grad[:, 0].min() > 0


def test_balance_is_largest_when_collapsed():
    """If every token goes to one expert with probability 1, the loss is E."""
    probs = torch.zeros(T, E)
    probs[:, 2] = 1
    assert balance_loss(probs.mean(0), probs.sum(0)).item() == E


def test_z_loss_and_entropy():
    """The z-loss is mean logsumexp^2, and the entropy is -sum p log p with 0 log 0 = 0."""
    logits = torch.randn(T, E)
    want = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / T
    assert means(logits, logits.softmax(-1)).z.item() == pytest.approx(want, rel=1e-5)
    probs = torch.tensor([[0.5, 0.5, 0, 0], [1.0, 0, 0, 0]])
    assert entropy(probs).tolist() == pytest.approx([math.log(2), 0])
    assert means(probs, probs).entropy.item() == pytest.approx(math.log(2) / 2)


def test_empty_batches_cost_nothing():
    """Without tokens every loss is 0, not NaN, and is still part of the graph."""
    logits = torch.zeros(0, E, requires_grad=True)
    of = means(logits, logits)
    losses = [balance_loss(of.probs, torch.zeros(E)), of.z, of.entropy]
    sum(losses).backward()
    assert [v.item() for v in losses] == [0, 0, 0] and logits.grad.shape == (0, E)
