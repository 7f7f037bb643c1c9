"""tools/memorise.py: a dense run continues as a model of look-ups, in each family."""

import pytest
import torch
from conftest import FAMILIES, train, train_args, valid_batch
from dense_kit import DENSE, TASKS
from fairseq import checkpoint_utils

from fairseq_evomoe.memory.attention import MemoryAttention
from fairseq_evomoe.memory.layer import MemoryFFN
from fairseq_evomoe.tools import memorise
from fairseq_evomoe.tools.checkpoint import build
from fairseq_evomoe.tools.dense_counterparts import units

FLAGS = ("--memory-bits", 4, "--tokens", 3000, "--max-tokens", 1000, "--memory-score", "l1")


@pytest.fixture(scope="module", params=[*FAMILIES, "pre-norm"])
def dense(request, toy, tmp_path_factory):
    """(family, checkpoint of 60 updates) by stock fairseq."""
    family = "translation" if request.param == "pre-norm" else request.param
    folder = tmp_path_factory.mktemp("dense")
    flags = [*DENSE[family], "--task", TASKS[family], "--max-update", 60, "--dropout", 0]
    if request.param == "pre-norm":
        flags += ["--encoder-normalize-before", "--decoder-normalize-before"]
    train(*train_args(toy, folder, *flags, family=family))
    return family, folder / "checkpoint_last.pt"


def convert(path, out, *flags):
    memorise.main([str(a) for a in (path, "--output", out, *FLAGS, *flags)])
    return out


def losses(text):
    (line,) = [x for x in text.splitlines() if x.startswith("loss on valid: ")]
    return {x.rsplit(" ", 1)[0]: float(x.rsplit(" ", 1)[1]) for x in line[15:].split(", ")}


@pytest.mark.parametrize(
    "more",
    [(), ("--memory-linear", "--memory-ffn-embed-dim", 100)],
    ids=["rows", "linear part, more tables"],
)
def test_every_step_keeps_more(dense, more, toy, tmp_path, capsys):
    """Calibration lowers the loss of the start without data, and training continues from it."""
    family, path = dense
    out = convert(path, tmp_path / "memory.pt", *more)
    text = capsys.readouterr().out
    found = losses(text)
    if family == "mlm":  # it has hardly learned yet, so that there is little to lose
        assert abs(found["calibrated"] - found["dense"]) < 0.1
    else:
        assert found["dense"] < found["calibrated"] < found["without data"]
    (model,), *_ = checkpoint_utils.load_model_ensemble_and_task([str(out)])
    layers = [m for m in model.modules() if isinstance(m, MemoryFFN)]
    attentions = [m for m in model.modules() if isinstance(m, MemoryAttention)]
    assert len(layers) == (4 if family == "translation" else 2)
    assert len(attentions) == (6 if family == "translation" else 2)
    assert all(m.projects == "dense" for m in attentions)
    rows = [x for x in text.splitlines() if ".memory_ffn.second" in x or "attn." in x]
    assert len(rows) == len(layers) + (8 if family == "translation" else 2)
    flags = ("--memory-ffn", "--memory-attention", "--memory-out-proj", "dense", "--moe-freq", 0)
    flags += (
        *more,
        *FLAGS[:2],
        *FLAGS[6:],
        "--restore-file",
        out,
        "--reset-optimizer",
        "--max-update",
        2,
    )
    flags += ("--reset-lr-scheduler", "--reset-dataloader", "--reset-meters", "--dropout", 0)
    args = train_args(toy, tmp_path, *flags, family=family)
    if family == "translation" and model.encoder.layers[0].normalize_before:
        args += ["--encoder-normalize-before", "--decoder-normalize-before"]
    first = train(*args)[0]["loss"] * 0.6931
    unit = found["calibrated"] * 0.6931
    assert abs(first - unit) < 0.35 * unit


def test_the_norm_before_each_look_up_is_known(dense, tmp_path):
    """A unit's norm outputs what the dense module reads, in pre-norm and post-norm models."""
    _family, path = dense
    out = convert(path, tmp_path / "memory.pt", "--tokens", 0, "--memory-out-proj", "memory")
    ours, _, _ = build(out, None)
    model, _, task = build(path, None)
    model.eval()
    made = units(ours, model)
    assert len({u.name for u in made}) == len(made)
    norms, read = {}, {}

    def note_norm(unit):
        return lambda m, args, output: norms.__setitem__(unit.name, output)

    def note_input(unit):
        which = "query" if unit.name.endswith(("qkv", ".q")) else "key"
        return lambda m, args, kw: read.__setitem__(unit.name, kw[which] if kw else args[0])

    for unit in made:
        if unit.norm is None:
            continue
        unit.norm.register_forward_hook(note_norm(unit))
        source = unit.source
        if unit.ffn is not None:
            source = model.get_submodule(unit.name.removesuffix(".memory_ffn.second") + ".fc1")
        source.register_forward_pre_hook(note_input(unit), with_kwargs=True)
    with torch.no_grad():
        model(**valid_batch(task)["net_input"])
    assert norms and all(torch.equal(norms[n], read[n]) for n in norms)
    without = {u.name for u in made if u.norm is None and not u.name.endswith(".out")}
    before = any(u.norm is not None and u.name.endswith("layers.0.self_attn.qkv") for u in made)
    assert len(without) == (0 if before else len({n.split(".")[0] for n in without}))


def test_hybrids_and_refusals(dense, tmp_path, capsys):
    """Only the named layers and parts change; what cannot work is refused before any work."""
    family, path = dense
    out = convert(path, tmp_path / "part.pt", "--memory-ffn", "--memory-layers", "1")
    model, _, _ = build(out, None)
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(MemoryFFN) == (2 if family == "translation" else 1)
    assert MemoryAttention not in kinds
    for flags, said in (
        (("--memory-attention", "--memory-out-proj", "none"), "--memory-out-proj none"),
        (("--memory-layers", "7"), "--memory-layers"),
        (("--tokens", -1), "--tokens -1"),
        (("--memory-bits", 40), "--memory-bits"),
        (("--memory-tables", "int8"), "--memory-tables int8"),
    ):
        with pytest.raises(SystemExit):
            convert(path, tmp_path / "no.pt", *flags)
        assert said in capsys.readouterr().err and not (tmp_path / "no.pt").exists()
    with pytest.raises(SystemExit):
        convert(path, out)
    assert "not overwritten" in capsys.readouterr().err
