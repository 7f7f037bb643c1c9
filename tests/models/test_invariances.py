"""What an MoE Transformer must not depend on: the future, neighbours, padding, order, caching."""

import pytest
import torch
from conftest import build, valid_batch
from fairseq.data import data_utils

from fairseq_evomoe.modules.gates import GATES
from fairseq_evomoe.modules.moe_layer import moe_layers

STAGES = {"diversify": 0, "sparsify": 12, "hard": 99}
CASES = [("dts", stage) for stage in STAGES]
CASES += [("stable", "hard")]
CASES += [(g, "sparsify") for g in GATES if g not in ("dts", "expert_choice")]


@pytest.fixture(params=CASES, ids="-".join)
def setting(request, toy):
    """(task, model, batch) in evaluation, with a gate sharp enough to route tokens differently."""
    gate, stage = request.param
    _, task, model = build(
        toy,
        *("--moe-gate", gate, "--moe-freq", 1, "--evo-spawn-update", 5),
        *("--dts-anneal-updates", 20, "--dts-hard-update", 50, "--moe-gate-init-std", 0.5),
        *("--stable-freeze-update", 50),
    )
    for _, layer in moe_layers(model):
        layer.timeline.has_split = stage != "diversify"
        if gate == "stable" and stage == "hard":
            layer.gate.freeze()
    model.set_num_updates(STAGES[stage])
    return task, model.eval(), valid_batch(task, rows=5)


def logits(model, net_input):
    with torch.no_grad():
        return model(**net_input)[0]


def assert_same(a, b):
    assert torch.allclose(a, b, atol=2e-5), (a - b).abs().max()


def test_a_position_never_depends_on_later_ones(setting):
    """Changing the last target tokens changes nothing before them."""
    _, model, batch = setting
    net_input = batch["net_input"]
    before = logits(model, net_input)
    other = dict(net_input)
    other["prev_output_tokens"] = net_input["prev_output_tokens"].clone()
    other["prev_output_tokens"][:, 4:] = 7
    after = logits(model, other)
    assert_same(after[:, :4], before[:, :4])
    assert not torch.allclose(after[:, 4:], before[:, 4:], atol=1e-3)


def test_a_sentence_does_not_depend_on_its_batch(setting):
    """A sentence alone, without the padding that its neighbours cause, gets the same output."""
    task, model, batch = setting
    together = logits(model, batch["net_input"])
    dataset = task.dataset("valid")
    for row, index in enumerate(batch["id"].tolist()):
        alone = dataset.collater([dataset[index]])
        length = alone["target"].size(1)
        assert_same(logits(model, alone["net_input"])[0], together[row, :length])


def test_more_padding_changes_nothing(setting):
    """Ten more columns of padding on the source leave the output unchanged."""
    task, model, batch = setting
    net_input = dict(batch["net_input"])
    pad = task.source_dictionary.pad()
    tokens = net_input["src_tokens"]
    rows = [row[row.ne(pad)] for row in tokens]
    net_input["src_tokens"] = data_utils.collate_tokens(
        rows, pad, left_pad=True, pad_to_length=tokens.size(1) + 10
    )
    assert_same(logits(model, net_input), logits(model, batch["net_input"]))


def test_order_of_sentences(setting):
    """If the sentences of a batch are permuted, the outputs are permuted alike."""
    _, model, batch = setting
    order = torch.tensor([3, 0, 4, 1, 2])
    net_input = {k: v[order] for k, v in batch["net_input"].items()}
    assert_same(logits(model, net_input), logits(model, batch["net_input"])[order])


def test_incremental_decoding_equals_full_decoding(setting):
    """One token at a time with cached states gives the logits of the whole sequence."""
    _, model, batch = setting
    net_input = batch["net_input"]
    full = logits(model, net_input)
    state = {}
    previous = net_input["prev_output_tokens"]
    with torch.no_grad():
        encoded = model.encoder(net_input["src_tokens"], net_input["src_lengths"])
        for t in range(previous.size(1)):
            step = model.decoder(previous[:, : t + 1], encoder_out=encoded, incremental_state=state)
            real = batch["target"][:, t].ne(1)
            assert_same(step[0][real, -1], full[real, t])


def test_evaluation_is_deterministic(setting):
    """Two passes agree to the bit, because there is no noise outside training."""
    _, model, batch = setting
    assert torch.equal(logits(model, batch["net_input"]), logits(model, batch["net_input"]))


@pytest.fixture(params=["dts", "expert_choice", "hash"])
def masked(request, toy):
    """(model, batch) of a masked LM in evaluation."""
    _, task, model = build(
        toy,
        *("--moe-gate", request.param, "--moe-freq", 1, "--evo-spawn-update", 0),
        *("--moe-gate-init-std", 0.5),
        family="mlm",
    )
    model.set_num_updates(12)
    return model.eval(), valid_batch(task, rows=5)["net_input"]["src_tokens"]


def test_a_masked_sentence_does_not_depend_on_its_batch(masked):
    """A sentence's output is the same alone, in a batch, with more padding and in another order."""
    model, tokens = masked
    with torch.no_grad():
        together = model(tokens)[0]
        padded = torch.cat([tokens, tokens.new_full((5, 7), 1)], 1)
        assert_same(model(padded)[0][:, : tokens.size(1)], together)
        order = torch.tensor([3, 0, 4, 1, 2])
        assert_same(model(tokens[order])[0], together[order])
        for row, ids in enumerate(tokens):
            real = ids[ids.ne(1)]
            assert_same(model(real[None])[0][0], together[row, : len(real)])


@pytest.mark.parametrize("gate", ["dts", "base", "hash", "gshard", "token bias"])
def test_a_language_model_is_causal_and_decodes_step_by_step(toy, gate):
    """Later tokens change nothing before them; cached decoding gives the full pass's logits."""
    _, task, model = build(
        toy,
        *("--moe-freq", 1, "--evo-spawn-update", 0, "--moe-gate-init-std", 0.5),
        *(("--moe-gate-token-bias", 1) if gate == "token bias" else ("--moe-gate", gate)),
        family="lm",
    )
    model.set_num_updates(12)
    model.eval()
    tokens = valid_batch(task, rows=4)["net_input"]["src_tokens"]
    tokens = tokens[:, : int(tokens.ne(1).sum(1).min())]
    with torch.no_grad():
        full = model(tokens)[0]
        other = tokens.clone()
        other[:, 3:] = 7
        assert_same(model(other)[0][:, :3], full[:, :3])
        state = {}
        for t in range(tokens.size(1)):
            step = model.decoder(tokens[:, : t + 1], incremental_state=state)[0]
            assert_same(step[:, -1], full[:, t])
