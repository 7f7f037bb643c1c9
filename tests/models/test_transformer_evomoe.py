"""models/transformer_evomoe.py: architectures, placement, parameter names, refused options."""

import pytest
import torch
from conftest import build, valid_batch
from fairseq.models import ARCH_MODEL_REGISTRY

from fairseq_evomoe.modules.moe_layer import moe_layers

ARCHITECTURES = {
    "transformer_evomoe": (3, 256, 512, 4),
    "transformer_evomoe_iwslt_de_en": (6, 512, 1024, 4),
    "transformer_evomoe_wmt_en_de": (6, 512, 2048, 8),
    "transformer_evomoe_wmt_en_de_big": (6, 1024, 4096, 4),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architectures(arch):
    """Each architecture is registered with its sizes, which the user's flags override."""
    from argparse import Namespace

    from fairseq.models import ARCH_CONFIG_REGISTRY

    assert arch in ARCH_MODEL_REGISTRY
    args = Namespace()
    ARCH_CONFIG_REGISTRY[arch](args)
    sizes = (args.encoder_layers, args.encoder_embed_dim, args.encoder_ffn_embed_dim)
    assert (*sizes, args.moe_expert_count) == ARCHITECTURES[arch]
    assert args.moe_freq == 2
    given = Namespace(moe_expert_count=3, decoder_moe_freq=1)
    ARCH_CONFIG_REGISTRY[arch](given)
    assert (given.moe_expert_count, given.moe_freq, given.decoder_moe_freq) == (3, 0, 1)


def test_placement_and_names(toy):
    """Every second layer of both sides is an MoE layer; each parameter has exactly one name."""
    _, _, model = build(toy, "--encoder-layers", 4)
    assert [n for n, _ in moe_layers(model)] == [
        "encoder.layers.1.moe_layer",
        "encoder.layers.3.moe_layer",
        "decoder.layers.1.moe_layer",
    ]
    names = [n for n, _ in model.named_parameters() if "encoder.layers.1." in n]
    assert {n.split("layers.1.")[1] for n in names if "moe_layer" in n} == {
        "moe_layer.gate.weight",
        *(f"moe_layer.experts.{w}" for w in ("w1", "b1", "w2", "b2")),
    }
    assert not any("fc1" in n or "fc2" in n for n in names)
    assert any("encoder.layers.0.fc1.weight" in n for n in model.state_dict())


def test_expert_width_and_one_sided_frequency(toy):
    """--moe-expert-ffn-dim sets the experts' width; --decoder-moe-freq leaves the encoder dense."""
    _, _, model = build(toy, "--moe-expert-ffn-dim", 48, "--decoder-moe-freq", 1)
    layers = dict(moe_layers(model))
    assert list(layers) == ["decoder.layers.0.moe_layer", "decoder.layers.1.moe_layer"]
    assert layers["decoder.layers.0.moe_layer"].experts.w1.shape == (4, 48, 32)
    assert model.encoder.layers[0].fc1.out_features == 64


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--quant-noise-pq", 0.1), "--quant-noise-pq"),
        (("--moe-expert-count", 0), "--moe-expert-count"),
        (("--evo-spawn-update", 900), "--evo-spawn-update"),
        (("--evo-diversify-ratio", 1.5), "--evo-diversify-ratio"),
        (("--dts-temperature-end", 5), "--dts-temperature-end"),
        (("--ddp-backend", "fully_sharded"), "--ddp-backend fully_sharded"),
    ],
    ids=str,
)
def test_refused_before_training(toy, flags, message):
    """An impossible flag stops the run with its name, before training starts."""
    with pytest.raises(ValueError, match=message):
        build(toy, *flags)


def test_a_dense_model_needs_no_schedule(toy):
    """--moe-freq 0 works without --max-update, because there is nothing to schedule."""
    _, _, model = build(toy, "--moe-freq", 0, "--max-update", 0)
    assert moe_layers(model) == []


@pytest.mark.parametrize("flag", ["--checkpoint-activations", "--encoder-layerdrop"])
def test_gradients_reach_every_parameter(toy, flag):
    """Routing losses train the model through checkpointed layers (every parameter) and dropped
    ones."""
    extra = (flag,) if flag == "--checkpoint-activations" else (flag, 0.3)
    cfg, task, model = build(toy, *extra, "--evo-spawn-update", 0)
    batch = valid_batch(task)
    criterion = task.build_criterion(cfg.criterion)
    model.train()
    loss, _sample_size, log = criterion(model, batch)
    loss.backward()
    assert torch.isfinite(loss) and log["moe_load"].shape == (2, 4)
    if flag == "--checkpoint-activations":
        missing = [n for n, p in model.named_parameters() if p.grad is None]
        assert missing == []
        gates = [p.grad.abs().sum() for n, p in model.named_parameters() if "gate" in n]
        assert all(g > 0 for g in gates)


def test_checkpointed_activations_change_no_gradient(toy):
    """--checkpoint-activations changes neither the loss nor a gradient, routing losses included."""
    results = []
    for extra in ((), ("--checkpoint-activations",)):
        cfg, task, model = build(
            toy, *extra, "--evo-spawn-update", 0, "--moe-gate-loss-wt", 0.5, "--dropout", 0.1
        )
        batch = valid_batch(task)
        criterion = task.build_criterion(cfg.criterion)
        model.train()
        torch.manual_seed(5)
        loss, *_ = criterion(model, batch)
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (plain, want), (recomputed, have) = results
    assert torch.allclose(plain, recomputed)
    for name in want:
        assert torch.allclose(have[name], want[name], atol=1e-4), name
