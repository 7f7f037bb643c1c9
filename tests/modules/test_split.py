"""modules/split.py: copies differ as the rule says, repeat exactly, and are measured."""

import pytest
import torch
from bank_kit import D, E, H, bank
from torch import nn
from torch.nn import functional as F

from fairseq_evomoe.config import EvolutionConfig
from fairseq_evomoe.kernels.experts.values import Routing
from fairseq_evomoe.modules.experts import ExpertBank
from fairseq_evomoe.modules.split import Split, SplitRule, diversity
from fairseq_evomoe.options import Diversify

NAMES = ("w1", "b1", "w2", "b2")


def split(mode, *, seed=5, of=None, **rule):
    return Split(SplitRule(mode=mode, **{"ratio": 0.5, **rule}), of or bank(), seed=seed)


def wide():
    """Two experts of 400 hidden units, for statistics."""
    own = {"activation": F.relu, "dropout": 0.0, "generator": torch.Generator()}
    return ExpertBank(nn.Linear(50, 400), nn.Linear(400, 50), num_experts=2, **own)


def apply(decided, made):
    for name in NAMES:
        decided.weights_(name, getattr(made, name).data)
    return made


@pytest.mark.parametrize("mode", [m.value for m in Diversify])
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


def test_mask_zeroes_units_and_keeps_them_trainable():
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
    y = made(x, Routing(active.float(), active))
    assert torch.allclose(y, h @ made.w2[0].t() + made.b2[0], atol=1e-6)
    y.square().sum().backward()
    assert (made.w2.grad[1][:, off].abs().sum(0) > 0).any()


def test_drop_redraws_from_the_base_statistics():
    """Re-initialised units have the base's mean and standard deviation, on both sides."""
    decided = split("drop", ratio=1.0, seed=1, of=wide())
    stacked = torch.randn(2, 400, 50) * 0.3 + 1
    decided.weights_("w1", stacked)
    assert stacked[1].mean().item() == pytest.approx(stacked[0].mean().item(), abs=0.01)
    assert stacked[1].std().item() == pytest.approx(stacked[0].std().item(), rel=0.02)


def test_noise_has_the_asked_scale():
    """A noisy copy is W + s std(W) N(0, 1) with the requested s."""
    decided = split("noise", noise=0.25, seed=1, of=wide())
    stacked = torch.randn(2, 400, 50) * 0.3
    decided.weights_("w1", stacked)
    change = (stacked[1] - stacked[0]).std() / stacked[0].std()
    assert change.item() == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize("mode", [m.value for m in Diversify])
def test_moments(mode):
    """Copies get the base's optimizer moments, with zeros exactly where weights were replaced."""
    decided = split(mode)
    for name in NAMES:
        stacked = torch.rand_like(getattr(bank(), name)) + 1
        base = stacked[0].clone()
        decided.moments_(name, stacked)
        replaced = decided.replaced(name, stacked.shape)
        want = base[None].expand_as(stacked).masked_fill(replaced, 0)
        assert torch.equal(stacked, want)


@pytest.mark.parametrize("grain", ["unit", "weight"])
@pytest.mark.parametrize("weights", ["fc1", "fc2", "both"])
@pytest.mark.parametrize("mode", ["mask", "drop"])
def test_which_weights(mode, weights, grain):
    """Only the named matrices change, in whole units or single entries, at the requested ratio."""
    made = bank()
    base = {n: getattr(made, n)[0].clone() for n in NAMES}
    decided = split(mode, weights=weights, grain=grain)
    apply(decided, made)
    for name in NAMES:
        changed = (getattr(made, name)[1:] != base[name]).float()
        side = "fc1" if name.endswith("1") else "fc2"
        acts = weights in (side, "both") and name != "b2" and (name != "b1" or grain == "unit")
        assert changed.mean().item() == pytest.approx(0.5 if acts else 0.0, abs=0.12), name
    units = (made.w1[1] != base["w1"]).float().mean(1)
    if weights != "fc2":
        whole = bool(((units == 0) | (units == 1)).all())
        assert whole == (grain == "unit")


def test_diverse_base():
    """With `keep_base` off expert 0 changes too, and the others are as without it."""
    exact, diverse = apply(split("mask"), bank()), apply(split("mask", keep_base=False), bank())
    assert torch.equal(exact.w2[1:], diverse.w2[1:])
    assert torch.equal(exact.w2[0], bank().w2[0]) and not torch.equal(diverse.w2[0], exact.w2[0])


def test_diversity():
    """Drift and cosines equal their formulas; for copies of one expert they are 0 and 1."""
    x = torch.randn(30, D)
    made = bank()
    before = made.run_base(x)
    same = diversity(apply(split("copy"), made), x, before)
    assert (same.drift, same.weights, same.outputs) == pytest.approx((0, 1, 1), abs=1e-5)
    made = apply(split("drop"), bank())
    found = diversity(made, x, before)
    outs = [F.relu(x @ made.w1[e].t() + made.b1[e]) @ made.w2[e].t() + made.b2[e] for e in range(E)]
    flat = [torch.cat([made.w1[e].flatten(), made.w2[e].flatten()]) for e in range(E)]
    cosine = lambda rows: (
        sum(
            F.cosine_similarity(rows[a].flatten(), rows[b].flatten(), dim=0).item()
            for a in range(E)
            for b in range(a)
        )
        / (E * (E - 1) / 2)
    )
    drift = (sum(outs) / E - before).norm() / before.norm()
    assert found.drift == pytest.approx(drift.item(), rel=1e-4)
    assert found.weights == pytest.approx(cosine(flat), rel=1e-4)
    assert found.outputs == pytest.approx(cosine(outs), rel=1e-4)
    assert "output drift" in str(found)


@pytest.mark.parametrize(
    "change, flag",
    [
        ({"evo_diversify": "magic"}, "--evo-diversify 'magic'"),
        ({"evo_diversify_ratio": 1.5}, "--evo-diversify-ratio"),
        ({"evo_diversify_noise": float("nan")}, "--evo-diversify-noise"),
    ],
    ids=str,
)
def test_bad_flags_name_themselves(change, flag):
    """Each impossible value is refused with the flag's name in the message."""
    cfg = EvolutionConfig()
    for name, value in change.items():
        setattr(cfg, name, value)
    with pytest.raises(ValueError, match=flag):
        SplitRule.from_flags(cfg)
