"""Look-up layers in the three model families, in all layers and in some."""

import pytest
import torch
from conftest import FAMILIES, build, train, train_args, valid_batch
from fairseq import checkpoint_utils, options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.memory import sizes
from fairseq_evomoe.memory.attention import MemoryAttention
from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.memory.layer import MemoryBesideFFN, MemoryFFN
from fairseq_evomoe.modules.moe_layer import moe_layers
from fairseq_evomoe.tools.cost import costs

MEMORY = ("--memory-ffn", "--memory-attention", "--moe-freq", 0, "--memory-bits", 4)


def logits(model, net_input):
    with torch.no_grad():
        return model(**net_input)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("out", ["none", "dense", "memory"])
def test_trains_with_a_gradient_everywhere(toy, tmp_path, family, out):
    """A model of look-ups trains: every parameter has a gradient, and the loss falls."""
    cfg, task, model = build(toy, *MEMORY, "--memory-out-proj", out, family=family)
    kinds = [type(m) for m in model.modules()]
    layers = 4 if family == "translation" else 2
    assert kinds.count(MemoryFFN) == layers and moe_layers(model) == []
    attentions = 6 if family == "translation" else 2
    assert kinds.count(MemoryAttention) == attentions
    model.train()
    loss, *_ = task.build_criterion(cfg.criterion)(model, valid_batch(task))
    loss.backward()
    named = [n for n, p in model.named_parameters() if p.grad is None and "lm_head" not in n]
    assert named == []
    if out == "none":
        rows = train(*train_args(toy, tmp_path, *MEMORY, "--max-update", 25, family=family))
        assert rows[-1]["loss"] < rows[0]["loss"] - 0.5


def test_a_sentence_does_not_depend_on_its_batch(toy):
    """A sentence's logits are the same alone and in a batch, step by step and in one pass."""
    _, task, model = build(toy, *MEMORY)
    model.eval()
    batch = valid_batch(task, rows=5)
    net_input = batch["net_input"]
    together = logits(model, net_input)
    dataset = task.dataset("valid")
    for row, index in enumerate(batch["id"].tolist()):
        alone = dataset.collater([dataset[index]])
        length = alone["target"].size(1)
        found = logits(model, alone["net_input"])[0]
        assert torch.allclose(found, together[row, :length], atol=1e-4)
    state = {}
    previous = net_input["prev_output_tokens"]
    with torch.no_grad():
        encoded = model.encoder(net_input["src_tokens"], net_input["src_lengths"])
        for t in range(previous.size(1)):
            step = model.decoder(previous[:, : t + 1], encoder_out=encoded, incremental_state=state)
            real = batch["target"][:, t].ne(1)
            assert torch.allclose(step[0][real, -1], together[real, t], atol=1e-4)


def test_hybrids(toy):
    """A model can have memory in some layers, experts in others and dense FFNs in the rest."""
    flags = ("--memory-ffn", "--memory-layers", "0", "--moe-freq", 2, "--memory-bits", 4)
    _, _, model = build(toy, *flags)
    for stack in (model.encoder, model.decoder):
        first, second = stack.layers
        assert isinstance(first.memory_ffn, MemoryFFN) and hasattr(second, "moe_layer")
        assert not any(isinstance(m, MemoryAttention) for m in stack.modules())
    flags = ("--memory-attention", "--memory-layers", "1", "--moe-freq", 0, "--memory-bits", 4)
    _, _, model = build(toy, *flags)
    first, second = model.decoder.layers
    assert not isinstance(first.self_attn, MemoryAttention)
    assert isinstance(second.self_attn, MemoryAttention)
    assert isinstance(second.encoder_attn, MemoryAttention) and hasattr(second, "fc1")


def test_checkpoint_round_trip(toy, tmp_path):
    """Flags and tables are restored from a checkpoint, under the names of the parameters."""
    from fairseq import checkpoint_utils

    train(*train_args(toy, tmp_path, *MEMORY, "--memory-score", "abs_prob", "--max-update", 2))
    path = str(tmp_path / "checkpoint_last.pt")
    (model,), _, _task = checkpoint_utils.load_model_ensemble_and_task([path])
    assert model.encoder.layers[0].memory_ffn.first.rule.score == "abs_prob"
    names = [n for n, _ in model.named_parameters() if "memory_ffn" in n]
    assert "encoder.layers.0.memory_ffn.first.tables" in names
    state = torch.load(path, weights_only=False)["model"]
    assert torch.equal(model.encoder.layers[0].self_attn.qkv.tables,
                       state["encoder.layers.0.self_attn.qkv.tables"])  # fmt: skip


@pytest.mark.parametrize("precision", [(), ("--bf16",)], ids=["fp32", "bf16"])
def test_tables_have_a_weight_decay_of_their_own(toy, tmp_path, precision):
    """--weight-decay acts on dense weights, not tables; a resumed run has the same two groups."""
    flags = (*MEMORY, "--weight-decay", 0.3, "--max-update", 4, *precision)
    train(*train_args(toy, tmp_path, *flags))
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    groups = state["last_optimizer_state"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]
    tables = sum(n.endswith("tables") for n in state["model"])
    assert len(groups[1]["params"]) == tables > 0
    assert groups[0]["lr"] == groups[1]["lr"]
    more = train(*train_args(toy, tmp_path, *flags, "--max-update", 6))
    assert [r["num_updates"] for r in more] == [5, 6]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "flags",
    [
        ("--memory-out-proj", "memory"),
        ("--memory-linear",),
        ("--memory-parallel",),
        ("--memory-ngram", 2, "--memory-ngram-rows", 100),
        ("--memory-layers", "1", "--memory-delta", 1),
        ("--memory-ffn-embed-dim", 45, "--memory-linear"),
        ("--moe-freq", 2, "--moe-expert-type", "memory", "--moe-shared-expert"),
    ],
    ids=str,
)
def test_tables_are_stated_before_they_are_built(toy, caplog, family, flags):
    """The number of table parameters in the log equals the number that is then built."""
    with caplog.at_level("INFO"):
        _, _, model = build(toy, *MEMORY, *flags, family=family)
    built = sum(p.numel() for n, p in model.named_parameters() if "tables" in n or "linear" in n)
    (line,) = [r.getMessage() for r in caplog.records if "look-up tables" in r.getMessage()]
    assert line.startswith(f"look-up tables: {built / 1e6:.1f} M parameters")
    side = "encoder" if family == "mlm" else "decoder"
    cfg = (model.encoder.sentence_encoder if family == "mlm" else model.decoder).cfg
    counted = sum(
        sizes.table_parameters(
            cfg.memory, cfg.moe, side=s, layers=2, width=32,
            encoder=32 if (s, family) == ("decoder", "translation") else 0,
        )
        for s in ({"translation": ("encoder", "decoder")}.get(family, (side,)))
    )  # fmt: skip
    assert counted == built


def test_published_table_sizes():
    """MemoryFormer-tiny and -base have 415 M and 6.64 G table parameters."""
    memory, moe = MemoryConfig(memory_ffn=True, memory_attention=True), MoEConfig()
    published = {(6, 512): 415e6, (24, 1024): 6.64e9}
    for (layers, width), want in published.items():
        found = sizes.table_parameters(memory, moe, side="decoder", layers=layers, width=width)
        assert found == pytest.approx(want, rel=2e-3)


def test_tables_that_do_not_fit_are_refused(toy, monkeypatch, caplog):
    """Tables that do not fit are refused before allocation; the error names flags to lower."""
    monkeypatch.setattr(sizes, "free_memory", lambda: 10**5)
    with pytest.raises(ValueError, match="lower --memory-bits or --memory-delta"):
        build(toy, *MEMORY)
    monkeypatch.setattr(sizes, "free_memory", lambda: 2 * 10**6)
    with caplog.at_level("WARNING"):
        build(toy, *MEMORY)
    assert "to train these tables" in caplog.text
    monkeypatch.setattr(sizes, "free_memory", lambda: None)
    build(toy, *MEMORY)


SIZES = {
    "transformer_memoryformer": ("encoder", 3, 256),
    "transformer_memoryformer_iwslt_de_en": ("encoder", 6, 512),
    "transformer_memoryformer_wmt_en_de": ("decoder", 6, 512),
    "transformer_lm_memoryformer_tiny": ("decoder", 6, 512),
    "transformer_lm_memoryformer_small": ("decoder", 12, 768),
    "transformer_lm_memoryformer_base": ("decoder", 24, 1024),
    "roberta_memoryformer_base": ("encoder", 12, 768),
}


@pytest.mark.parametrize("arch", SIZES)
def test_sizes(toy, arch):
    """Each architecture has the paper's or fairseq's size, pre-norm and look-ups in every layer."""
    side, layers, width = SIZES[arch]
    family = "lm" if "lm" in arch else "mlm" if "roberta" in arch else "translation"
    own = FAMILIES[family]
    flags = [x for f in ("--task", "--criterion") for x in (f, own[own.index(f) + 1])]
    parser = options.get_training_parser()
    data = str(toy / ("bin" if family == "translation" else "mono"))
    model = convert_namespace_to_omegaconf(
        options.parse_args_and_arch(parser, [data, "--arch", arch, *flags])
    ).model
    assert [getattr(model, f"{side}_{x}") for x in ("layers", "embed_dim")] == [layers, width]
    assert getattr(model, f"{side}_normalize_before")
    memory, moe = MemoryConfig.from_args(model).check(), MoEConfig.from_args(model)
    assert memory.memory_ffn and memory.memory_attention and memory.covers(0)
    assert (memory.memory_bits, memory.memory_delta) == (8, 2)
    assert not moe.is_moe_layer(side, 1)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--memory-bits", 20), "--memory-bits 20"),
        (("--memory-layers", "first"), "--memory-layers first"),
        (("--quant-noise-pq", 0.1), "--quant-noise-pq 0.1"),
        (("--cross-self-attention", "--no-cross-attention"), "--cross-self-attention"),
    ],
    ids=str,
)
def test_refused_before_training(toy, flags, message):
    """An impossible flag stops the run with its name, before training starts."""
    with pytest.raises(ValueError, match=message):
        build(toy, *MEMORY, *flags)


def test_scale_fc_is_refused_with_replaced_networks(toy):
    """--scale-fc normalises the dense FFN's hidden state, which MoE and memory layers lack."""
    with pytest.raises(ValueError, match="--scale-fc: acts inside the dense FFN"):
        build(toy, "--scale-fc", family="lm")


@pytest.mark.parametrize("family", FAMILIES)
def test_look_ups_beside_dense_networks(toy, tmp_path, family):
    """With --memory-parallel a model starts as the dense one, and its tables learn."""
    flags = ("--moe-freq", 0, "--max-update", 4)
    dense = train(*train_args(toy, tmp_path / "dense", *flags, family=family))
    beside = (*flags, "--memory-ffn", "--memory-parallel", "--memory-bits", 4)
    ours = train(*train_args(toy, tmp_path / "ours", *beside, family=family))
    assert ours[0]["loss"] == dense[0]["loss"] and ours[-1]["loss"] != dense[-1]["loss"]
    path = str(tmp_path / "ours/checkpoint_last.pt")
    (model,), *_ = checkpoint_utils.load_model_ensemble_and_task([path])
    found = [m for m in model.modules() if isinstance(m, MemoryBesideFFN)]
    assert len(found) == (4 if family == "translation" else 2)
    x = torch.randn(3, 5, 32)
    for module in found:
        dense_part = module.fc2(module.activation(module.fc1(x)))
        assert module.beside.tables.abs().sum() > 0
        assert torch.allclose(module(x), dense_part + module.beside(x), atol=1e-6)
    parts = costs(model, context=10, hidden={"encoder": 64, "decoder": 64})
    ffns = [p for p in parts if p.kind == "ffn"]
    assert len(ffns) == len(found)
    # two matrices of 32 x F, and a row of 32 from each of 8 tables
    wide = found[0].fc1.out_features
    assert {p.macs for p in ffns} == {2 * 32 * wide + 8 * 32}


def test_look_ups_beside_what_is_not_there(toy):
    """--memory-parallel without --memory-ffn is refused by name."""
    with pytest.raises(ValueError, match="--memory-parallel"):
        build(toy, "--memory-parallel")
