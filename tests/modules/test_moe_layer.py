"""modules/moe_layer.py: stages, padding, saved state, and losses that reach the gate."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.criterions.routing_metrics import RoutingLossConfig, RoutingLosses
from fairseq_evomoe.kernels.routing_sums import entropy
from fairseq_evomoe.modules import losses
from fairseq_evomoe.modules.moe_layer import EvoMoELayer
from fairseq_evomoe.modules.plan import TokenBatch
from fairseq_evomoe.modules.records import recording
from fairseq_evomoe.schedule import EvolutionSchedule, Stage

L, B, D, H, E = 5, 3, 8, 16, 4
SCHEDULE = EvolutionSchedule(spawn=4, anneal=4, hard=12, start=2.0, end=0.5)
PAD = 1


def layer(schedule=SCHEDULE, n=0, spawned=None, name="encoder.1", **flags):
    torch.manual_seed(2)
    cfg = MoEConfig(moe_freq=1, moe_expert_count=E, **flags)
    made = EvoMoELayer(
        nn.Linear(D, H), nn.Linear(H, D), cfg=cfg, name=name, activation=F.relu, dropout=0.0
    )
    if schedule is not None:
        made.follow(schedule)
    made.set_num_updates(n)
    if spawned is not None:
        made.spawned = spawned
    return made


def ids(lengths):
    """Token ids (B, L) with padding on the left, as fairseq's sources have it."""
    batch = torch.full((len(lengths), L), PAD)
    for row, n in zip(batch, lengths, strict=True):
        row[L - n :] = torch.arange(10, 10 + n)
    return batch


def test_stage_is_a_function_of_updates_and_of_the_split():
    """No stage after diversify without a split; none before sparsify after one."""
    made = layer()
    stages = []
    for n, spawned in ((0, False), (99, False), (4, True), (12, True), (0, True)):
        made.set_num_updates(n)
        made.spawned = spawned
        stages.append(made.clock.stage)
    assert stages == [0, 0, 1, 2, 1]


def test_diversify_is_the_dense_layer_to_the_bit():
    """Before the split: fc2(relu(fc1(x))) on every position, padding too, in training as well."""
    made = layer().train()
    x = torch.randn(L, B, D)
    torch.manual_seed(2)
    fc1, fc2 = nn.Linear(D, H), nn.Linear(H, D)
    y = made(x)
    assert torch.equal(y, fc2(F.relu(fc1(x))))
    y.sum().backward()
    assert made.gate.weight.grad.abs().sum() == 0, "every parameter has a gradient, as DDP demands"
    assert made.experts.w1.grad[1:].abs().sum() == 0


def test_padding_is_neither_routed_nor_counted():
    """Rows of padding come out as 0, and real rows as if the padding were not there."""
    made = layer(n=6, spawned=True).eval()
    lengths = [5, 2, 3]
    made.tokens = TokenBatch(ids(lengths), PAD)
    x = torch.randn(L, B, D)
    with recording(made):
        y = made(x)
        assert made.record.tokens == sum(lengths)
        loud = x.clone()
        pads = made.tokens.ids.t().eq(PAD)
        loud[pads] = 1e4
        assert torch.allclose(made(loud)[~pads], y[~pads], atol=1e-5)
    assert y[pads].abs().sum() == 0
    made.tokens = None
    assert torch.allclose(made(x)[~pads], y[~pads], atol=1e-5)


def test_all_padding():
    """A batch of nothing but padding passes, forward and backward."""
    made = layer(n=6, spawned=True).train()
    made.tokens = TokenBatch(ids([0, 0, 0]), PAD)
    y = made(torch.randn(L, B, D, requires_grad=True))
    y.sum().backward()
    assert y.abs().sum() == 0
    assert all(torch.isfinite(p.grad).all() for p in made.parameters())


def test_state_survives_saving_even_in_half_precision():
    """Stage, temperature and split travel with the weights and are exact after .half()."""
    saved = layer(n=7, spawned=True).half().state_dict()
    fresh = layer(schedule=None)
    fresh.load_state_dict(saved)
    assert (fresh.clock.stage, fresh.clock.temperature) == (1, SCHEDULE.temperature(7))
    fresh.set_num_updates(10**6)
    assert fresh.clock.stage == Stage.SPARSIFY, "inference keeps the stage of the checkpoint"
    resumed = layer()
    resumed.load_state_dict(saved)
    assert resumed.spawned and resumed.num_updates == 7


def test_training_dts_without_a_schedule_is_refused():
    """A stock task would leave the gate dense for ever: the error names the task to use."""
    made = layer(schedule=None).train()
    with pytest.raises(ValueError, match="--task translation_evomoe"):
        made(torch.randn(L, B, D))
    made.eval()(torch.randn(L, B, D))
    layer(schedule=None, moe_gate="switch").train()(torch.randn(L, B, D))


def test_seeds_differ_between_layers_and_repeat():
    """Two layers of one model start from different gates; the same layer always from the same."""
    one, same, other = layer(), layer(), layer(name="decoder.1")
    assert torch.equal(one.gate.weight, same.gate.weight)
    assert torch.equal(one.experts.w1, same.experts.w1)
    assert not torch.equal(one.gate.weight, other.gate.weight)


def routed_loss(made, x, *, through_checkpoint, scale=1.0):
    """Gradients of 3 * sum(y^2) + the routing losses as the criterion adds them."""
    made.zero_grad()
    cfg = RoutingLossConfig(moe_gate_loss_wt=0.7, moe_z_loss_wt=0.3, moe_entropy_loss_wt=0.2)
    routing = RoutingLosses(cfg)
    x = x.clone().requires_grad_()
    torch.manual_seed(9)
    with recording(made) as layers:
        y = checkpoint(made, x, use_reentrant=True) if through_checkpoint else made(x)
        loss, _ = routing.add(3 * y.square().sum(), layers, sample_size=10, training=True)
    (loss * scale).backward()
    return loss.detach(), x.grad, made.gate.weight.grad.clone()


@pytest.mark.parametrize("through_checkpoint", [False, True])
def test_routing_losses_reach_gate_and_input(through_checkpoint):
    """Loss and gradients equal those of the formulas added by hand, also when recomputed."""
    made = layer(n=6, spawned=True).train()
    x = torch.randn(L, B, D)
    loss, dx, dw = routed_loss(made, x, through_checkpoint=through_checkpoint)

    made.zero_grad()
    hand = x.clone().requires_grad_()
    torch.manual_seed(9)
    y = made(hand)
    torch.manual_seed(9)
    plan = made.gate(hand.view(-1, D), made.clock)
    aux = 0.7 * losses.balance_loss(plan.probs.mean(0), plan.active.sum(0))
    aux = aux + 0.3 * plan.logits.logsumexp(-1).square().mean()
    aux = aux + 0.2 * entropy(plan.probs).mean()
    made.port.leaf = None
    want = 3 * y.square().sum() + 10 * aux
    want.backward()
    assert torch.allclose(loss, want)
    assert torch.allclose(dx, hand.grad, atol=1e-5)
    assert torch.allclose(dw, made.gate.weight.grad, atol=1e-5)


@pytest.mark.parametrize("through_checkpoint", [False, True])
def test_loss_scaling_and_dummy_batches_act_on_routing_losses(through_checkpoint):
    """A scaled loss scales their gradients, a loss times 0 removes them (fairseq's dummy batch)."""
    made = layer(n=6, spawned=True).train()
    x = torch.randn(L, B, D)
    _, dx, dw = routed_loss(made, x, through_checkpoint=through_checkpoint)
    _, dx8, dw8 = routed_loss(made, x, through_checkpoint=through_checkpoint, scale=8.0)
    assert torch.allclose(dw8, 8 * dw, rtol=1e-4) and torch.allclose(dx8, 8 * dx, rtol=1e-4)
    _, dx0, dw0 = routed_loss(made, x, through_checkpoint=through_checkpoint, scale=0.0)
    assert dw0.abs().sum() == 0 and dx0.abs().sum() == 0


def test_balance_over_all_workers(monkeypatch):
    """--moe-balance-all-ranks: the shares f_e are those of all workers' pairs together."""
    others = torch.tensor([100.0, 0.0, 0.0, 3.0])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.add_(others))
    x = torch.randn(L, B, D)
    values = {}
    for all_ranks in (True, False):
        made = layer(n=6, spawned=True, moe_balance_all_ranks=all_ranks, dts_noise="none").train()
        with recording(made):
            made(x)
            values[all_ranks], load = made.record.losses[0], made.record.load
        plan = made.gate(x.view(-1, D), made.clock)
        want = losses.balance_loss(plan.probs.mean(0), load + others * all_ranks)
        assert torch.allclose(values[all_ranks], want)
    assert not torch.allclose(values[True], values[False])


def test_record_counts():
    """The record holds the plan's load and the gate's entropy, and is dropped afterwards."""
    made = layer(n=6, spawned=True).eval()
    x = torch.randn(L, B, D)
    with recording(made):
        made(x)
        record = made.record
    plan = made.gate(x.view(-1, D), made.clock)
    assert torch.equal(record.load, plan.active.sum(0).float())
    assert torch.allclose(record.entropy, entropy(plan.probs).sum())
    assert made.record is None and not made.recording
    made(x)
    assert made.record is None, "nothing is kept outside recording(): generation does not grow"
