"""The baseline gates that DTS is compared with, against loops over their formulas; their limits."""

import importlib.metadata
import itertools
import json
import math

import pytest
import torch
from gate_kit import HARD, SOFT, D, E, Words, batch, gate, softmax

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.modules.gates import GATES, GateContext
from fairseq_evomoe.modules.gates import base_assignment as base
from fairseq_evomoe.modules.gates.expert_choice import choose_tokens
from fairseq_evomoe.modules.gates.hash import balance_by_count, counts_of
from fairseq_evomoe.modules.plan import Phase, TokenBatch

PHASE = Phase(stage=SOFT, temperature=1.0)


def capacity_rows(choices, limit, order):
    """Which pairs GShard keeps, token by token.

    `choices` lists the first, second, ... choices, each with one expert per token.
    """
    used = [0] * E
    kept = []
    for experts in choices:
        ok = [False] * len(experts)
        place = list(used)
        for t in order:
            place[experts[t]] += 1
            ok[t] = place[experts[t]] <= limit
        # the next choice queues behind all pairs of this one, dropped or not
        used = place
        kept.append(ok)
    return kept


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 6.0])
@pytest.mark.parametrize("prioritized", [False, True])
def test_switch_capacity(factor, prioritized):
    """In training an expert takes ceil(c T / E) tokens, by position or by falling probability."""
    flags = {"moe_capacity_factor": factor, "moe_batch_prioritized_routing": prioritized}
    made = gate("switch", training=True, **flags)
    plan = made(torch.randn(23, D), PHASE)
    rows = [softmax(z) for z in plan.logits.tolist()]
    best = [max(range(E), key=lambda e: p[e]) for p in rows]
    order = sorted(range(23), key=lambda t: -max(rows[t])) if prioritized else range(23)
    (kept,) = capacity_rows([best], math.ceil(factor * 23 / E), order)
    for t in range(23):
        want = [rows[t][e] if e == best[t] and kept[t] else 0.0 for e in range(E)]
        assert plan.weights[t].tolist() == pytest.approx(want, abs=1e-6)
    assert plan.chosen.sum(1).tolist() == [1] * 23
    assert (plan.chosen & ~plan.active).sum() == 23 - sum(kept)
    # eq. 5 counts the choices before any is dropped
    share = [best.count(e) / 23 for e in range(E)]
    mean = [sum(p[e] for p in rows) / 23 for e in range(E)]
    loss = E * sum(f * m for f, m in zip(share, mean, strict=True))
    assert made.balance_loss(plan, made.expert_load(plan)).item() == pytest.approx(loss, rel=1e-5)
    assert made.eval()(torch.randn(50, D), PHASE).active.sum(1).tolist() == [1] * 50


def test_capacity_makes_a_token_depend_on_those_before_it():
    """With a capacity, a token that is kept when alone is dropped behind others like it."""
    made = gate("switch", training=True, moe_capacity_factor=1.0)
    x = torch.randn(1, D).expand(12, D)
    assert made(x[:1], PHASE).active.any(1).tolist() == [True]
    assert made(x, PHASE).active.any(1).tolist() == [True, True] + [False] * 10


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("policy", ["all", "random", "sampling"])
@pytest.mark.parametrize("factor", [None, 0.7])
def test_gshard(policy, before, factor):
    """Experts, capacity and weights equal those of algorithm 1 with the same random draws."""
    made = gate(
        "gshard",
        training=True,
        moe_second_expert_policy=policy,
        moe_normalize_gate_prob_before_dropping=before,
        moe_capacity_factor=factor,
    )
    x = torch.randn(23, D)
    torch.manual_seed(5)
    plan = made(x, PHASE)
    torch.manual_seed(5)
    noise = torch.empty(23, E).exponential_().log() if policy == "sampling" else torch.zeros(23, E)
    draws = torch.rand(23) if policy == "random" else torch.zeros(23)
    p = [softmax(z) for z in plan.logits.tolist()]
    first, second, taken = [], [], []
    for t in range(23):
        a = max(range(E), key=lambda e: p[t][e])
        noisy = (plan.logits[t] - noise[t]).tolist()
        b = max((e for e in range(E) if e != a), key=lambda e: noisy[e])
        share = p[t][b] / (p[t][a] + p[t][b]) if before else p[t][b]
        first.append(a), second.append(b), taken.append(draws[t].item() < 2 * share)
    if factor:
        limit = math.ceil(factor * 2 * 23 / E)
        # a second choice that was not taken uses up no capacity
        (keep1,) = capacity_rows([first], limit, range(23))
        used = [first.count(e) for e in range(E)]
        keep2 = []
        for t in range(23):
            used[second[t]] += taken[t]
            keep2.append(taken[t] and used[second[t]] <= limit)
    else:
        keep1, keep2 = [True] * 23, taken
    for t in range(23):
        a, b = p[t][first[t]], p[t][second[t]]
        weights = [a * keep1[t], b * keep2[t]]
        total = a + b if before else sum(weights) or 1
        want = [0.0] * E
        want[first[t]], want[second[t]] = weights[0] / total, weights[1] / total
        assert plan.weights[t].tolist() == pytest.approx(want, abs=1e-6)
    share = [first.count(e) / 23 for e in range(E)]
    mean = [sum(p[t][e] for t in range(23)) / 23 for e in range(E)]
    loss = E * sum(f * m for f, m in zip(share, mean, strict=True))
    assert made.balance_loss(plan, made.expert_load(plan)).item() == pytest.approx(loss, rel=1e-5)


def test_gshard_evaluates_the_two_best():
    """Evaluation has no random draw and no capacity, whatever the policy."""
    made = gate("gshard", moe_second_expert_policy="random", moe_capacity_factor=0.5)
    x = torch.randn(40, D)
    plan = made(x, PHASE)
    assert torch.equal(plan.active.sum(1), torch.full((40,), 2))
    assert torch.allclose(plan.weights.sum(1), torch.ones(40))
    assert torch.equal(plan.weights, made(x, PHASE).weights)


def best_total(scores, limit):
    """Total score of the best assignment, found by trying all of them."""
    tokens, experts = scores.shape
    totals = (
        sum(scores[t, e].item() for t, e in enumerate(a))
        for a in itertools.product(range(experts), repeat=tokens)
        if max(a.count(e) for e in range(experts)) <= limit
    )
    return max(totals)


@pytest.fixture(params=["auction", "scipy"])
def solver(request, monkeypatch):
    """fairseq's compiled auction, or the scipy solver that replaces it if it is missing."""
    if request.param == "scipy":
        monkeypatch.setattr(base, "libbase", None)
    elif base.libbase is None:
        # the one thing that the wheel of ve-fairseq lacks
        installed = importlib.metadata.packages_distributions()["fairseq"]
        assert "ve-fairseq" in installed, "fairseq was compiled without libbase"
        pytest.skip("the libbase of ve-fairseq does not load")
    return request.param


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 6, 7])
def test_balanced_assignment_is_the_best(solver, tokens):
    """Each expert gets at most ceil(T / E) tokens, and no such assignment scores higher."""
    scores = torch.randn(tokens, 3)
    expert = base.balanced_assignment(scores)
    limit = math.ceil(tokens / 3)
    assert expert.bincount(minlength=3).max() <= limit
    total = scores.gather(1, expert[:, None]).sum().item()
    assert total == pytest.approx(best_total(scores, limit), abs=1e-2)


@pytest.mark.parametrize("tokens", [1, 4, 64, 1000, 1003])
def test_balanced_assignment_survives_ties_and_nan(solver, tokens):
    """Ties, at which the auction loses tokens, NaN and infinity still give each token an expert."""
    cases = [torch.zeros(tokens, 4), torch.randn(tokens, 1).expand(tokens, 4).clone()]
    cases.append(torch.full((tokens, 4), float("nan")))
    wild = torch.randn(tokens, 4)
    wild[0, 1], wild[-1, 2] = float("nan"), float("inf")
    for scores in (*cases, wild):
        before = scores.clone()
        count = base.balanced_assignment(scores).bincount(minlength=4)
        assert count.sum() == tokens and count.max() <= math.ceil(tokens / 4)
        assert torch.equal(scores.isnan(), before.isnan()), "the logits are not modified"


def test_base(solver):
    """The weight is sigmoid(z) of the assigned expert, evaluation is greedy, and the router starts
    with orthogonal rows of norm 0.1."""
    made = gate("base", training=True)
    gram = made.weight @ made.weight.t() / 40**2
    assert torch.allclose(gram, 0.01 * torch.eye(E), atol=1e-6)
    x = torch.randn(24, D)
    plan = made(x, PHASE)
    assert plan.active.sum(1).tolist() == [1] * 24 and plan.active.sum(0).tolist() == [4] * E
    want = [[1 / (1 + math.exp(-v)) for v in row] for row in plan.logits.tolist()]
    assert torch.allclose(plan.weights, torch.tensor(want) * plan.active, atol=1e-6)
    greedy = made.eval()(x, PHASE)
    assert torch.equal(greedy.active.int().argmax(1), greedy.logits.argmax(1))


def test_base_training_depends_on_the_batch():
    """BASE is not invariant in training: a token's expert changes with the token's neighbours."""
    made = gate("base", training=True)
    x = torch.randn(1, D)
    alone = made(x, PHASE).active
    crowd = torch.cat([x * 2, x * 2, x])
    assert not torch.equal(made(torch.cat([crowd, x * 3, x * 3]), PHASE).active[2:3], alone) or (
        not torch.equal(made(crowd, PHASE).active[2:3], alone)
    )


def test_hash_routes_by_token_alone():
    """The token's expert has weight 1, whatever the token's state and position."""
    made, tokens = gate("hash", training=True), batch(3, 4)
    plan = made(torch.randn(12, D), PHASE, tokens)
    flat = tokens.ids.t().reshape(-1)
    assert torch.equal(plan.active.int().argmax(1), made.table[flat])
    assert torch.equal(plan.weights, plan.active.float())
    with pytest.raises(ValueError, match="--moe-gate hash routes by token ids"):
        made(torch.randn(12, D), PHASE)


def test_balanced_hash_is_the_greedy_rule():
    """Token ids go, by falling count, each to the expert with the lowest total count so far."""
    counts = Words.count
    load, want = [0] * 3, [0] * len(counts)
    for token in sorted(range(len(counts)), key=lambda t: -counts[t]):
        expert = min(range(3), key=lambda e: (load[e], e))
        want[token] = expert
        load[expert] += counts[token]
    assert balance_by_count(counts, 3, {}).tolist() == want
    assert max(load) / min(load) < 1.6, "the most frequent word alone is a quarter of all"
    unseen = balance_by_count([0] * 40, 4, {})
    assert unseen.bincount().tolist() == [10] * 4, "words without a count are spread evenly too"


def test_frequent_symbols_that_a_dictionary_does_not_count():
    """The end of a sentence and the mask count like the most frequent word."""

    class Text(Words):
        symbols = ["</s>", *Words.symbols, "<mask>"]
        indices = {s: i for i, s in enumerate(symbols)}
        count = [1, *Words.count, 1]
        eos_word = "</s>"

    assert counts_of(Text()) == [1000, *Words.count, 1000]


def test_random_hash_is_seeded():
    """The same seed gives the same table, in which more than two experts occur."""
    one, two = (gate("hash", moe_hash_mapping="random").table for _ in range(2))
    assert torch.equal(one, two) and len(one.unique()) > 2


def test_hash_mapping_file(tmp_path):
    """Tokens in the file go where it says, and the others are balanced around them."""
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"w0": 5, "w7": 2, "unknown": 1}))
    table = gate("hash", moe_hash_mapping=str(path)).table
    assert table[0] == 5 and table[7] == 2 and table[1] != 5


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not a JSON file"),
        ("[1, 2]", "holds a list"),
        ('{"w1": 6}', "goes to expert 6"),
        ('{"w1": true}', "goes to expert True"),
        ('{"x": 1}', "none of its tokens is in the dictionary"),
    ],
)
def test_bad_hash_mapping_file(tmp_path, content, message):
    """Each fault of the file is named."""
    path = tmp_path / "map.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        gate("hash", moe_hash_mapping=str(path))


def test_missing_hash_mapping_file_is_refused_unless_the_checkpoint_has_the_table(tmp_path):
    """Inference on another machine needs no file, because the table is saved with the weights."""
    made, tokens = gate("hash", moe_hash_mapping="gone.json"), batch(2, 3)
    with pytest.raises(ValueError, match="--moe-hash-mapping gone.json: no such file"):
        made(torch.randn(6, D), PHASE, tokens)
    made.load_state_dict(gate("hash").state_dict())
    assert made(torch.randn(6, D), PHASE, tokens).active.any(1).all()


def test_stable_first_stage():
    """Routing is top-1 with a sigmoid weight; both losses equal loops over the paper's formulas."""
    made, tokens = gate("stable", training=True), batch(5, 4)
    plan = made(torch.randn(20, D), PHASE, tokens)
    z = plan.logits.tolist()
    best = [max(range(E), key=lambda e: row[e]) for row in z]
    sigmoid = [1 / (1 + math.exp(-row[b])) for row, b in zip(z, best, strict=True)]
    for t in range(20):
        want = [sigmoid[t] if e == best[t] else 0.0 for e in range(E)]
        assert plan.weights[t].tolist() == pytest.approx(want, abs=1e-6)
    mean = 20 / E
    balance = sum((best.count(e) - mean) / mean * s for e, s in zip(best, sigmoid, strict=True))
    load = plan.active.sum(0)
    assert made.balance_loss(plan, load).item() == pytest.approx(balance / 20, rel=1e-4)
    loss = 0.0
    for t, token in enumerate(tokens.token.tolist()):
        row = softmax((made.distilled @ made.words[token]).tolist())
        loss -= math.log(row[best[t]]) / 20
    assert plan.distill_loss.item() == pytest.approx(loss, rel=1e-4)
    assert {id(p) for p in made.unused_parameters(PHASE)} == {id(made.words), id(made.distilled)}


def test_stable_second_stage_is_frozen():
    """After the freeze a token's expert is a function of its id that no training changes."""
    made, tokens = gate("stable", training=True), batch(5, 4)
    hard = Phase(stage=HARD, temperature=1.0)
    assert not made.frozen
    made.freeze()
    x = torch.randn(20, D)
    plan = made(x, hard, tokens)
    router = made.words @ made.distilled.t()
    assert torch.equal(plan.active.int().argmax(1), router[tokens.token].argmax(1))
    with torch.no_grad():
        made.words.normal_(), made.weight.normal_()
    made.freeze()
    again = made(x, hard, tokens)
    assert torch.equal(again.active, plan.active) and again.distill_loss is None
    assert not torch.allclose(again.weights, plan.weights), "the combine weight is still trained"
    assert {id(p) for p in made.unused_parameters(hard)} == {id(made.words), id(made.distilled)}
    fresh = gate("stable")
    fresh.load_state_dict(made.state_dict())
    assert fresh.frozen and torch.equal(fresh(x, hard, tokens).active, plan.active)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, float(E)])
def test_expert_choice(factor):
    """In each sentence each expert takes its round(c n / E) best tokens, at least one."""
    made = gate("expert_choice", moe_choice_experts=factor)
    ids = torch.full((3, 9), 99)
    for row, n in zip(ids, (9, 4, 1), strict=True):
        row[:n] = torch.arange(n)
    tokens = TokenBatch(ids, pad=99)
    plan = made(torch.randn(14, D), PHASE, tokens)
    for sentence, n in enumerate((9, 4, 1)):
        mine = [t for t in range(14) if tokens.sentence[t] == sentence]
        assert len(mine) == n
        take = max(1, round(factor * n / E))
        for e in range(E):
            ranked = sorted(mine, key=lambda t: -plan.probs[t, e].item())
            chosen = {t for t in mine if plan.active[t, e]}
            assert chosen == set(ranked[:take])
    assert torch.equal(plan.weights, plan.probs * plan.active)


def test_expert_choice_over_the_batch_depends_on_the_batch():
    """Choosing over the whole batch, as the paper does, lets a neighbour take a token's place."""
    probs = torch.tensor([[0.6, 0.4], [0.9, 0.1]])
    alone = choose_tokens(probs[:1], torch.zeros(1, dtype=torch.int64), 1.0)
    together = choose_tokens(probs, torch.zeros(2, dtype=torch.int64), 1.0)
    assert alone.tolist() == [[True, True]] and together[:1].tolist() == [[False, True]]
    by_sentence = choose_tokens(probs, torch.tensor([0, 1]), 1.0)
    assert by_sentence[:1].tolist() == alone.tolist()


def test_expert_choice_is_refused_in_decoders():
    """Expert choice would see the future in a decoder; the error says where it can be used."""
    cfg = MoEConfig(moe_freq=1, moe_expert_count=E, moe_gate="expert_choice").check(GATES)
    context = GateContext(dim=D, name="decoder.1", generator=torch.Generator(), causal=True)
    with pytest.raises(ValueError, match="--moe-gate expert_choice in decoder.1"):
        GATES["expert_choice"](cfg, context)


@pytest.mark.parametrize("name", ["dts", "switch", "topk", "gshard"])
def test_balance_bias(name):
    """The bias b moves by u towards an even load and affects the choice of experts, not weights."""
    made = gate(name, training=True, moe_balance_bias=0.5)
    x = torch.randn(60, D)
    phase = Phase(stage=HARD, temperature=1.0)
    load = made(x, phase).active.sum(0) + made(x, phase).active.sum(0)
    made.after_update(phase, lambda: load.float())
    want = [(load.float().mean() > n) * 1 - (load.float().mean() < n) * 1 for n in load]
    assert made.bias_steps.tolist() == [int(w) for w in want]
    made.eval()
    made.bias_steps.fill_(0)
    plain = made(x, phase)
    made.bias_steps[2] = 10**6
    plan = made(x, phase)
    assert plan.active[:, 2].all()
    assert torch.equal(plan.probs, plain.probs)
    if name == "switch":
        assert torch.equal(plan.weights[:, 2], plan.probs[:, 2])


def test_balance_bias_evens_the_load():
    """Over many updates the busiest expert's load falls to near the mean, in half precision too."""
    made = gate("switch", training=True, moe_balance_bias=0.05).half()
    x = torch.randn(600, D).half() + 1
    before = made(x, PHASE).active.sum(0).max().item()
    for _ in range(300):
        load = made(x, PHASE).active.sum(0).float()
        made.after_update(PHASE, lambda load=load: load)
    after = made(x, PHASE).active.sum(0).max().item()
    assert before > 180 and after < 120


@pytest.mark.parametrize("name", ["dts", "switch", "gshard", "topk", "dense", "base"])
def test_token_bias(name):
    """With z = W x + U[token] a token adds the same logits at every position, and U is learned."""
    made, tokens = gate(name, training=True, moe_gate_token_bias=1.0), batch(3, 4)
    x = torch.randn(12, D)
    plan = made(x, PHASE, tokens)
    want = x @ made.weight.t() + made.token_bias[tokens.token]
    assert torch.allclose(plan.logits, want, atol=1e-5)
    assert made.token_bias.std().item() == pytest.approx(1.0, rel=0.2)
    (plan.weights * torch.randn(12, E)).sum().backward()
    used = made.token_bias.grad.abs().sum(1) > 0
    assert used.nonzero().squeeze(1).tolist() == sorted(set(tokens.token.tolist()))
    with pytest.raises(ValueError, match="--moe-gate-token-bias: this layer was given no token"):
        made(x, PHASE)


def test_the_token_bias_comes_in_as_the_dense_to_sparse_gate_cools():
    """The DTS gate scales its token bias from 0 at the split to 1 at the end of annealing; other
    gates use all of it from the start."""
    x, tokens = torch.randn(12, D), batch(3, 4)
    for name, factor in (("dts", 0.25), ("switch", 1.0)):
        made = gate(name, training=True, moe_gate_token_bias=3.0)
        plan = made(x, Phase(stage=SOFT, temperature=1.0, anneal_left=0.75), tokens)
        want = x @ made.weight.t() + factor * made.token_bias[tokens.token]
        assert torch.allclose(plan.logits, want, atol=1e-5)


@pytest.mark.parametrize("name", ["dts", "hash", "base", "stable", "topk", "dense"])
def test_a_capacity_is_refused_where_there_is_none(name):
    """A capacity that a gate cannot use is refused with the names of the flag and the gate."""
    with pytest.raises(ValueError, match=f"--moe-capacity-factor 1.0: --moe-gate {name}"):
        gate(name, moe_capacity_factor=1.0)
    with pytest.raises(ValueError, match="--moe-batch-prioritized-routing True"):
        gate("switch", moe_batch_prioritized_routing=True)


@pytest.mark.parametrize("name", ["hash", "stable"])
def test_token_bias_is_refused_where_tokens_route_anyway(name):
    with pytest.raises(ValueError, match=f"--moe-gate-token-bias 1.0: --moe-gate {name}"):
        gate(name, moe_gate_token_bias=1.0)
