"""The three model families: one MoE layer, one schedule, and fairseq's features are kept."""

import pytest
import torch
from conftest import FAMILIES, build, train, train_args, valid_batch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.modules.gates import GATES
from fairseq_evomoe.modules.moe_layer import moe_layers
from fairseq_evomoe.tasks.evolution import EvolutionMixin

STAGES = ("--evo-spawn-update", 3, "--dts-anneal-updates", 3, "--dts-hard-update", 7)
SIZES = {
    "transformer_lm_evomoe": (4, 256, 1024, 4, 2),
    "transformer_lm_evomoe_gpt_small": (12, 768, 3072, 16, 6),
    "transformer_lm_evomoe_gpt_medium": (24, 1024, 4096, 16, 12),
    "transformer_lm_evomoe_gpt_xl": (24, 2048, 8192, 16, 12),
    "roberta_evomoe": (4, 256, 1024, 4, 2),
    "roberta_evomoe_base": (12, 768, 3072, 16, 6),
    "roberta_evomoe_large": (24, 1024, 4096, 16, 12),
}
"""Architecture -> layers, width, FFN width, experts, MoE layers."""


@pytest.mark.parametrize("family", FAMILIES)
def test_diversify_is_the_dense_model_to_the_bit(toy, family):
    """Before the split the loss is that of --moe-freq 0, to the bit, in every family."""
    losses = []
    for freq in (1, 0):
        cfg, task, model = build(
            toy, "--moe-freq", freq, "--evo-spawn-update", 20, "--dropout", 0.2, family=family
        )
        batch = valid_batch(task)
        criterion = task.build_criterion(cfg.criterion)
        model.train()
        torch.manual_seed(3)
        losses.append(criterion(model, batch)[0])
    assert torch.equal(*losses)


@pytest.mark.parametrize("family", ["lm", "mlm"])
def test_three_stages_in_one_run(toy, tmp_path, family):
    """fairseq-train takes LM and masked LM through all stages with the metrics of translation."""
    rows = train(*train_args(toy, tmp_path, *STAGES, "--max-update", 10, family=family))
    assert [r["moe_stage"] for r in rows] == [0] * 3 + [1] * 4 + [2] * 3
    assert rows[3]["moe_active_experts"] >= 0.95 * 4 and rows[-1]["moe_active_experts"] == 1
    side = {"lm": "decoder", "mlm": "encoder"}[family]
    assert f"moe_load/{side}.1/e3" in rows[-1] and rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("family", ["lm", "mlm"])
def test_resume_gives_the_same_curve(toy, tmp_path, family):
    """A run resumed in the middle of sparsify logs the same later lines as an uninterrupted one."""
    flags = (*STAGES, "--max-update", 10, "--dropout", 0.1)
    whole = train(
        *train_args(toy, tmp_path / "a", *flags, "--save-interval-updates", 5, family=family)
    )
    (saved,) = (tmp_path / "a").glob("checkpoint_*_5.pt")
    resumed = train(
        *train_args(toy, tmp_path / "b", *flags, "--restore-file", saved, family=family)
    )
    keys = [k for k in whole[-1] if k.startswith(("loss", "moe", "gnorm"))]
    assert len(resumed) == 5
    for a, b in zip(whole[5:], resumed, strict=True):
        assert {k: a.get(k) for k in keys} == {k: b.get(k) for k in keys}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gate", GATES)
def test_every_gate_trains_in_every_family(toy, tmp_path, family, gate):
    """The loss is finite and each parameter has a gradient; a causal LM refuses expert choice."""
    flags = ["--moe-gate", gate, "--max-update", 4, "--moe-freq", 2]
    if gate == "expert_choice" and family == "translation":
        flags = ["--moe-gate", gate, "--max-update", 4, "--encoder-moe-freq", 2]
    cfg_and_model = lambda: build(toy, *flags, family=family)
    if gate == "expert_choice" and family == "lm":
        with pytest.raises(ValueError, match="--moe-gate expert_choice in decoder.1"):
            cfg_and_model()
        return
    cfg, task, model = cfg_and_model()
    batch = valid_batch(task)
    model.train()
    loss, *_ = task.build_criterion(cfg.criterion)(model, batch)
    loss.backward()
    assert torch.isfinite(loss)
    without = [n for n, p in model.named_parameters() if p.grad is None and "lm_head" not in n]
    assert without == []
    for _, layer in moe_layers(model):
        moved = {n: p.grad.abs().sum() > 0 for n, p in layer.named_parameters()}
        assert moved["experts.w1"] and all(v for n, v in moved.items() if n == "gate.weight")


def test_causal_language_models_route_by_the_word_too(toy):
    """In a causal LM dts has a token bias by default; baselines, masked LMs and parity do not."""
    for flags, family, deviation in (
        ((), "lm", 3.0),
        (("--moe-gate-token-bias", 0), "lm", None),
        (("--moe-gate", "switch"), "lm", None),
        (("--dts-parity", "--dts-noise", "gumbel"), "lm", None),
        ((), "mlm", None),
    ):
        _, _, model = build(toy, *flags, family=family)
        for _, layer in moe_layers(model):
            bias = getattr(layer.gate, "token_bias", None)
            assert (bias is None) == (deviation is None), flags
            assert bias is None or bias.std().item() == pytest.approx(deviation, rel=0.2)


def test_one_sided_frequency_of_a_language_model(toy):
    """--decoder-moe-freq 1 alone means every layer, as for translation."""
    _, _, model = build(toy, "--decoder-moe-freq", 1, family="lm")
    assert len(moe_layers(model)) == 2
    _, _, model = build(toy, "--moe-freq", 0, family="lm")
    assert moe_layers(model) == []


@pytest.mark.parametrize(
    "gate", [("stable",), ("hash", "--moe-hash-mapping", "random"), ("dts",)], ids=str
)
def test_gates_know_the_dictionary_that_is_read(toy, gate):
    """--output-dictionary-size limits the output's words, while routing still reads every word."""
    extra = ("--moe-gate-token-bias", 1) if gate == ("dts",) else ()
    flags = ("--moe-gate", *gate, *extra, "--output-dictionary-size", 12)
    _, task, model = build(toy, *flags, "--evo-spawn-update", 0, family="lm")
    batch = valid_batch(task)
    assert batch["net_input"]["src_tokens"].max() > 12
    assert torch.isfinite(model.eval()(**batch["net_input"])[0]).all()


@pytest.mark.parametrize("gate", ["dts", "stable", "hash", "bias"])
def test_ema_copies_what_it_cannot_average(toy, tmp_path, gate):
    """--store-ema works with integer buffers; tables and stage are copied from the model."""
    own = ("--moe-gate", gate)
    own = ("--moe-gate", "switch", "--moe-balance-bias", 0.01) if gate == "bias" else own
    train(*train_args(toy, tmp_path, *own, *STAGES, "--max-update", 5, "--store-ema"))
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    average = state["extra_state"]["ema"]
    exact = [k for k in average if k.endswith(("_extra_state", "table", "bias_steps"))]
    assert exact and all(torch.equal(average[k], state["model"][k]) for k in exact)
    name = "encoder.layers.1.moe_layer.experts.w1"
    assert not torch.equal(average[name], state["model"][name])


def test_stable_needs_its_distillation(toy, tmp_path):
    """A criterion without distillation is refused by name, because a random router would freeze."""
    for flags in (("--criterion", "cross_entropy"), ("--stable-distill-loss-wt", 0)):
        args = train_args(toy, tmp_path, "--moe-gate", "stable", *flags, family="lm")
        with pytest.raises(ValueError, match="--stable-distill-loss-wt above 0"):
            train(*args)


def test_a_criterion_without_routing_losses_is_said(toy, caplog):
    """Our task accepts a stock criterion and warns that nothing balances the experts."""
    cfg, task, _ = build(toy, "--moe-gate", "switch", "--criterion", "cross_entropy", family="lm")
    with caplog.at_level("WARNING"):
        task.build_criterion(cfg.criterion)
    assert "nothing balances the experts" in caplog.text


def test_stable_freezes_in_training(toy, tmp_path):
    """The router freezes at --stable-freeze-update; the distillation loss ends with it."""
    flags = ("--moe-gate", "stable", "--stable-freeze-update", 4, "--max-update", 7)
    rows = train(*train_args(toy, tmp_path, *flags))
    assert [r["moe_stage"] for r in rows] == [1] * 4 + [2] * 3
    assert ["moe_distill_loss" in r for r in rows] == [True] * 4 + [False] * 3
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)["model"]
    table = state["encoder.layers.1.moe_layer.gate.table"]
    assert (table >= 0).all()
    again = ("--restore-file", tmp_path / "checkpoint_last.pt", "--reset-optimizer")
    rows = train(*train_args(toy, tmp_path / "b", *flags, *again))
    assert not any("moe_distill_loss" in r for r in rows), "a restart does not unfreeze the router"
    state = torch.load(tmp_path / "b/checkpoint_last.pt", weights_only=False)["model"]
    assert torch.equal(state["encoder.layers.1.moe_layer.gate.table"], table)


def test_balance_bias_moves_in_training(toy, tmp_path):
    """Each update steps every bias by at most one, and the checkpoint keeps it."""
    flags = ("--moe-gate", "switch", "--moe-balance-bias", 0.01, "--max-update", 6)
    train(*train_args(toy, tmp_path, *flags, "--update-freq", 2))
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)["model"]
    steps = state["encoder.layers.1.moe_layer.gate.bias_steps"]
    assert steps.abs().sum() > 0 and steps.abs().max() <= 6
    assert "encoder.layers.1.moe_layer.gate.seen" not in state


def test_capacity_is_logged(toy, tmp_path):
    """The share of pairs that a capacity drops shows as moe_overflow."""
    flags = ("--moe-gate", "switch", "--moe-capacity-factor", 0.5, "--max-update", 2)
    rows = train(*train_args(toy, tmp_path, *flags))
    assert 0.4 < rows[-1]["moe_overflow"] < 0.8
    assert rows[-1]["moe_active_experts"] == pytest.approx(1 - rows[-1]["moe_overflow"], abs=1e-3)


def test_shared_expert_trains_through_the_stages(toy, tmp_path):
    """With --moe-shared-expert the bank has one more expert, which all tokens use unrouted."""
    rows = train(*train_args(toy, tmp_path, *STAGES, "--max-update", 9, "--moe-shared-expert"))
    assert [r["moe_stage"] for r in rows] == [0] * 3 + [1] * 4 + [2] * 2
    assert rows[-1]["moe_active_experts"] == 1
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)["model"]
    assert state["encoder.layers.1.moe_layer.experts.w1"].size(0) == 5
    assert state["encoder.layers.1.moe_layer.gate.weight"].size(0) == 4


@pytest.mark.parametrize("arch", SIZES)
def test_sizes(toy, arch):
    """Each architecture has the size its name says, from the real command line."""
    layers, width, hidden, experts, moe = SIZES[arch]
    family, side = ("lm", "decoder") if "lm" in arch else ("mlm", "encoder")
    own = FAMILIES[family]
    flags = [x for f in ("--task", "--criterion") for x in (f, own[own.index(f) + 1])]
    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, [str(toy / "mono"), "--arch", arch, *flags])
    model = convert_namespace_to_omegaconf(args).model
    found = [getattr(model, f"{side}_{x}") for x in ("layers", "embed_dim", "ffn_embed_dim")]
    assert found == [layers, width, hidden]
    if getattr(model, "moe_freq", 2) is None:
        # the default of the language model is resolved when the model is built
        _, _, built = build(toy, "--decoder-layers", 4, family="lm")
        assert len(moe_layers(built)) == 2
        model.moe_freq = 2
    cfg = MoEConfig.from_args(model).check(GATES)
    assert cfg.moe_expert_count == experts
    assert sum(cfg.is_moe_layer(side, i) for i in range(layers)) == moe


def test_every_task_and_architecture_is_ours():
    """All tasks use the one schedule mixin, and all architectures are registered."""
    ours = [t for n, t in TASK_REGISTRY.items() if n.endswith("_evomoe")]
    assert len(ours) == 3 and all(issubclass(t, EvolutionMixin) for t in ours)
    archs = [a for a in ARCH_MODEL_REGISTRY if "evomoe" in a]
    assert len(archs) == 4 + 4 + 3


@pytest.mark.parametrize(
    "family, flags, message",
    [
        ("lm", ("--encoder-moe-freq", 1), "--encoder-moe-freq 1: this model has no encoder"),
        ("mlm", ("--decoder-moe-freq", 1), "--decoder-moe-freq 1: this model has no decoder"),
        ("lm", ("--base-layers", 1), "--base-layers 1"),
        ("lm", ("--tie-adaptive-weights",), "--tie-adaptive-weights needs"),
        ("mlm", ("--quant-noise-pq", 0.1), "--quant-noise-pq 0.1"),
        ("lm", ("--moe-freq", 9), "--moe-freq 9"),
        ("lm", ("--moe-gate", "stable", "--max-update", 0), "--stable-freeze-update"),
        ("lm", ("--moe-gate", "hash", "--moe-hash-mapping", "none.json"), "none.json: no such"),
        (
            "lm",
            ("--moe-gate", "stable", "--evo-spawn-update", 9, "--stable-freeze-update", 5),
            "--stable-freeze-update 5 comes before",
        ),
    ],
    ids=str,
)
def test_refused_before_training(toy, family, flags, message):
    """An impossible flag stops the run with its name, before training starts."""
    with pytest.raises(ValueError, match=message):
        build(toy, *flags, family=family)


@pytest.mark.parametrize("extra", [("--character-embeddings",), ("--adaptive-input",)], ids=str)
def test_other_embeddings_of_fairseq(toy, extra, monkeypatch):
    """Character and adaptive inputs build and run as in fairseq's own language model."""
    if "--adaptive-input" in extra:
        extra = (*extra, "--adaptive-input-cutoff", "50,100", "--adaptive-softmax-cutoff", "50,100")
        extra = (*extra, "--tie-adaptive-weights", "--adaptive-softmax-factor", 4)
    unshared = tuple(x for x in FAMILIES["lm"] if x != "--share-decoder-input-output-embed")
    monkeypatch.setitem(FAMILIES, "lm", unshared)
    _cfg, task, model = build(toy, *extra, "--evo-spawn-update", 0, family="lm")
    batch = valid_batch(task)
    if "--adaptive-input" in extra:
        assert model.decoder.adaptive_softmax is not None
    assert torch.isfinite(model(**batch["net_input"])[0]).all()
