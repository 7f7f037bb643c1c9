"""fairseq_evomoe.hf: the same logits, routing and generation as fairseq's models."""

import fairseq_evomoe.hf  # noqa: F401  # before transformers; see there

# isort: split

import copy

import pytest
import torch
from conftest import build
from torch.nn import functional as F
from transformers import GenerationConfig

from fairseq_evomoe.hf.configuration_evomoe import EvoMoEMaskedLMConfig
from fairseq_evomoe.hf.feed_forward_evomoe import run_experts
from fairseq_evomoe.hf.look_up_evomoe import OPERATIONS, LookUp, look_up
from fairseq_evomoe.hf.masked_lm_evomoe import EvoMoEForSequenceClassification
from fairseq_evomoe.modules.moe_layer import moe_layers
from fairseq_evomoe.modules.plan import Phase
from fairseq_evomoe.schedule import Stage
from fairseq_evomoe.tools.to_hf.describe import describe
from fairseq_evomoe.tools.to_hf.weights import name_for_hf
from fairseq_evomoe.tools.to_hf.write import convert

EVERY = ("--moe-freq", 1)
WHOLE = ("--moe-freq", 0, "--memory-ffn", "--memory-attention", "--memory-bits", 4)
CASES = {
    "dense": ("translation", ("--moe-freq", 0)),
    "base expert alone": ("lm", EVERY),
    "dts soft": ("translation", (*EVERY, "--dts-threshold", 0.9)),
    "dts limited": ("lm", (*EVERY, "--dts-max-experts", 2, "--dts-combine", "renorm")),
    "dts hard": ("mlm", (*EVERY, "--dts-top-k", 2, "--dts-combine", "straight")),
    "dts raw": ("lm", (*EVERY, "--dts-combine", "raw", "--moe-gate-token-bias", 1)),
    "dts parity": ("translation", (*EVERY, "--dts-parity")),
    "dts hard lm": ("lm", (*EVERY, "--dts-noise", "none", "--dts-top-k", 2)),
    "switch": ("lm", (*EVERY, "--moe-gate", "switch", "--moe-shared-expert")),
    "switch biased": ("translation", (*EVERY, "--moe-gate", "switch", "--moe-balance-bias", 0.1)),
    "gshard pre-norm": (
        "translation",
        (
            *(*EVERY, "--moe-gate", "gshard", "--encoder-normalize-before"),
            *("--decoder-normalize-before", "--encoder-learned-pos", "--layernorm-embedding"),
        ),
    ),
    "topk": ("mlm", (*EVERY, "--moe-gate", "topk", "--moe-top-k", 3, "--moe-gate-token-bias", 1)),
    "topk 1": ("lm", (*EVERY, "--moe-gate", "topk", "--moe-top-k", 1)),
    "dense gate": ("lm", (*EVERY, "--moe-gate", "dense", "--moe-gate-loss-wt", 0)),
    "base": ("mlm", (*EVERY, "--moe-gate", "base", "--moe-gate-loss-wt", 0)),
    "hash": ("translation", (*EVERY, "--moe-gate", "hash", "--moe-gate-loss-wt", 0)),
    "stable": ("lm", (*EVERY, "--moe-gate", "stable")),
    "stable frozen": ("mlm", (*EVERY, "--moe-gate", "stable")),
    "expert choice": (
        "translation",
        (
            *("--moe-freq", 0, "--encoder-moe-freq", 1, "--moe-gate", "expert_choice"),
            *("--moe-choice-experts", 1.5, "--moe-gate-loss-wt", 0),
        ),
    ),
    "memory experts": (
        "lm",
        (*EVERY, "--moe-expert-type", "memory", "--memory-bits", 4, "--memory-linear"),
    ),
    "int8 experts": ("lm", (*EVERY, "--moe-gate", "switch", "--moe-expert-storage", "int8")),
    "memoryformer": (
        "translation",
        (*WHOLE, "--memory-score", "l1", "--memory-linear", "--memory-ffn-embed-dim", 50),
    ),
    "memoryformer int8": ("lm", (*WHOLE, "--memory-tables", "int8", "--memory-norm", "rms")),
    "memoryformer bf16": (
        "mlm",
        (*WHOLE, "--memory-tables", "bf16", "--memory-out-proj", "memory"),
    ),
    "beside": (
        "lm",
        (*WHOLE[:3], *WHOLE[4:], "--memory-parallel", "--memory-score", "abs_prob"),
    ),
    "n-grams": (
        "translation",
        ("--moe-freq", 0, "--memory-ngram", 3, "--memory-out-proj", "dense", *WHOLE[3:]),
    ),
    "n-grams of 4": ("lm", ("--moe-freq", 0, "--memory-ngram", 4)),
    "two widths": ("translation", (*EVERY, "--decoder-ffn-embed-dim", 48)),
    "narrow base expert": ("lm", ("--moe-freq", 2, "--moe-expert-ffn-dim", 48)),
    "widths": (
        "lm",
        (*EVERY, "--decoder-input-dim", 16, "--decoder-output-dim", 16, "--activation-fn", "gelu"),
    ),
}
HARD = ("dts hard", "dts hard lm", "dts parity", "stable frozen")


def pair(toy, case, dtype=torch.float32):
    """fairseq's model of a case, every weight random, and the one for transformers."""
    family, flags = CASES[case]
    cfg, task, model = build(toy, *flags, family=family)
    model.eval()
    soft = Phase(stage=Stage.SPARSIFY, temperature=0.6, anneal_left=0.3)
    for _, layer in moe_layers(model):
        # as in a checkpoint, whose stage no schedule decides any more
        layer.timeline.schedule = None
        layer.timeline.saved = soft
        if case in ("base expert alone", "narrow base expert"):
            layer.timeline.saved = Phase(stage=Stage.DIVERSIFY, temperature=2.0, anneal_left=1.0)
        elif case in HARD:
            layer.timeline.saved = Phase(stage=Stage.HARD, temperature=0.3)
        if case == "switch biased":
            layer.gate.bias_steps.random_(-9, 9)
        if case == "stable frozen":
            layer.gate.freeze()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1 or "ngrams" in name or "beside" in name or name.endswith("gate.weight"):
                p.add_(torch.randn_like(p) * 0.5)
    model.to(dtype)
    config = describe(model, cfg.model, 0.01)
    ours, _ = convert(model, config, model.state_dict())
    return family, task, model, ours


def text(task, model_type=None):
    """Padded ids, (4, 9), whose rows end in eos."""
    words = len(task.source_dictionary)
    ids = torch.randint(4, words, (4, 9))
    ids[:, -1] = 2
    ids[1, 5], ids[1, 6:] = 2, 1
    ids[3, 1], ids[3, 2:] = 2, 1
    return ids


def logits(family, model, ours, ids):
    """Logits of both models at real positions."""
    if family == "translation":
        target = ids.roll(1, 0)
        target = torch.cat([torch.full_like(target[:, :1], 2), target[:, :-1]], 1)
        want = model(ids, ids.ne(1).sum(1), target)[0]
        have = ours(input_ids=ids, decoder_input_ids=target).logits
        real = target.ne(1)
    else:
        want, have, real = model(ids)[0], ours(input_ids=ids).logits, ids.ne(1)
    return want[real], have[real]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_those_of_fairseq(toy, case):
    """On a padded batch, within 1e-5; and without padding a row has the same logits."""
    family, task, model, ours = pair(toy, case)
    ids = text(task)
    want, have = logits(family, model, ours, ids)
    assert want.std() > 0.05
    torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
    if family != "translation":
        mask = ids.ne(1).long()
        torch.testing.assert_close(ours(input_ids=ids, attention_mask=mask).logits[ids.ne(1)], have)


@pytest.mark.parametrize(
    "case", ["dts limited", "switch", "int8 experts", "memoryformer", "n-grams", "beside"]
)
@torch.no_grad()
def test_plain_torch_and_kernels_agree(toy, case, monkeypatch):
    """The operations that an exported folder brings give what the package's kernels give."""
    family, task, model, ours = pair(toy, case)
    ids = text(task)
    have = logits(family, model, ours, ids)[1]
    assert OPERATIONS["experts"] is not run_experts and OPERATIONS["look_up"] is not look_up
    monkeypatch.setitem(OPERATIONS, "experts", run_experts)
    monkeypatch.setitem(OPERATIONS, "look_up", look_up)
    # the kernel for int8 experts rounds its inputs to 16 bits
    close = 2e-4 if case == "int8 experts" else 1e-5
    torch.testing.assert_close(logits(family, model, ours, ids)[1], have, rtol=1e-5, atol=close)


@pytest.mark.parametrize("case", ["dts soft", "memory experts", "memoryformer", "beside"])
def test_gradients_are_those_of_fairseq(toy, case):
    """In float64, except for gates, which compute in float32 everywhere."""
    family, task, model, ours = pair(toy, case, torch.float64)
    want, have = logits(family, model, ours, text(task))
    direction = torch.randn_like(want)
    (want * direction).sum().backward()
    (have * direction).sum().backward()
    found = {name: p.grad for name, p in ours.named_parameters()}
    compared = 0
    for name, p in model.named_parameters():
        if name_for_hf(name) in found and p.grad is not None:
            grad = found[name_for_hf(name)]
            torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=3e-5)
            compared += 1
    assert compared > 20


@pytest.mark.parametrize("case", ["dts soft", "switch", "stable frozen", "gshard pre-norm", "hash"])
@torch.no_grad()
def test_routing_is_the_same_everywhere(toy, case):
    """Every token goes to the same experts in fairseq's model and in the exported one."""
    family, task, model, ours = pair(toy, case)
    ids = text(task)
    seen = {}
    gates = {layer.name: layer.gate for _, layer in moe_layers(model)}

    def keep(where, name):
        return lambda gate, args, plan: seen.setdefault((where, name), []).append(plan.active)

    hooks = [g.register_forward_hook(keep("fairseq", n)) for n, g in gates.items()]
    for name, module in ours.named_modules():
        if type(module).__name__ == "Router":
            side, _, number = name.split(".")[1:4]
            hooks.append(module.register_forward_hook(keep("hf", f"{side}.{number}")))
    logits(family, model, ours, ids)
    for hook in hooks:
        hook.remove()
    for name in gates:
        theirs, mine = seen["fairseq", name][0], seen["hf", name][0]
        # fairseq's rows go position by position, ours sentence by sentence
        real = ids if name.startswith("encoder") or family != "translation" else None
        if real is None:
            target = ids.roll(1, 0)
            real = torch.cat([torch.full_like(target[:, :1], 2), target[:, :-1]], 1)
        order = torch.full(real.t().shape, -1)
        order[real.t().ne(1)] = torch.arange(int(real.ne(1).sum()))
        assert torch.equal(theirs[order.t()[real.ne(1)]], mine), name


@pytest.mark.parametrize("case", ["switch", "topk 1", "dts hard lm", "stable"])
@torch.no_grad()
def test_a_token_keeps_its_experts_in_every_way(toy, case):
    """In training, validation and step by step, in fairseq's model and in the exported one."""
    _, task, model, ours = pair(toy, case)
    ids = torch.randint(4, len(task.source_dictionary), (3, 7))
    seen = []
    gates = [layer.gate for _, layer in moe_layers(model)]
    routers = [m for m in ours.modules() if type(m).__name__ == "Router"]
    for module in (*gates, *routers):
        module.register_forward_hook(lambda gate, args, plan: seen.append(plan.active))
    for module in model.modules():
        if isinstance(getattr(module, "p", None), float):
            module.p = 0.0

    def routed():
        """The experts of (layer, sentence, position); the rows of a call go by position first."""
        calls = [x.view(-1, len(ids), x.size(-1)) for x in seen]
        layers = [torch.cat(calls[i :: len(gates)]) for i in range(len(gates))]
        seen.clear()
        return torch.stack(layers).transpose(1, 2)

    model(ids)
    want = routed()
    assert want.any(-1).all() and want.float().mean((0, 1, 2)).max() < 1
    model.train()
    model(ids)
    assert torch.equal(routed(), want), "fairseq, in training"
    model.eval()
    state = {}
    for n in range(1, ids.size(1) + 1):
        model.decoder(ids[:, :n], incremental_state=state)
    assert torch.equal(routed(), want), "fairseq, step by step"
    cache = None
    for n in range(ids.size(1)):
        mask = torch.ones(len(ids), n + 1)
        cache = ours(input_ids=ids[:, n : n + 1], attention_mask=mask, cache=cache).cache
    assert torch.equal(routed(), want), "exported, step by step"
    ours(input_ids=ids)
    whole = torch.stack([x.view(*ids.shape, -1) for x in seen])
    assert torch.equal(whole, want), "exported"


@pytest.mark.parametrize(
    "case", ["dts soft", "switch", "gshard pre-norm", "memoryformer", "n-grams", "n-grams of 4"]
)
@torch.no_grad()
def test_a_cache_changes_nothing(toy, case):
    """Greedy search, beams and sampling give the same words with a cache and without."""
    family, task, _, ours = pair(toy, case)
    ids = text(task)[:3]
    if family == "lm":
        # prompts of a language model are padded on the left
        ids = torch.tensor([[2, 9, 8, 7], [1, 2, 5, 6], [1, 1, 2, 11]])
    given = {"input_ids": ids, "attention_mask": ids.ne(1).long(), "max_new_tokens": 8}
    for how in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 0}):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            plan = GenerationConfig(
                eos_token_id=2, pad_token_id=1, decoder_start_token_id=2, use_cache=use_cache, **how
            )
            plan.return_dict_in_generate = plan.output_logits = True
            found.append(ours.generate(**given, generation_config=plan))
        assert torch.equal(found[0].sequences, found[1].sequences), how
        for one, other in zip(found[0].logits, found[1].logits, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        if "do_sample" in how:
            assert len(set(found[0].sequences.flatten().tolist())) > 8


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(toy):
    """A prompt has the same next word whether it is padded or not."""
    _, _, _, ours = pair(toy, "dts raw")
    alone = torch.tensor([[2, 5, 6]])
    padded = torch.tensor([[1, 1, 2, 5, 6], [2, 9, 8, 7, 6]])
    want = ours(input_ids=alone).logits[0]
    torch.testing.assert_close(ours(input_ids=padded).logits[0, 2:], want, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_called_is_refused(toy):
    """Embeddings for gates that read ids, a mask of another length, n-grams behind a cache."""
    _, _, _, ours = pair(toy, "hash")
    states = torch.randn(1, 3, 32)
    with pytest.raises(ValueError, match="input_ids"):
        ours(inputs_embeds=states, decoder_input_ids=torch.tensor([[2, 5]]))
    with pytest.raises(ValueError, match="attention_mask has 2 positions"):
        ours(input_ids=torch.tensor([[5, 6, 2]]), attention_mask=torch.ones(1, 2))
    with pytest.raises(ValueError, match="either ids or embeddings"):
        ours(decoder_input_ids=torch.tensor([[2, 5]]))
    _, _, _, ours = pair(toy, "n-grams")
    source = {"input_ids": torch.tensor([[5, 6, 2]])}
    first = ours(**source, decoder_input_ids=torch.tensor([[2, 5]]), use_cache=True)
    with pytest.raises(ValueError, match="ids_before"):
        ours(**source, decoder_input_ids=torch.tensor([[6]]), cache=first.cache)


def test_ids_beyond_the_dictionary_are_unknown_words(toy):
    """A tokenizer gives such ids to pieces that training never saw."""
    _, task, _, ours = pair(toy, "topk 1")
    words = len(task.source_dictionary)
    with torch.no_grad():
        want = ours(input_ids=torch.tensor([[2, 3, 5]])).logits
        torch.testing.assert_close(ours(input_ids=torch.tensor([[2, words + 7, 5]])).logits, want)


@torch.no_grad()
def test_folded_tables_follow_the_weights(toy):
    """After autocast, in-place changes with a new mode, another dtype, a copy and a pickle."""
    _, task, _, ours = pair(toy, "memoryformer")
    ids = text(task)
    given = {"input_ids": ids, "decoder_input_ids": ids}
    before = ours(**given).logits
    with torch.autocast("cpu", torch.bfloat16):
        ours(**given)
    assert torch.equal(ours(**given).logits, before)
    layer = next(m for m in ours.modules() if isinstance(m, LookUp))
    assert layer._folded is not None and copy.deepcopy(layer)._folded is None
    layer.tables.data.mul_(2)
    changed = ours.eval()(**given).logits
    assert not torch.equal(changed, before)
    layer.tables.mul_(0.5)
    torch.testing.assert_close(ours(**given).logits, before)
    with torch.inference_mode():
        layer.tables = torch.nn.Parameter(layer.tables * 1)
        layer.linear = torch.nn.Parameter(layer.linear * 1)
        torch.testing.assert_close(ours(**given).logits, before)
        layer.tables.mul_(2)
        torch.testing.assert_close(ours(**given).logits, changed)


@pytest.mark.parametrize("case", ["memoryformer int8", "int8 experts"])
def test_scales_stay_float32(toy, case, tmp_path):
    """In half precision, and when a folder is loaded in it."""
    _, _, _, ours = pair(toy, case)
    ours.save_pretrained(tmp_path)
    for model in (type(ours).from_pretrained(tmp_path, dtype=torch.bfloat16), ours.half()):
        scales = {n: b.dtype for n, b in model.named_buffers() if "scale" in n}
        assert scales and set(scales.values()) == {torch.float32}
        assert model.lm_head.weight.dtype != torch.float32


def test_what_transformers_asks_for(toy):
    """Tuples, hidden states by argument and by configuration; what cannot be is refused."""
    _, task, _, ours = pair(toy, "gshard pre-norm")
    ids = text(task)
    given = {"input_ids": ids, "decoder_input_ids": ids[:, :3]}
    whole = ours(**given, output_hidden_states=True)
    assert len(whole.encoder_hidden_states) == len(whole.decoder_hidden_states) == 3
    assert isinstance(ours(**given, return_dict=False), tuple)
    assert ours(**given).decoder_hidden_states is None
    ours.config.output_hidden_states = True
    assert ours(**given).decoder_hidden_states is not None
    with pytest.raises(ValueError, match="cannot be resized"):
        ours.resize_token_embeddings(7)
    with pytest.raises(ValueError, match="static caches"):
        ours.generate(ids, cache_implementation="static", max_new_tokens=2)


def test_a_classifier_has_the_losses_of_transformers(toy):
    """Of one class, of several, and of a number."""
    config = EvoMoEMaskedLMConfig(
        **describe_of(toy, "mlm").to_dict() | {"tied": None, "num_labels": 3}
    )
    ids = torch.tensor([[0, 9, 8, 2], [0, 6, 2, 1]])
    for kind, labels, loss in (
        ("single_label_classification", torch.tensor([0, 2]), F.cross_entropy),
        ("multi_label_classification", torch.ones(2, 3), F.binary_cross_entropy_with_logits),
        ("regression", torch.zeros(2, 3), F.mse_loss),
    ):
        config.problem_type = kind
        output = EvoMoEForSequenceClassification(config).eval()(input_ids=ids, labels=labels)
        torch.testing.assert_close(output.loss, loss(output.logits, labels))


def describe_of(toy, family):
    """The configuration of a dense model."""
    cfg, _, model = build(toy, "--moe-freq", 0, family=family)
    return describe(model, cfg.model, 0.0)
