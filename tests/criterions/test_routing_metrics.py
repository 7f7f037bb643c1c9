"""criterions: routing losses weighted as the flags say, and metrics equal to counts by hand."""

import pytest
import torch
from conftest import build, train, train_args, valid_batch
from fairseq.logging import metrics

from fairseq_evomoe.criterions.rerouted import log_rerouted
from fairseq_evomoe.criterions.routing_metrics import (
    RoutingLossConfig,
    RoutingLosses,
    log_routing,
)
from fairseq_evomoe.modules.moe_layer import moe_layers

KEYS = {
    *("moe_stage", "moe_temperature", "moe_active_experts", "moe_gate_loss", "moe_z_loss"),
    *("moe_gate_entropy", "moe_load_max_mean", "moe_dead_experts"),
}


def batch_of(toy, *extra):
    cfg, task, model = build(toy, "--evo-spawn-update", 0, *extra)
    return task.build_criterion(cfg.criterion), model, valid_batch(task)


@pytest.mark.parametrize("method", ["sum", "average"])
def test_training_adds_weighted_losses_and_validation_does_not(toy, method):
    """Training loss is task + sample_size * w * combined balance; validation loss is task alone."""
    flags = ("--moe-gate-loss-wt", 0.5, "--moe-gate-loss-combine-method", method)
    criterion, model, batch = batch_of(toy, *flags, "--dts-noise", "none")
    model.train()
    loss, sample_size, log = criterion(model, batch)
    balance = log["moe_losses"][0] / sample_size * (2 if method == "sum" else 1)
    assert loss.item() == pytest.approx(
        (log["loss"] + 0.5 * sample_size * balance).item(), rel=1e-6
    )
    model.eval()
    loss, _, log = criterion(model, batch)
    assert loss.item() == log["loss"].item() and "moe_load" in log


@pytest.mark.parametrize("name", ["moe_label_smoothed_cross_entropy", "moe_cross_entropy"])
def test_both_criterions_train(toy, tmp_path, name):
    """Each runs under fairseq-train and logs every routing metric."""
    args = train_args(toy, tmp_path, "--max-update", 4, "--evo-spawn-update", 1)
    args[args.index("--criterion") + 1] = name
    if "smoothed" not in name:
        at = args.index("--label-smoothing")
        del args[at : at + 2]
    rows = train(*args)
    assert set(rows[-1]) >= KEYS
    assert {k for k in rows[-1] if k.startswith("moe_load/")} == {
        f"moe_load/{side}.1/e{e}" for side in ("encoder", "decoder") for e in range(4)
    }


def test_metrics_equal_counts_made_by_hand():
    """For two micro-batches of two layers, metrics are those of the summed counts."""
    logs = [
        {
            "moe_losses": torch.tensor([1.5, 4.0, 1.0, 0.5]) * 10,
            "moe_sample_size": 10,
            "moe_tokens": torch.tensor([8.0, 6.0]),
            "moe_load": torch.tensor([[8.0, 0, 0, 0], [2.0, 2, 2, 0]]),
            "moe_entropy": torch.tensor([4.0, 3.0]),
            "moe_dropped": torch.tensor([2.0, 0.0]),
            "moe_batches": 1,
            "moe_stage": 1.0,
            "moe_temperature": 0.5,
            "moe_layer_batches": 1,
            "moe_layer_ids": torch.tensor([1, 1003]),
        },
        {
            "moe_losses": torch.tensor([1.0, 2.0, 1.0, 0.5]) * 30,
            "moe_sample_size": 30,
            "moe_tokens": torch.tensor([2.0, 4.0]),
            "moe_load": torch.tensor([[0.0, 2, 0, 0], [0.0, 2, 0, 2]]),
            "moe_entropy": torch.tensor([1.0, 2.0]),
            "moe_dropped": torch.tensor([0.0, 0.0]),
            "moe_batches": 1,
            "moe_stage": 1.0,
            "moe_temperature": 0.5,
            "moe_layer_batches": 1,
            "moe_layer_ids": torch.tensor([1, 1003]),
        },
    ]
    with metrics.aggregate() as seen:
        log_routing(logs)
    got = seen.get_smoothed_values()
    assert got["moe_active_experts"] == pytest.approx(18 / 20)
    assert got["moe_gate_loss"] == pytest.approx(1.125)
    assert got["moe_z_loss"] == pytest.approx(2.5)
    assert got["moe_gate_entropy"] == 0.5 and got["moe_distill_loss"] == pytest.approx(0.5)
    assert got["moe_overflow"] == pytest.approx(2 / 20)
    assert got["moe_load_max_mean"] == pytest.approx(0.8 * 4)
    assert got["moe_dead_experts"] == 2 / 8
    assert got["moe_load/encoder.1/e0"] == 0.8 and got["moe_load/decoder.3/e1"] == 0.4
    assert (got["moe_stage"], got["moe_temperature"]) == (1, 0.5)


def test_active_experts_and_load_match_the_layers(toy):
    """The logged counts equal what the layers routed, and cover real tokens only."""
    criterion, model, batch = batch_of(toy)
    model.eval()
    seen = {}
    for name, layer in moe_layers(model):
        layer.gate.register_forward_hook(
            lambda m, args, plan, name=name: seen.__setitem__(name, plan.active)
        )
    _, _, log = criterion(model, batch)
    active = list(seen.values())
    source = batch["net_input"]["src_tokens"].ne(1).sum()
    assert log["moe_tokens"].tolist() == [source, batch["ntokens"]]
    for row, mask in zip(log["moe_load"], active, strict=True):
        assert torch.equal(row, mask.sum(0).float())


def test_rerouted_tokens_are_counted_from_one_validation_to_the_next(toy):
    """Equal weights reroute nobody; after the gate's experts change places, everybody is."""
    criterion, model, batch = batch_of(toy, "--dts-noise", "none")
    model.eval()
    first = criterion(model, batch)[2]
    assert not first["moe_compared"] and not first["moe_changed"]
    (_, layer), _ = list(moe_layers(model))
    same = criterion(model, batch)[2]
    tokens = float(sum(same["moe_tokens"]))
    assert float(same["moe_compared"]) == tokens and not same["moe_changed"]
    with torch.no_grad():
        for p in layer.gate.parameters():
            if p.size(0) == layer.cfg.moe_expert_count:
                p.copy_(p.roll(1, 0))
    changed = criterion(model, batch)[2]
    assert float(changed["moe_compared"]) == tokens
    assert float(changed["moe_changed"]) >= float(same["moe_tokens"][0])
    with metrics.aggregate() as seen:
        log_rerouted([changed, same])
    share = float(changed["moe_changed"]) / (2 * tokens)
    assert seen.get_smoothed_values()["moe_rerouted"] == pytest.approx(share, abs=1e-4)
    model.train()
    assert "moe_compared" not in criterion(model, batch)[2]


def test_update_freq_sees_the_same_tokens(toy, tmp_path):
    """With two micro-batches per update, the metrics cover the tokens of both."""
    common = ("--max-update", 3, "--evo-spawn-update", 0, "--batch-size", 8, "--max-tokens", 9999)
    rows = train(*train_args(toy, tmp_path, *common, "--update-freq", 2))
    assert all(r["moe_active_experts"] >= 1 for r in rows) and rows[0]["bsz"] == 16


@pytest.mark.parametrize(
    "change, flag",
    [
        ({"moe_gate_loss_wt": -1.0}, "--moe-gate-loss-wt"),
        ({"moe_z_loss_wt": float("nan")}, "--moe-z-loss-wt"),
        ({"moe_entropy_loss_wt": -0.1}, "--moe-entropy-loss-wt"),
        ({"moe_gate_loss_combine_method": "max"}, "--moe-gate-loss-combine-method"),
    ],
    ids=str,
)
def test_bad_flags_name_themselves(change, flag):
    """Each impossible value is refused with the flag's name in the message."""
    with pytest.raises(ValueError, match=flag):
        RoutingLosses(RoutingLossConfig(**change))
