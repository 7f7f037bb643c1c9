"""modules/experts.py: the bank computes its plan; a split copies, differs and repeats exactly."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fairseq_evomoe.modules.experts import DIVERSIFY_MODES, ExpertBank, Split
from fairseq_evomoe.modules.plan import RoutingPlan

T, D, H, E = 10, 6, 12, 4
NAMES = ("w1", "b1", "w2", "b2")


def bank(dropout=0.0, seed=1):
    torch.manual_seed(seed)
    return ExpertBank(
        nn.Linear(D, H),
        nn.Linear(H, D),
        num_experts=E,
        activation=F.relu,
        dropout=dropout,
        generator=torch.Generator().manual_seed(3),
    )


def plan(density):
    active = torch.rand(T, E) < density
    weights = torch.rand(T, E) * active
    return RoutingPlan(weights, active, weights, weights)


def split(mode, **changes):
    flags = dict(ratio=0.5, noise=0.1, seed=5, experts=E, hidden=H)
    return Split(mode, **{**flags, **changes})


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
    """Above the density from which rows stay in place, an inactive pair still weighs nothing."""
    active = torch.ones(200, E, dtype=torch.bool)
    active[0, 1] = False
    weights = torch.rand(200, E) * active
    made, x = bank(), torch.randn(200, D)
    y = made(x, RoutingPlan(weights, active, weights, weights))
    with torch.no_grad():
        made.w1[1] += 1
    again = made(x, RoutingPlan(weights, active, weights, weights))
    assert torch.equal(again[0], y[0]) and not torch.equal(again[1], y[1])


def test_base_is_the_dense_layer_to_the_bit():
    """Expert 0 is the dense FFN; initialising the others leaves the random stream alone."""
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
    assert torch.equal(made.base(x), fc2(F.relu(fc1(x))))


@pytest.mark.parametrize("mode", DIVERSIFY_MODES)
def test_split(mode):
    """The base stays exact, copies follow the mode, and the same seed gives the same copies."""
    made, decided = bank(), split(mode)
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    for name in NAMES:
        decided.weights_(name, getattr(made, name).data)
    repeated = bank()
    for name in NAMES:
        split(mode).weights_(name, getattr(repeated, name).data)
    for name in NAMES:
        stacked = getattr(made, name)
        assert torch.equal(stacked, getattr(repeated, name))
        assert torch.equal(stacked[0], before[name][0])
        same = ~decided.replaced(name, stacked.shape)
        if mode != "noise":
            base = stacked[:1].expand_as(stacked)
            assert torch.equal(stacked[same], base[same])
    if mode == "copy":
        assert torch.equal(made.w2[1], made.w2[0])
    else:
        assert not torch.equal(made.w2[1], made.w2[0])
        assert not torch.equal(made.w2[1], made.w2[2])


def test_mask_silences_units_and_keeps_them_trainable():
    """A masked unit adds nothing to the output, yet its output column gets a gradient."""
    made, decided = bank(), split("mask")
    for name in NAMES:
        decided.weights_(name, getattr(made, name).data)
    off = decided.units[1]
    assert off.sum() == H // 2 and decided.units[0].sum() == 0
    x = torch.randn(50, D)
    h = F.relu(x @ made.w1[0].t() + made.b1[0]) * ~off
    active = torch.zeros(50, E, dtype=torch.bool)
    active[:, 1] = True
    y = made(x, RoutingPlan(active.float(), active, active.float(), active.float()))
    assert torch.allclose(y, h @ made.w2[0].t() + made.b2[0], atol=1e-6)
    y.square().sum().backward()
    assert (made.w2.grad[1][:, off].abs().sum(0) > 0).any()


def test_drop_redraws_from_the_base_statistics():
    """Re-initialised units have the base's mean and standard deviation, on both sides."""
    decided = Split("drop", ratio=1.0, noise=0, seed=1, experts=2, hidden=400)
    stacked = torch.randn(2, 400, 50) * 0.3 + 1
    decided.weights_("w1", stacked)
    assert stacked[1].mean().item() == pytest.approx(stacked[0].mean().item(), abs=0.01)
    assert stacked[1].std().item() == pytest.approx(stacked[0].std().item(), rel=0.02)


def test_noise_has_the_asked_scale():
    """W + s std(W) N(0, 1)."""
    decided = Split("noise", ratio=0, noise=0.25, seed=1, experts=2, hidden=400)
    stacked = torch.randn(2, 400, 50) * 0.3
    decided.weights_("w1", stacked)
    change = (stacked[1] - stacked[0]).std() / stacked[0].std()
    assert change.item() == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize("mode", DIVERSIFY_MODES)
def test_moments(mode):
    """Optimizer moments are the base's, zero exactly where weights were replaced."""
    decided = split(mode)
    for name in NAMES:
        stacked = torch.rand_like(getattr(bank(), name)) + 1
        base = stacked[0].clone()
        decided.moments_(name, stacked)
        replaced = decided.replaced(name, stacked.shape)
        want = base[None].expand_as(stacked).masked_fill(replaced, 0)
        assert torch.equal(stacked, want)
