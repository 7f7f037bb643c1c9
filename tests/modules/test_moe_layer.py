"""modules/moe_layer.py: stages, padding, saved state, and losses that reach the gate."""

import pytest
import torch
from layer_kit import PAD, SCHEDULE, B, D, H, L, ids, layer
from torch import nn
from torch.nn import functional as F

from fairseq_evomoe.criterions.routing_metrics import RoutingLossConfig, RoutingLosses
from fairseq_evomoe.kernels.gate.sums import entropy
from fairseq_evomoe.modules import losses
from fairseq_evomoe.modules.plan import TokenBatch
from fairseq_evomoe.modules.records import recording
from fairseq_evomoe.schedule import Stage


def test_stage_is_a_function_of_updates_and_of_the_split():
    """Without a split the stage stays diversify, and after one it is sparsify or later."""
    made = layer()
    stages = []
    for n, has_split in ((0, False), (99, False), (4, True), (12, True), (0, True)):
        made.set_num_updates(n)
        made.set_split(has_split)
        stages.append(made.phase.stage)
    assert stages == [0, 0, 1, 2, 1]


def test_diversify_is_the_dense_layer_to_the_bit():
    """Before the split the output is fc2(relu(fc1(x))) at all positions, padding included."""
    made = layer().train()
    x = torch.randn(L, B, D)
    torch.manual_seed(2)
    fc1, fc2 = nn.Linear(D, H), nn.Linear(H, D)
    y = made(x)
    assert torch.equal(y, fc2(F.relu(fc1(x))))
    y.sum().backward()
    assert made.gate.weight.grad.abs().sum() == 0, "every parameter has a gradient, as DDP requires"
    assert made.experts.w1.grad[1:].abs().sum() == 0


def test_padding_is_neither_routed_nor_counted():
    """Rows of padding come out as 0, and real rows as if the padding were not there."""
    made = layer(n=6, has_split=True).eval()
    lengths = [5, 2, 3]
    tokens = TokenBatch(ids(lengths), PAD)
    x = torch.randn(L, B, D)
    with recording() as log:
        y = made(x, tokens)
    assert log.records[0].tokens == sum(lengths)
    loud = x.clone()
    pads = tokens.ids.t().eq(PAD)
    loud[pads] = 1e4
    assert torch.allclose(made(loud, tokens)[~pads], y[~pads], atol=1e-5)
    assert y[pads].abs().sum() == 0
    assert torch.allclose(made(x)[~pads], y[~pads], atol=1e-5)


def test_all_padding():
    """A batch that is all padding passes, forward and backward."""
    made = layer(n=6, has_split=True).train()
    y = made(torch.randn(L, B, D, requires_grad=True), TokenBatch(ids([0, 0, 0]), PAD))
    y.sum().backward()
    assert y.abs().sum() == 0
    assert all(torch.isfinite(p.grad).all() for p in made.parameters())


def test_state_survives_saving_even_in_half_precision():
    """Stage, temperature and split are saved with the weights and are exact after .half()."""
    saved = layer(n=7, has_split=True).half().state_dict()
    fresh = layer(schedule=None)
    fresh.load_state_dict(saved)
    assert (fresh.phase.stage, fresh.phase.temperature) == (1, SCHEDULE.temperature(7))
    fresh.set_num_updates(10**6)
    assert fresh.phase.stage == Stage.SPARSIFY, "inference keeps the stage of the checkpoint"
    resumed = layer()
    resumed.load_state_dict(saved)
    assert resumed.timeline.has_split and resumed.timeline.num_updates == 7


def test_training_dts_without_a_schedule_is_refused():
    """With a stock task the gate would stay dense for ever, so the error names the task to use."""
    made = layer(schedule=None).train()
    with pytest.raises(ValueError, match="--task translation_evomoe"):
        made(torch.randn(L, B, D))
    made.eval()(torch.randn(L, B, D))
    layer(schedule=None, moe_gate="switch").train()(torch.randn(L, B, D))


def test_seeds_differ_between_layers_and_repeat():
    """Two layers of one model start from different gates, and each layer's gate is reproducible."""
    one, same, other = layer(), layer(), layer(name="decoder.1")
    assert torch.equal(one.gate.weight, same.gate.weight)
    assert torch.equal(one.experts.w1, same.experts.w1)
    assert not torch.equal(one.gate.weight, other.gate.weight)


def routed_loss(made, x, *, scale=1.0):
    """Loss 3 * sum(y^2) + the criterion's routing losses, and its gradients of x and the gate."""
    made.zero_grad()
    cfg = RoutingLossConfig(moe_gate_loss_wt=0.7, moe_z_loss_wt=0.3, moe_entropy_loss_wt=0.2)
    routing = RoutingLosses(cfg)
    x = x.clone().requires_grad_()
    torch.manual_seed(9)
    with recording() as log:
        y = made(x)
    loss, _ = routing.add(3 * y.square().sum(), log, [made], sample_size=10, training=True)
    (loss * scale).backward()
    return loss.detach(), x.grad, made.gate.weight.grad.clone()


def test_routing_losses_reach_gate_and_input():
    """Loss and gradients equal those of the formulas added by hand."""
    made = layer(n=6, has_split=True).train()
    x = torch.randn(L, B, D)
    loss, dx, dw = routed_loss(made, x)

    made.zero_grad()
    hand = x.clone().requires_grad_()
    torch.manual_seed(9)
    y = made(hand)
    torch.manual_seed(9)
    plan = made.gate(hand.view(-1, D), made.phase)
    aux = 0.7 * losses.balance_loss(plan.probs.mean(0), plan.active.sum(0))
    aux = aux + 0.3 * plan.logits.logsumexp(-1).square().mean()
    aux = aux + 0.2 * entropy(plan.probs).mean()
    want = 3 * y.square().sum() + 10 * aux
    want.backward()
    assert torch.allclose(loss, want)
    assert torch.allclose(dx, hand.grad, atol=1e-5)
    assert torch.allclose(dw, made.gate.weight.grad, atol=1e-5)


def test_loss_scaling_and_dummy_batches_act_on_routing_losses():
    """A scaled loss scales their gradients, and a loss times 0 (a dummy batch) removes them."""
    made = layer(n=6, has_split=True).train()
    x = torch.randn(L, B, D)
    _, dx, dw = routed_loss(made, x)
    _, dx8, dw8 = routed_loss(made, x, scale=8.0)
    assert torch.allclose(dw8, 8 * dw, rtol=1e-4) and torch.allclose(dx8, 8 * dx, rtol=1e-4)
    _, dx0, dw0 = routed_loss(made, x, scale=0.0)
    assert dw0.abs().sum() == 0 and dx0.abs().sum() == 0


def test_balance_over_all_workers(monkeypatch):
    """With --moe-balance-all-ranks the loads f_e are those of all workers' pairs together."""
    others = torch.tensor([100.0, 0.0, 0.0, 3.0])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.add_(others))
    x = torch.randn(L, B, D)
    values = {}
    for all_ranks in (True, False):
        made = layer(n=6, has_split=True, moe_balance_all_ranks=all_ranks, dts_noise="none").train()
        with recording() as log:
            made(x)
        (record,) = log.records
        values[all_ranks], load = record.losses[0], record.load
        plan = made.gate(x.view(-1, D), made.phase)
        want = losses.balance_loss(plan.probs.mean(0), load + others * all_ranks)
        assert torch.allclose(values[all_ranks], want)
    assert not torch.allclose(values[True], values[False])


def test_record_counts():
    """The record holds the plan's load and the gate's entropy, and is dropped afterwards."""
    made = layer(n=6, has_split=True).eval()
    x = torch.randn(L, B, D)
    with recording() as log:
        made(x)
    (record,) = log.records
    plan = made.gate(x.view(-1, D), made.phase)
    assert torch.equal(record.load, plan.active.sum(0).float())
    assert torch.allclose(record.entropy, entropy(plan.probs).sum())
    made(x)
    assert log.records == [record], "outside recording() nothing is kept, so memory does not grow"
