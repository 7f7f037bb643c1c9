"""tasks/evolution.py: the split in every optimizer layout, and runs that resume exactly."""

import pytest
import torch
from conftest import build, train, train_args, valid_batch
from fairseq import optim
from fairseq.optim.fp16_optimizer import FP16Optimizer, MemoryEfficientFP16Optimizer
from fairseq.trainer import Trainer

from fairseq_evomoe.modules.moe_layer import moe_layers
from fairseq_evomoe.modules.split import SplitRule
from fairseq_evomoe.tasks.optimizer_views import OptimizerViews
from fairseq_evomoe.tasks.splitting import split_when_due

NAMES = ("w1", "b1", "w2", "b2")


def optimizer_for(kind, cfg, model, monkeypatch):
    """A fairseq Adam over the model in one of fairseq's four layouts."""
    params = [p for p in model.parameters() if p.requires_grad]
    if kind == "fp32":
        return optim.build_optimizer(cfg.optimizer, params)
    if kind == "memory-efficient-bf16":
        model.bfloat16()
        cfg.common.bf16 = True
        return MemoryEfficientFP16Optimizer.build_optimizer(cfg, params)
    if kind == "bf16":
        model.bfloat16()
        cfg.common.bf16 = True
        return FP16Optimizer.build_optimizer(cfg, params)
    model.half()
    cfg.common.fp16 = True
    # fairseq asks CUDA for its device's number only to name the flat tensor
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    return FP16Optimizer.build_optimizer(cfg, params)


def step(optimizer, model):
    """One update with random gradients of known seed, so that the moments are not zero."""
    generator = torch.Generator().manual_seed(8)
    optimizer.zero_grad()
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p) * 0.01
    if hasattr(optimizer, "_needs_sync"):
        optimizer._needs_sync = True
    optimizer.step()


@pytest.mark.parametrize("kind", ["fp32", "fp16-flat", "bf16", "memory-efficient-bf16"])
@pytest.mark.parametrize("mode", ["drop", "mask", "noise", "copy"])
def test_split_writes_weights_masters_and_moments(toy, kind, mode, monkeypatch):
    """After the split, masters equal the weights, and moments are the base's or 0."""
    cfg, task, model = build(toy, "--evo-spawn-update", 5, "--evo-diversify", mode)
    optimizer = optimizer_for(kind, cfg, model, monkeypatch)
    step(optimizer, model)
    (_, layer), *_ = moe_layers(model)
    views = OptimizerViews(optimizer)
    base = {n: p.detach()[0].clone() for n, p in layer.experts.named_parameters()}
    moments = {
        n: [m[0].clone() for m in views.moments(p)] for n, p in layer.experts.named_parameters()
    }
    others = {n: p.detach().clone() for n, p in model.named_parameters() if "experts" not in n}

    split_when_due(model, optimizer, task.flags, 4)
    assert not layer.timeline.has_split, "it is too early to split"
    split_when_due(model, optimizer, task.flags, 5)
    assert layer.timeline.has_split

    decided = layer.split(SplitRule(mode=mode), seed=7)
    for name, parameter in layer.experts.named_parameters():
        master = views.master(parameter)
        assert master.shape == parameter.shape
        assert torch.equal(master.to(parameter.dtype), parameter)
        assert torch.equal(parameter[0], base[name])
        found = list(views.moments(parameter))
        assert len(found) == len(moments[name]) == 2
        replaced = decided.replaced(name, parameter.shape)
        for moment, old in zip(found, moments[name], strict=True):
            assert old.abs().sum() > 0
            want = old[None].expand_as(moment).masked_fill(replaced, 0)
            assert torch.equal(moment, want)
    for n, p in model.named_parameters():
        assert n not in others or torch.equal(p, others[n]), f"{n} must not change"

    again = {n: p.detach().clone() for n, p in layer.experts.named_parameters()}
    split_when_due(model, optimizer, task.flags, 6)
    assert all(torch.equal(p, again[n]) for n, p in layer.experts.named_parameters()), "only once"

    step(optimizer, model)
    for _, parameter in layer.experts.named_parameters():
        assert torch.equal(views.master(parameter).to(parameter.dtype), parameter)


def test_copy_split_leaves_the_output_unchanged(toy):
    """With identical copies and weights that sum to 1, the output is that of before the split."""
    _, task, model = build(toy, "--evo-spawn-update", 5, "--evo-diversify", "copy")
    batch = valid_batch(task)
    model.eval()
    before = model(**batch["net_input"])[0]
    optimizer = optim.build_optimizer(
        build(toy)[0].optimizer, [p for p in model.parameters() if p.requires_grad]
    )
    split_when_due(model, optimizer, task.flags, 5)
    model.set_num_updates(5)
    stages = {layer.phase.stage for _, layer in moe_layers(model)}
    assert stages == {1}
    real = batch["target"].ne(task.target_dictionary.pad())
    after = model(**batch["net_input"])[0]
    assert torch.allclose(after[real], before[real], atol=1e-5)


def test_diversify_equals_the_dense_model(toy, tmp_path):
    """Until the split, losses and gradient norms are the dense model's to the last digit."""
    common = ("--max-update", 8, "--dropout", 0.1, "--dts-anneal-updates", 5)
    evolving = train(*train_args(toy, tmp_path / "a", *common, "--evo-spawn-update", 7))
    dense = train(
        *train_args(toy, tmp_path / "b", *common, "--moe-freq", 0, "--evo-spawn-update", 7)
    )
    keys = ("loss", "nll_loss", "gnorm")
    assert len(dense) == 8
    for a, b in zip(evolving[:7], dense[:7], strict=True):
        assert [a[k] for k in keys] == [b[k] for k in keys]
    assert evolving[7]["moe_stage"] == 1


def test_diversify_loss_equals_the_dense_loss_to_the_bit(toy):
    """With the same seed and batch, the loss tensors are equal and not merely close."""
    losses = []
    for extra in (("--evo-spawn-update", 20), ("--evo-spawn-update", 20, "--moe-freq", 0)):
        cfg, task, model = build(toy, "--dropout", 0.2, *extra)
        batch = valid_batch(task)
        criterion = task.build_criterion(cfg.criterion)
        model.train()
        torch.manual_seed(3)
        losses.append(criterion(model, batch)[0])
    assert torch.equal(*losses)


STAGES = ("--evo-spawn-update", 6, "--dts-anneal-updates", 6, "--dts-hard-update", 14)


CURVE = (*STAGES, "--max-update", 20, "--dropout", 0.1, "--update-freq", 2)


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """An uninterrupted run through all stages, and its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(*train_args(toy, folder, *CURVE, "--save-interval-updates", 1))


@pytest.mark.parametrize("stop", [4, 6, 10, 17], ids=["diversify", "split", "sparsify", "hard"])
def test_resume_gives_the_same_curve(toy, tmp_path, whole, stop):
    """A run that is resumed in any of the stages logs the same lines as an uninterrupted one."""
    folder, rows = whole
    (saved,) = folder.glob(f"checkpoint_*_{stop}.pt")
    resumed = train(*train_args(toy, tmp_path, *CURVE, "--restore-file", saved))
    assert [r["num_updates"] for r in resumed] == list(range(stop + 1, 21))
    keys = [k for k in rows[-1] if k.startswith(("loss", "nll", "moe", "gnorm"))]
    assert "moe_active_experts" in keys
    for a, b in zip(rows[stop:], resumed, strict=True):
        assert {k: a.get(k) for k in keys} == {k: b.get(k) for k in keys}


MEMORIES = {
    "stable": ("--moe-gate", "stable", "--stable-freeze-update", 6),
    "bias": ("--moe-gate", "switch", "--moe-balance-bias", 0.05),
    "gshard": ("--moe-gate", "gshard", "--moe-capacity-factor", 1.0),
    "base": ("--moe-gate", "base"),
    "shared": (*STAGES, "--moe-shared-expert", "--evo-diversify", "drop"),
}


@pytest.mark.parametrize("gate", MEMORIES)
def test_resume_of_every_kind_of_gate(toy, tmp_path, gate):
    """A resumed run has the same curve: a gate's state is saved, and its draws follow the seed."""
    flags = (*MEMORIES[gate], "--max-update", 12, "--dropout", 0.1)
    rows = train(*train_args(toy, tmp_path / "a", *flags, "--save-interval-updates", 7))
    (saved,) = (tmp_path / "a").glob("checkpoint_*_7.pt")
    resumed = train(*train_args(toy, tmp_path / "b", *flags, "--restore-file", saved))
    keys = [k for k in rows[-1] if k.startswith(("loss", "nll", "moe", "gnorm"))]
    assert len(resumed) == 5
    for a, b in zip(rows[7:], resumed, strict=True):
        assert {k: a.get(k) for k in keys} == {k: b.get(k) for k in keys}


@pytest.mark.parametrize("mode", ["mask", "drop", "noise"])
def test_every_worker_splits_alike(toy, mode):
    """The split depends on seed, layer and expert alone, not on the state of a random stream."""
    flags = ("--evo-spawn-update", 5, "--evo-diversify", mode)
    banks = []
    for noise in (3, 4):
        cfg, task, model = build(toy, *flags)
        optimizer = optimizer_for("fp32", cfg, model, None)
        torch.manual_seed(noise), torch.rand(noise)
        split_when_due(model, optimizer, task.flags, 5, valid_batch(task))
        banks.append([dict(layer.experts.named_parameters()) for _, layer in moe_layers(model)])
    for one, two in zip(*banks, strict=True):
        assert all(torch.equal(one[n], two[n]) for n in NAMES)
    first, second = banks[0]
    changed = [bank["w2"][1] != bank["w2"][0] for bank in (first, second)]
    assert not torch.equal(*changed) or mode == "noise", "layers differ"


def test_the_split_is_measured_and_logged(toy, caplog):
    """The split logs each layer's drift and cosines, and leaves the random stream untouched."""
    cfg, task, model = build(toy, "--evo-spawn-update", 5, "--evo-diversify-ratio", 0.5)
    optimizer = optimizer_for("fp32", cfg, model, None)
    model.train()
    before = torch.random.get_rng_state()
    with caplog.at_level("INFO"):
        split_when_due(model, optimizer, task.flags, 5, valid_batch(task))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training and all(m.training for m in model.modules())
    lines = [r.getMessage() for r in caplog.records if "output drift" in r.getMessage()]
    assert len(lines) == 2 and "update 5: split encoder.layers.1.moe_layer" in lines[0]
    drift = float(lines[0].split("output drift ")[1].split(",")[0])
    assert 0.05 < drift < 1


def test_stages_pass_in_one_run(toy, tmp_path):
    """Logged stage, temperature and active experts follow the schedule through all three stages."""
    rows = train(*train_args(toy, tmp_path, *STAGES, "--max-update", 18))
    assert [r["moe_stage"] for r in rows] == [0] * 6 + [1] * 8 + [2] * 4
    assert rows[6]["moe_temperature"] == 2 and rows[13]["moe_temperature"] == 0.3
    assert rows[6]["moe_active_experts"] >= 0.95 * 4
    assert [r["moe_active_experts"] for r in rows[14:]] == [1] * 4


def test_validation_belongs_to_the_finished_update(toy):
    """After update n the layers' counter is n, as it will be in validation and the checkpoint."""
    cfg, task, model = build(toy, *STAGES)
    trainer = Trainer(cfg, task, model, task.build_criterion(cfg.criterion))
    task.load_dataset("train")
    iterator = trainer.get_train_iterator(epoch=1, load_dataset=False).next_epoch_itr(shuffle=False)
    trainer.begin_epoch(1)
    for n in range(1, 9):
        trainer.train_step([next(iterator)])
        assert {layer.timeline.num_updates for _, layer in moe_layers(model)} == {n}
