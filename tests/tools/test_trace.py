"""`evomoe-report trace`: the routing of every token as JSON lines."""

import json
import math

import pytest
import torch
from conftest import run, tool, train, train_args
from fairseq import checkpoint_utils

from fairseq_evomoe.modules.moe_layer import moe_layers

MEGATRON = {"step", "stage", "block", "layer", "rank", "num_tokens", "topk", "top_indices"}


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace")
    flags = ("--moe-freq", 1, "--moe-gate", "dts", "--evo-spawn-update", 2, "--dts-threshold", 0.8)
    train(*train_args(toy, folder, "--max-update", 4, "--dts-anneal-updates", 50, *flags))
    return folder / "checkpoint_last.pt"


def test_every_token_of_every_layer_has_a_line(trained, toy, tmp_path):
    """With the fields of Megatron-Core's trace and ours, which agree with data and gate."""
    out = tmp_path / "router_trace_rank0.jsonl"
    run(tool("evomoe-report"), "trace", trained, "--output", out, "--data", toy / "bin")
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    source, target = ((toy / f"valid.{x}").read_text().splitlines() for x in ("en", "de"))
    words = {"encoder": source, "decoder": target}
    for block, text in words.items():
        tokens = sum(len(line.split()) + 1 for line in text)
        for layer in (0, 1):
            mine = [x for x in lines if (x["block"], x["layer"]) == (block, layer)]
            assert len(mine) == tokens
    for x in lines:
        assert MEGATRON | {"token", "id", "sentence", "position", "weights", "entropy"} == set(x)
        assert x["stage"] == "pre_dispatch" and x["num_tokens"] == 1
        (experts,) = x["top_indices"]
        assert len(set(experts)) == len(experts) == len(x["weights"]) == x["topk"]
        assert x["weights"] == sorted(x["weights"], reverse=True)
        assert 0 < x["entropy"] <= math.log(4) + 1e-5
    # the words of a sentence, in order; fairseq's target reads </s> first
    one = [x for x in lines if (x["block"], x["layer"], x["sentence"]) == ("encoder", 1, 5)]
    read = [x["token"] for x in sorted(one, key=lambda x: x["position"])]
    assert read == [*source[5].split(), "</s>"]
    assert {x["topk"] for x in lines} != {1}


def test_what_cannot_be_traced_is_refused(trained, toy, tmp_path):
    """A file that exists, and a model without experts."""
    taken = tmp_path / "taken"
    taken.write_text("")
    said = run(tool("evomoe-report"), "trace", trained, "--output", taken, ok=False)
    assert "exists" in said
    train(*train_args(toy, tmp_path / "dense", "--moe-freq", 0, "--max-update", 1))
    path = tmp_path / "dense/checkpoint_last.pt"
    said = run(tool("evomoe-report"), "trace", path, "--output", tmp_path / "x", ok=False)
    assert "has no experts" in said


def test_before_the_split_there_is_nothing_to_trace(trained, toy, tmp_path):
    """The base expert alone routes nobody."""
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(trained)])
    state = torch.load(trained, weights_only=False)
    for name, layer in moe_layers(model):
        layer.set_split(False)
        extra = state["model"][f"{name}._extra_state"].clone()
        extra[1] = extra[3] = 0
        state["model"][f"{name}._extra_state"] = extra
    torch.save(state, tmp_path / "early.pt")
    said = run(
        tool("evomoe-report"), "trace", tmp_path / "early.pt", "--output", tmp_path / "x", ok=False
    )
    assert "no experts yet" in said and not (tmp_path / "x").exists()
