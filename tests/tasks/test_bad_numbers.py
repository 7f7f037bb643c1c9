"""NaN and infinity in inputs, gates and gradients skip the batch or end the run; weights stay."""

import math

import pytest
import torch
from conftest import build
from fairseq.trainer import Trainer

from fairseq_evomoe.modules.moe_layer import moe_layers

FP16 = ("--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", 4)
LAYOUTS = {
    "fp32": (),
    "bf16": ("--bf16",),
    "fp16": FP16,
    "memory-efficient-fp16": ("--fp16", "--memory-efficient-fp16", "--fp16-init-scale", 4),
}
SKIPS = ("fp16", "memory-efficient-fp16")
"""Layouts with a loss scale, in which fairseq skips a bad batch. In the others it ends the run."""


def started(toy, *flags, save_dir=None):
    """(trainer, batches) of a toy run."""
    cfg, task, model = build(toy, "--dropout", 0, "--clip-norm", 0.1, *flags)
    cfg.checkpoint.save_dir = str(save_dir)
    trainer = Trainer(cfg, task, model, task.build_criterion(cfg.criterion))
    task.load_dataset("train")
    batches = trainer.get_train_iterator(epoch=1, load_dataset=False).next_epoch_itr(shuffle=False)
    trainer.begin_epoch(1)
    return trainer, batches


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.get_model().named_parameters()}


def poison(layer, where, value):
    """Replace the layer's input, its gate's input or a gradient by `value`; return the hook."""
    if where == "input":
        hook = lambda module, args: (torch.full_like(args[0], value), *args[1:])
        return layer.register_forward_pre_hook(hook)
    if where == "gate":
        hook = lambda module, args: (torch.full_like(args[0], value), *args[1:])
        return layer.gate.register_forward_pre_hook(hook)
    return next(layer.experts.parameters()).register_hook(lambda g: torch.full_like(g, value))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["input", "gate", "gradient"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bad_numbers_poison_nothing(toy, tmp_path, layout, where, value, caplog):
    """A bad batch changes no weight and counts for no update.

    With a loss scale the next batch trains as usual; otherwise fairseq ends the run and names the
    module.
    """
    flags = ("--evo-spawn-update", 0, "--dts-anneal-updates", 4, *LAYOUTS[layout])
    trainer, batches = started(toy, *flags, save_dir=tmp_path)
    trainer.train_step([next(batches)])
    before = weights(trainer)
    (_, layer), *_ = moe_layers(trainer.get_model())
    hook = poison(layer, where, value)
    if layout in SKIPS:
        scale = trainer.optimizer.scaler.loss_scale
        assert trainer.train_step([next(batches)]) is None
        assert trainer.optimizer.scaler.loss_scale < scale
    else:
        with pytest.raises(FloatingPointError), caplog.at_level("WARNING"):
            trainer.train_step([next(batches)])
        assert where == "gradient" or "detected in output of encoder.layers.1.moe" in caplog.text
    hook.remove()
    assert trainer.get_num_updates() == 1
    assert all(torch.equal(p, before[n]) for n, p in trainer.get_model().named_parameters())
    if layout not in SKIPS:
        return
    trainer.train_step([next(batches)])
    after = weights(trainer)
    assert trainer.get_num_updates() == 2
    assert all(p.isfinite().all() for p in after.values())
    assert any(not torch.equal(p, before[n]) for n, p in after.items() if "experts" in n)


@pytest.mark.parametrize("layout", SKIPS)
def test_overflow_at_the_split(toy, tmp_path, layout):
    """If the update of the split overflows, the experts split once and the run continues."""
    flags = ("--evo-spawn-update", 2, "--dts-anneal-updates", 4, *LAYOUTS[layout])
    trainer, batches = started(toy, *flags, save_dir=tmp_path)
    for _ in range(2):
        trainer.train_step([next(batches)])
    (_, layer), *_ = moe_layers(trainer.get_model())
    base = layer.experts.w2[0].detach().clone()
    hook = poison(layer, "gradient", math.inf)
    assert trainer.train_step([next(batches)]) is None
    hook.remove()
    assert layer.timeline.has_split and trainer.get_num_updates() == 2
    split = layer.experts.w2.detach().clone()
    assert torch.equal(split[0], base) and not torch.equal(split[1], base)
    trainer.train_step([next(batches)])
    assert trainer.get_num_updates() == 3
    assert layer.experts.w2.isfinite().all() and not torch.equal(layer.experts.w2, split)
    assert (layer.experts.w2 - split).abs().max() < 0.1, "a second split would draw units anew"


def test_a_skipped_batch_moves_no_bias(toy, tmp_path, monkeypatch):
    """--moe-balance-bias counts the load of completed updates, not of skipped ones."""
    flags = ("--moe-gate", "topk", "--moe-balance-bias", 0.1, *FP16)
    trainer, batches = started(toy, *flags, save_dir=tmp_path)
    (_, layer), *_ = moe_layers(trainer.get_model())
    hook = poison(layer, "gradient", math.inf)
    skipped = next(batches)
    trainer.train_step([skipped])
    hook.remove()
    seen = []
    original = layer.gate.after_update
    monkeypatch.setattr(
        layer.gate,
        "after_update",
        lambda phase, load: (seen.append(int(load().sum())), original(phase, load))[1],
    )
    made = next(batches)
    trainer.train_step([made])
    pairs = layer.cfg.moe_top_k * made["net_input"]["src_tokens"].ne(1).sum()
    assert seen == [int(pairs)]


def test_an_average_starts_with_its_expert(toy, tmp_path):
    """With --store-ema the copies' averages start at the split, from the copies themselves."""
    flags = ("--evo-spawn-update", 2, "--dts-anneal-updates", 4)
    ema = ("--store-ema", "--ema-decay", 0.9, "--ema-fp32")
    trainer, batches = started(toy, *flags, *ema, save_dir=tmp_path)
    for _ in range(3):
        trainer.train_step([next(batches)])
    (name, layer), *_ = moe_layers(trainer.get_model())
    for average in (
        dict(moe_layers(trainer.ema.get_model()))[name].experts.w1,
        trainer.ema.fp32_params[f"{name}.experts.w1"],
    ):
        assert torch.equal(average[1:], layer.experts.w1[1:])
        assert not torch.equal(average[0], layer.experts.w1[0])
