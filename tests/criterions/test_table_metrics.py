"""Usage of look-up tables: statistics checked by hand and in a validation of fairseq-train."""

import pytest
import torch
from conftest import build, train, train_args, valid_batch
from fairseq.logging import meters

from fairseq_evomoe.criterions import table_metrics
from fairseq_evomoe.kernels.lookup.score import codes
from fairseq_evomoe.memory.layer import MemoryLayer
from fairseq_evomoe.memory.usage import counting_rows, usage

MEMORY = ("--memory-ffn", "--memory-attention", "--moe-freq", 0, "--memory-bits", 4)
KEYS = {"memory_bit_imbalance", "memory_row_skew", "memory_unused_rows"}


def test_usage_by_hand():
    """Statistics of an evenly used table and of one whose high bit is always set are as by hand."""
    used = usage(torch.tensor([[2, 2, 2, 2], [0, 0, 1, 3]]))
    assert used["bit_imbalance"].tolist() == [[0, 0], [0.5, 1]]
    assert used["skew"].tolist() == [1, 3]
    assert used["unused"].tolist() == [0, 0.5]


def test_counts_are_of_the_rows_that_are_read(toy):
    """Each layer's hits equal its inputs' codes, counted one by one; training counts nothing."""
    cfg, task, model = build(toy, *MEMORY)
    batch = valid_batch(task)
    criterion = task.build_criterion(cfg.criterion)
    model.train()
    assert "memory_hits" not in criterion(model, batch)[2]
    model.eval()
    seen = {}

    def note(layer, args):
        rule = layer.rule
        x = args[0].detach().reshape(-1, rule.width)
        short = rule.count * rule.bits - rule.width
        z = torch.nn.functional.pad(x, (0, short)).view(-1, rule.count, rule.bits)
        want = torch.zeros(layer.tables.shape[:2], dtype=torch.float64)
        for row in codes(z).tolist():
            for k, code in enumerate(row):
                want[k, code] += 1
        seen[layer] = want

    hooks = [
        m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, MemoryLayer)
    ]
    with torch.no_grad():
        log = criterion(model, batch)[2]
        with counting_rows() as counts:
            criterion.__class__.__mro__[2].forward(criterion, model, batch)
    layers = [m for m in model.modules() if isinstance(m, MemoryLayer)]
    assert all(torch.equal(counts.of(layer), seen[layer]) for layer in layers)
    for hook in hooks:
        hook.remove()
    assert torch.equal(log["memory_hits"], torch.cat([seen[x].flatten() for x in layers]))


@pytest.mark.parametrize("family", ["translation", "lm"])
def test_validation_logs_the_whole_run(toy, tmp_path, family):
    """The figures cover all batches together, so they do not depend on the size of a batch."""
    found = []
    for name, tokens in (("small", 200), ("large", 4000)):
        flags = (*MEMORY, "--max-update", 1, "--max-tokens-valid", tokens, "--seed", 3)
        if family == "lm":
            flags += ("--sample-break-mode", "none")
        args = train_args(toy, tmp_path / name, *flags, family=family)
        args.remove("--disable-validation")
        rows = train(*args, kind="valid")
        found.append({k: float(rows[-1][f"valid_{k}"]) for k in KEYS})
    small, large = found
    if family == "lm":  # no padding, whose amount depends on the batches
        assert small == large
    assert 0 < small["memory_bit_imbalance"] < 0.5 and small["memory_row_skew"] > 1
    assert small["memory_unused_rows"] <= large["memory_unused_rows"] + 0.02 < 0.7


def test_a_checkpoint_after_a_validation_loads():
    """fairseq saves the meters of a validation, and resuming leaves out those that are ours."""
    made = meters.MetersDict()
    made.add_meter("loss", meters.AverageMeter(), 1)
    made["loss"].update(3.0)
    made.add_meter("_memory_hits", table_metrics._Total(), 2)
    made["_memory_hits"].update(torch.ones(2))
    loaded = meters.MetersDict()
    loaded.load_state_dict(made.state_dict())
    assert list(loaded) == ["loss"] and loaded["loss"].avg == 3.0


def test_a_run_goes_on_after_a_validation(toy, tmp_path):
    """A checkpoint that was saved in the middle of an epoch, after a validation, is resumed."""
    flags = (*MEMORY, "--save-interval-updates", 4, "--validate-interval-updates", 4)
    args = train_args(toy, tmp_path, *flags, "--max-update", 4)
    args.remove("--disable-validation")
    train(*args)
    more = train_args(toy, tmp_path, *flags, "--max-update", 6)
    more.remove("--disable-validation")
    assert [r["num_updates"] for r in train(*more)] == [5, 6]
