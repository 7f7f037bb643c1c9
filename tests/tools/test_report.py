"""tools/cost.py and report.py: counts equal the paper's table and what torch counts."""

import json

import pytest
import torch
from conftest import build, train, train_args, valid_batch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fairseq_evomoe.kernels import backend
from fairseq_evomoe.modules.moe_layer import moe_layers
from fairseq_evomoe.tools import report
from fairseq_evomoe.tools.cost import costs, paper_block, total


@pytest.mark.parametrize(
    "d, dense, memory", [(512, 10.7, 4.7), (768, 20.9, 7.4), (1024, 34.4, 10.2)]
)
def test_paper_table(d, dense, memory):
    """GFLOPs of a block at 2048 positions equal table 1 of arXiv 2411.12992."""
    assert paper_block(2048, d) / 1e9 == pytest.approx(dense, abs=0.06)
    assert paper_block(2048, d, 8) / 1e9 == pytest.approx(memory, abs=0.06)


def test_memory_block_against_the_formula(toy):
    """A decoder-only memory block has 5.25 / t d^2 MACs and its dense counterpart 12 d^2."""
    d = 32
    flags = ("--memory-ffn", "--memory-attention", "--moe-freq", 0, "--decoder-ffn-embed-dim", 128)
    _, _, model = build(toy, *flags, family="lm")
    rows = total(list(costs(model, context=0, hidden={"encoder": 0, "decoder": 128})))
    macs = (rows["attention"]["macs"] + rows["ffn"]["macs"]) / 2
    assert macs == 5.25 / 8 * d * d
    assert (rows["attention"]["dense_macs"] + rows["ffn"]["dense_macs"]) / 2 == 12 * d * d
    table = d // 8 * 256
    assert rows["attention"]["parameters"] / 2 == table * 3 * d + 3 * d
    assert rows["ffn"]["reads"] == rows["ffn"]["macs"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--moe-freq", 0),
        ("--moe-gate", "switch"),
        ("--moe-gate", "gshard"),
        ("--moe-gate", "topk", "--moe-top-k", 3),
        ("--moe-gate", "dense"),
        ("--moe-gate", "hash"),
    ],
    ids=str,
)
def test_macs_equal_what_torch_counts(toy, flags):
    """MACs of dense and MoE language models equal all matrix products of a real forward pass."""
    _, task, model = build(toy, *flags, "--evo-spawn-update", 0, family="lm")
    model.eval()
    tokens = valid_batch(task, rows=8)["net_input"]["src_tokens"]
    tokens = tokens[:, : int(tokens.ne(1).sum(1).min())]
    rows, length = tokens.shape
    plain = sdpa_kernel(SDPBackend.MATH)  # torch does not count its fused attention on a CPU
    # nor does it count ops in C++
    with backend.use("torch"), torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
        model(tokens)
    parts = list(costs(model, context=length, hidden={"encoder": 0, "decoder": 64}))
    macs = total(parts)["total"]["macs"] * rows * length
    assert counter.get_total_flops() == pytest.approx(2 * macs, rel=1e-6)


def test_stages_cost_what_they_run(toy):
    """A token costs one expert before the split, all in the soft stage, top-k in the hard one."""
    _, _, model = build(toy, "--evo-spawn-update", 5, "--dts-hard-update", 50, family="lm")
    found = {}
    for n, spawned in ((0, False), (6, True), (60, True)):
        for _, layer in moe_layers(model):
            layer.timeline.has_split = spawned
        model.set_num_updates(n)
        rows = total(list(costs(model, context=8, hidden={"encoder": 0, "decoder": 64})))
        found[n] = rows["experts"]["macs"]
    assert found[6] == 4 * found[0] and found[60] == found[0]


def test_command(toy, tmp_path, capsys):
    """evomoe-report flops prints the table and writes the rows."""
    train(*train_args(toy, tmp_path, "--moe-gate", "switch", "--max-update", 1))
    path = str(tmp_path / "checkpoint_last.pt")
    report.main(["flops", path, "--context", "20", "--json", str(tmp_path / "r.json")])
    printed = capsys.readouterr().out
    assert "experts" in printed and "total" in printed
    rows = json.loads((tmp_path / "r.json").read_text())
    assert rows["experts"]["macs"] == rows["experts"]["dense_macs"] == 2 * 2 * 32 * 64
    assert rows["experts"]["bytes"] == 4 * rows["experts"]["macs"]
    assert rows["experts"]["parameters"] > 3.9 * rows["experts"]["dense_parameters"]
    with pytest.raises(SystemExit):
        report.main(["flops", path, "--context", "0"])
    assert "--context 0" in capsys.readouterr().err
