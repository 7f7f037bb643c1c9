"""evomoe-export --output-layer int8: the decoder's output layer rounded for inference."""

import copy

import pytest
import torch
from conftest import USER_DIR, run, tool, train, train_args, valid_batch
from fairseq import checkpoint_utils
from torch.nn import functional as F

from fairseq_evomoe.kernels.experts import few_rows
from fairseq_evomoe.modules.output_layer import WIDENED, Int8OutputLayer, widened
from fairseq_evomoe.tools import export
from fairseq_evomoe.tools.average import average
from fairseq_evomoe.tools.cost import costs

PLUGIN = ("--user-dir", USER_DIR, "--cpu", "--num-workers", "0")
SHARED = "--share-decoder-input-output-embed"
KINDS = {
    "translation": ("translation", ("--max-update", 20, "--evo-spawn-update", 5)),
    "dense lm": ("lm", ("--max-update", 20, "--moe-freq", 0)),
    "own matrix": ("lm", ("--max-update", 20)),
}


def loaded(path):
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    return model.eval(), cfg, task


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_stays(kind, toy, tmp_path, capsys):
    """The converted checkpoint has the same embeddings and nearly the same loss, and cannot be
    trained or converted again."""
    family, flags = KINDS[kind]
    words = train_args(toy, tmp_path, *flags, family=family)
    if kind == "own matrix":
        words.remove(SHARED)
    train(*words)
    path, small = tmp_path / "checkpoint_last.pt", tmp_path / "small.pt"
    export.main([str(path), "--output-layer", "int8", "--output", str(small)])
    losses, sizes = [], []
    for file in (path, small):
        model, cfg, task = loaded(file)
        with torch.no_grad():
            loss, size, _ = task.build_criterion(cfg.criterion)(model, valid_batch(task))
        losses.append(loss.item() / int(size))
        hidden = {"encoder": 64, "decoder": 64}
        found = costs(model, context=9, hidden=hidden)
        sizes.append(sum(part.parameters for part in found if part.kind == "output"))
    assert isinstance(model.decoder.output_projection, Int8OutputLayer)
    assert losses[1] == pytest.approx(losses[0], rel=0.005) and losses[1] != losses[0]
    assert sizes[0] == sizes[1], "a report counts the weights in either form"
    before, after = (torch.load(p, weights_only=False)["model"] for p in (path, small))
    name = "decoder.output_projection.weight"
    assert after[name].dtype == torch.int8
    error = before[name] - widened(after[name], after[name[:-6] + "row_scale"], torch.float32)
    assert error.abs().max() <= before[name].abs().max() / 127
    for other in set(before) - {name}:
        assert torch.equal(before[other], after[other]), other
    assert set(after) - set(before) == {"decoder.output_projection.row_scale"}
    with pytest.raises(ValueError, match="--output-storage int8 is for inference"):
        model.train()(**valid_batch(task)["net_input"])
    with pytest.raises(SystemExit):
        export.main([str(small), "--output-layer", "int8", "--output", str(tmp_path / "x.pt")])
    assert "is converted already" in capsys.readouterr().err
    with pytest.raises(ValueError, match="was converted to int8 for inference; average the"):
        average([small, small])
    with pytest.raises(SystemExit):
        export.main([str(small), "--format", "hf", "--output", str(tmp_path / "hf")])
    assert "was trained with --output-storage int8" in capsys.readouterr().err


def test_with_tables_and_generation(toy, tmp_path):
    """It combines with --tables, and fairseq-generate finds the translations that it finds with the
    widened matrix."""
    memory = ("--memory-ffn", "--memory-attention", "--moe-freq", 0, "--memory-bits", 4)
    words = train_args(toy, tmp_path, *memory, "--max-update", 30)
    # the widened matrix would otherwise be loaded into the embeddings as well
    words.remove("--share-all-embeddings")
    train(*words)
    path, small = tmp_path / "checkpoint_last.pt", tmp_path / "small.pt"
    flags = ["--output-layer", "int8", "--tables", "int8", "--output"]
    export.main([str(path), *flags, str(small)])
    wide = torch.load(small, weights_only=False)
    name = "decoder.output_projection."
    scale = wide["model"].pop(name + "row_scale")
    wide["model"][name + "weight"] = widened(wide["model"][name + "weight"], scale, torch.float32)
    wide["cfg"]["model"].output_storage = "trained"
    torch.save(wide, tmp_path / "wide.pt")
    languages = ("-s", "en", "-t", "de", "--beam", "3", "--max-len-b", "8")
    lines = []
    for file in (small, tmp_path / "wide.pt"):
        out = run(tool("fairseq-generate"), toy / "bin", *PLUGIN, "--path", file, *languages)
        lines.append([x for x in out.splitlines() if x.startswith("D-")])
    strip = lambda line: (line.split("\t")[0], line.split("\t")[2])
    assert len(lines[0]) == 43
    assert [strip(x) for x in lines[0]] == [strip(x) for x in lines[1]]


@pytest.mark.parametrize("rows", [1, 7, few_rows.FEW_INT8 + 1])
def test_logits(rows):
    """Few tokens (the int8 kernel) and many (widened blocks) have the logits of float64, and scales
    stay float32 in a model of half precision."""
    weight = torch.randn(WIDENED + 9, 24)
    layer = Int8OutputLayer(weight).eval()
    x = torch.randn(rows, 2, 24)[:, :1]
    with torch.no_grad():
        exact = F.linear(x.double(), widened(layer.weight, layer.row_scale, torch.float64))
        assert layer(x).shape == (rows, 1, WIDENED + 9)
        torch.testing.assert_close(layer(x).double(), exact, rtol=1e-4, atol=1e-3)
        half = copy.deepcopy(layer).bfloat16()
        assert half.row_scale.dtype == torch.float32 and half.weight.dtype == torch.int8
        assert half(x.bfloat16()).dtype == torch.bfloat16
    # scores of a model can be asked for with gradients towards its states
    states = x.clone().requires_grad_()
    layer(states).sum().backward()
    assert states.grad is not None and states.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("family", "flags", "said"),
    [
        ("mlm", (), "has no output layer of a decoder that is one matrix"),
        ("lm", ("--adaptive-softmax-cutoff", "20,40"), "that is one matrix"),
    ],
)
def test_models_without_such_a_layer(family, flags, said, toy, tmp_path, capsys):
    """A masked language model and an adaptive softmax are refused, and nothing is written."""
    words = train_args(toy, tmp_path, *flags, "--max-update", 1, family=family)
    if flags:
        words[words.index("--criterion") + 1] = "adaptive_loss"
        words += ["--ddp-backend", "legacy_ddp"]
        words.remove(SHARED)
    train(*words)
    path = str(tmp_path / "checkpoint_last.pt")
    with pytest.raises(SystemExit):
        export.main([path, "--output-layer", "int8", "--output", str(tmp_path / "x.pt")])
    assert said in capsys.readouterr().err and not (tmp_path / "x.pt").exists()


def test_the_flag_needs_a_decoder(toy, tmp_path):
    """--output-storage on a masked language model is refused before training."""
    with pytest.raises(ValueError, match="--output-storage int8: this model has no decoder"):
        train(*train_args(toy, tmp_path, "--output-storage", "int8", family="mlm"))
