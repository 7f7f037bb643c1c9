"""modules/gates: each rule against a loop over tokens and experts, and what training changes."""

import pytest
import torch
from gate_kit import HARD, SOFT, D, E, batch, gate, softmax

from fairseq_evomoe.kernels.gate.rule import top_k_mask
from fairseq_evomoe.modules.gates import GATES
from fairseq_evomoe.modules.losses import official_balance_loss
from fairseq_evomoe.modules.plan import Phase, TokenBatch


def dts_row(z, noise, tau, stage, *, c, combine="renorm", cap=0, k=1):
    """The E combine weights of one token by the rule of the DTS gate, in plain Python."""
    p = softmax([(a + g) / tau for a, g in zip(z, noise, strict=True)])
    ranked = sorted(range(len(p)), key=lambda e: (-p[e], e))
    if stage == HARD:
        chosen = set(ranked[:k])
    else:
        chosen = {e for e in range(len(p)) if p[e] >= c} | {ranked[0]}
        if cap:
            chosen &= set(ranked[:cap])
    clean = softmax(z)
    if combine in ("renorm", "straight"):
        total = sum(p[e] for e in chosen)
        return [p[e] / total if e in chosen else 0.0 for e in range(len(p))]
    values = p if combine == "raw" else clean
    return [values[e] if e in chosen else 0.0 for e in range(len(p))]


@pytest.mark.parametrize("stage", [SOFT, HARD])
@pytest.mark.parametrize("combine", ["renorm", "straight", "raw", "softmax"])
@pytest.mark.parametrize("cap, k", [(None, 1), (2, 1), (3, 2)])
def test_dense_to_sparse(stage, combine, cap, k):
    """Weights equal the rule written out per token, without noise (evaluation)."""
    made = gate("dts", dts_combine=combine, dts_max_experts=cap, dts_top_k=k)
    plan = made(torch.randn(20, D), Phase(stage=stage, temperature=0.7))
    for z, weights, active in zip(plan.logits, plan.weights, plan.active, strict=True):
        want = dts_row(z.tolist(), [0] * E, 0.7, stage, c=0.2 / E, combine=combine, cap=cap, k=k)
        assert weights.tolist() == pytest.approx(want, abs=1e-6)
        assert active.tolist() == [w > 0 for w in want]


@pytest.mark.parametrize("stage", [SOFT, HARD])
@pytest.mark.parametrize("combine", ["raw", "softmax"])
def test_parity_with_the_official_code(stage, combine):
    """In training, --dts-parity selects noisy p >= 0.001 or the argmax, without renormalisation."""
    made = gate("dts", training=True, dts_parity=True, dts_combine=combine)
    x = torch.randn(30, D)
    torch.manual_seed(11)
    plan = made(x, Phase(stage=stage, temperature=0.5))
    torch.manual_seed(11)
    noise = -torch.empty(30, E).exponential_().log()
    rows = []
    for z, g, weights in zip(plan.logits, noise, plan.weights, strict=True):
        want = dts_row(z.tolist(), g.tolist(), 0.5, stage, c=0.001, combine=combine)
        assert weights.tolist() == pytest.approx(want, abs=1e-6)
        rows.append(want)
    # balance: E^2 times the mean over experts of (mean weight) x (mean number of selections)
    loss = 0.0
    for e in range(E):
        me = sum(w[e] for w in rows) / 30
        ce = sum(w[e] > 0 for w in rows) / 30
        loss += E * E * me * ce / E
    assert made.balance_loss(plan, made.expert_load(plan)).item() == pytest.approx(loss, rel=1e-5)


def test_official_balance_loss_is_blind_while_dense():
    """With every expert active the official loss is E with gradient 0, so that it cannot balance;
    ours counts shares of pairs instead."""
    logits = torch.randn(12, E, requires_grad=True)
    probs = logits.softmax(-1)
    loss = official_balance_loss(probs, torch.ones_like(probs, dtype=torch.bool))
    loss.backward()
    assert loss.item() == pytest.approx(E) and logits.grad.abs().max() < 1e-6


def test_parity_evaluates_top_1_of_the_clean_softmax():
    """The official code evaluates with top-1 in every stage; ours does only under the flag."""
    made = gate("dts", dts_parity=True, dts_combine="raw", dts_noise="gumbel")
    plan = made(torch.randn(9, D), Phase(stage=SOFT, temperature=2.0))
    assert plan.active.sum(1).tolist() == [1] * 9
    assert torch.allclose(plan.weights.sum(1), plan.probs.max(1).values)


def test_full_noise_is_gumbel_and_only_while_training():
    """In training each expert is the argmax with its softmax probability (Gumbel-max); evaluation
    has no noise."""
    made = gate("dts", training=True, dts_threshold=0.0, dts_noise="gumbel")
    x = torch.randn(1, D).expand(20000, D)
    plan = made(x, Phase(stage=HARD, temperature=0.3))
    share = plan.active.float().mean(0)
    assert torch.allclose(share, plan.probs[0], atol=0.015)
    made.eval()
    a, b = (
        made(x[:5], Phase(stage=SOFT, temperature=1.0)),
        made(x[:5], Phase(stage=SOFT, temperature=1.0)),
    )
    assert torch.equal(a.weights, b.weights)


def test_annealed_noise_ends_in_mask_side():
    """With --dts-noise annealed, training at the end of annealing routes as evaluation does."""
    made = gate("dts", training=True, dts_noise="annealed")
    x = torch.randn(12, D)
    cold = made(x, Phase(stage=SOFT, temperature=0.5, anneal_left=0.0))
    assert not torch.equal(
        made(x, Phase(stage=SOFT, temperature=0.5, anneal_left=1.0)).weights, cold.weights
    )
    assert torch.equal(made.eval()(x, Phase(stage=SOFT, temperature=0.5)).weights, cold.weights)


def test_active_experts_fall_with_the_temperature():
    """A token has all experts active at a high temperature, few at a low one, and never none."""
    made = gate("dts")
    x = torch.randn(200, D)
    counts = [
        made(x, Phase(stage=SOFT, temperature=t)).active.sum(1).float()
        for t in (50.0, 2.0, 0.5, 0.05)
    ]
    means = [c.mean().item() for c in counts]
    assert means[0] == E and means == sorted(means, reverse=True) and means[-1] < 1.5
    assert all(c.min() >= 1 for c in counts)


def test_a_lone_expert_weighs_one():
    """With one expert left, renorm has its true gradient, 0, and straight has that of p / const."""
    x = torch.randn(5, D)
    for combine in ("renorm", "straight"):
        made = gate("dts", training=True, dts_noise="none", dts_combine=combine)
        plan = made(x, Phase(stage=HARD, temperature=1.0))
        assert torch.allclose(plan.weights.sum(1), torch.ones(5))
        plan.weights.sum().backward()
        assert (made.weight.grad.abs().sum() > 1e-3) == (combine == "straight")


def test_renormalised_weights_have_their_true_gradient():
    """The soft stage passes gradcheck in float64, away from changes of the active set."""
    made = gate("dts", training=True, dts_noise="none")
    z = torch.randn(4, E, dtype=torch.float64, requires_grad=True)
    route = lambda z: made.route(z, Phase(stage=SOFT, temperature=0.7), None).weights
    assert torch.autograd.gradcheck(route, (z,))


def test_switch():
    """The switch gate selects the top-1 expert with weight p."""
    plan = gate("switch")(torch.randn(15, D), Phase(stage=SOFT, temperature=1.0))
    for z, weights in zip(plan.logits, plan.weights, strict=True):
        p = softmax(z.tolist())
        assert weights.tolist() == pytest.approx([v if v == max(p) else 0.0 for v in p], abs=1e-6)


@pytest.mark.parametrize("k", [1, 2, E])
def test_top_k(k):
    """The k largest are active; weights are the softmax over them, or p itself for k = 1."""
    plan = gate("topk", moe_top_k=k)(torch.randn(15, D), Phase(stage=SOFT, temperature=1.0))
    for z, weights in zip(plan.logits, plan.weights, strict=True):
        p = softmax(z.tolist())
        chosen = sorted(range(E), key=lambda e: -p[e])[:k]
        total = sum(p[e] for e in chosen) if k > 1 else 1.0
        want = [p[e] / total if e in chosen else 0.0 for e in range(E)]
        assert weights.tolist() == pytest.approx(want, abs=1e-6)


def test_dense():
    """The dense gate activates all experts, and the weights are the softmax."""
    plan = gate("dense")(torch.randn(4, D), Phase(stage=SOFT, temperature=1.0))
    assert plan.active.all() and torch.equal(plan.weights, plan.probs)


@pytest.mark.parametrize("name", sorted(GATES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_inside_half_precision_outside(name, dtype):
    """Half-precision states and weights still give float32 probabilities that sum to 1."""
    made = gate(name, training=True).to(dtype)
    x = torch.randn(10, D, dtype=dtype)
    for context in (torch.autocast("cpu", enabled=False), torch.autocast("cpu", torch.bfloat16)):
        with context:
            plan = made(x, Phase(stage=SOFT, temperature=1.0), batch(2, 5))
        assert plan.logits.dtype == plan.weights.dtype == torch.float32
        assert torch.allclose(plan.probs.sum(1), torch.ones(10), atol=1e-6)


@pytest.mark.parametrize("name", sorted(GATES))
def test_a_token_routes_alone(name):
    """In evaluation a token's plan does not depend on other sentences or their order."""
    made = gate(name)
    x, tokens = torch.randn(12, D), batch(12, 1)
    together = made(x, Phase(stage=SOFT, temperature=0.6), tokens)
    order = torch.randperm(12)
    shuffled = made(x[order], Phase(stage=SOFT, temperature=0.6), TokenBatch(tokens.ids[order], 99))
    assert torch.equal(shuffled.active, together.active[order])
    assert torch.allclose(shuffled.weights, together.weights[order], atol=1e-6)
    alone = made(x[3:4], Phase(stage=SOFT, temperature=0.6), TokenBatch(tokens.ids[3:4], 99))
    assert torch.allclose(alone.weights[0], together.weights[3], atol=1e-6)


@pytest.mark.parametrize("name", sorted(GATES))
def test_no_tokens(name):
    """A worker whose batch is all padding routes nothing and does not fail."""
    flags = {"moe_capacity_factor": 1.0} if name in ("switch", "gshard") else {}
    made = gate(name, training=True, **flags)
    plan = made(torch.randn(0, D), Phase(stage=SOFT, temperature=1.0), batch(0, 1))
    assert plan.weights.shape == plan.active.shape == (0, E)
    assert torch.isfinite(made.balance_loss(plan, made.expert_load(plan)))


def test_ties_go_to_the_lower_index():
    """Equal scores are broken the same way on every machine."""
    assert top_k_mask(torch.zeros(2, 4), 2).tolist() == [[True, True, False, False]] * 2
