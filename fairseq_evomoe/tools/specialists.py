"""Analyses the experts of a trained model: which words they get, how similar they are, and how many
of them a token uses."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from fairseq_evomoe.modules.moe_layer import moe_layers
from fairseq_evomoe.modules.plan import RoutingPlan, TokenBatch
from fairseq_evomoe.tools import validation
from fairseq_evomoe.tools.words import words_of_ids


@dataclass(frozen=True)
class Specialist:
    """What one expert specialises in.

    Attributes:
        share: the expert's share of its layer's (token, expert) pairs, 0 to 1.
        words: (word, number of its tokens routed here, share of its tokens routed here). Words are
            sorted by their surplus, largest first: how many more tokens are routed here than the
            expert's share of all pairs predicts.
    """

    share: float
    words: list[tuple[str, int, float]]


def similarity(model: Any) -> dict[str, Tensor]:
    """Return the cosine of each pair of experts' weight matrices: layer -> (E, E) float32."""
    found = {}
    for _, layer in moe_layers(model):
        rows = torch.cat([m.flatten(1) for m in layer.experts.matrices()], 1)
        unit = F.normalize(rows, dim=1)
        found[layer.name] = unit @ unit.t()
    return found


@dataclass
class Seen:
    """Routing counts of one layer over one pass.

    Attributes:
        came: for each expert, how many tokens of each word were routed to it.
        seen: how many tokens each word had. A word that is split into pieces has several at once.
        active: word -> number of active experts, summed over its tokens.
        places: position in the sentence, from 1 -> (number of tokens at that position, their number
            of active experts, summed).
    """

    came: list[Counter[str]]
    seen: Counter[str] = field(default_factory=Counter)
    active: Counter[str] = field(default_factory=Counter)
    places: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(self, tokens: TokenBatch, words: list[str], active: Tensor) -> None:
        """Add the counts of a batch: the word of each token, and `active`, (T, E) bool."""
        number, place = active.sum(1).tolist(), tokens.place.tolist()
        self.seen.update(words)
        for t, n, at in zip(words, number, place, strict=True):
            self.active[t] += n
            there, total = self.places.get(at, (0, 0))
            self.places[at] = (there + 1, total + n)
        for row, expert in active.nonzero().tolist():
            self.came[expert][words[row]] += 1


def experts_of_tokens(plan: RoutingPlan) -> list[list[tuple[int, float]]]:
    """Each token's active experts with their weights, the largest weight first."""
    order = plan.weights.masked_fill(~plan.active, -torch.inf).sort(-1, descending=True)
    rows = zip(
        order.indices.tolist(), order.values.tolist(), plan.active.sum(-1).tolist(), strict=True
    )
    return [list(zip(e[:n], w[:n], strict=True)) for e, w, n in rows]


def words_of_tokens(tokens: TokenBatch, dictionary: Any) -> list[str]:
    """The word that each real token of a batch belongs to, in the order of the layer's rows."""
    table = words_of_ids(tokens.ids, dictionary)
    flat = [row[place] for place in range(tokens.ids.size(1)) for row in table]
    return flat if tokens.real is None else [flat[i] for i in tokens.real.tolist()]


@torch.no_grad()
def watch(model: Any, task: Any, *, subset: str, max_tokens: int) -> dict[str, Seen]:
    """Run the model once over `subset` and return the routing counts of each MoE layer.

    Raises:
        ValueError: the set gives no batch.
    """
    model.eval()
    layers = dict(moe_layers(model))
    found = {n: Seen([Counter() for _ in range(m.cfg.moe_expert_count)]) for n, m in layers.items()}

    words: dict[TokenBatch, list[str]] = {}

    def count(name: str) -> Any:
        def hook(gate: Any, args: Any, plan: RoutingPlan) -> None:
            tokens = args[2]  # the gate is called with states, phase and tokens
            if tokens not in words:
                words[tokens] = words_of_tokens(tokens, dictionary_of(task, layers[name].name))
            found[name].add(tokens, words[tokens], plan.active)

        return hook

    hooks = [m.gate.register_forward_hook(count(n)) for n, m in layers.items()]
    passed = 0
    try:
        for sample in tqdm(
            validation.batches(model, task, subset, max_tokens),
            desc=f"experts on {subset}",
            unit="batch",
            disable=None,
        ):
            model(**sample["net_input"])
            words.clear()
            passed += 1
    finally:
        for hook in hooks:
            hook.remove()
    if not passed:
        raise ValueError(f"--subset {subset}: no batch fits; raise --max-tokens")
    return {layer.name: found[n] for n, layer in layers.items()}


def specialists(found: dict[str, Seen], *, most: int = 12) -> dict[str, list[Specialist]]:
    """Return each layer's experts, with up to `most` words per expert."""
    return {name: _of_layer(seen.came, seen.seen, most) for name, seen in found.items()}


@dataclass(frozen=True)
class Activity:
    """How many experts a layer's tokens use.

    Attributes:
        mean: mean number of active experts over all tokens.
        by_frequency: (number of words, number of tokens, mean active experts) of each frequency
            class. Words are sorted by falling frequency and cut into classes with about the same
            number of tokens.
        by_place: (first position, last position, number of tokens, mean active experts) of each
            class of positions, which start at 1. Each class is twice as long as the one before, and
            the last one is open-ended.
    """

    mean: float
    by_frequency: list[tuple[int, int, float]]
    by_place: list[tuple[int, int, int, float]]


def activity(seen: Seen, *, classes: int = 5, lengths: int = 6) -> Activity:
    """Return the number of active experts by word frequency and by position in the sentence."""
    total = sum(seen.seen.values())
    by_frequency: list[tuple[int, int, float]] = []
    words = tokens = experts = passed = 0
    order = seen.seen.most_common()
    for i, (word, n) in enumerate(order):
        words, tokens, passed = words + 1, tokens + n, passed + n
        experts += seen.active[word]
        full = passed * classes >= total * (len(by_frequency) + 1)
        if full or i + 1 == len(order):
            by_frequency.append((words, tokens, experts / tokens))
            words = tokens = experts = 0
    by_place = []
    for k in range(lengths):
        first, last = 2**k, max(seen.places) if k + 1 == lengths else 2 ** (k + 1) - 1
        mine = [v for at, v in seen.places.items() if first <= at <= last]
        if mine:
            n = sum(x for x, _ in mine)
            last = min(last, max(seen.places))
            by_place.append((first, last, n, sum(x for _, x in mine) / n))
    return Activity(sum(seen.active.values()) / total, by_frequency, by_place)


def dictionary_of(task: Any, layer: str) -> Any:
    """Return the dictionary of a layer's input tokens.

    It is the source dictionary in a translation model's encoder, otherwise the target dictionary.
    """
    if layer.startswith("encoder") and getattr(task, "source_dictionary", None) is not None:
        return task.source_dictionary
    return task.target_dictionary


def _of_layer(came: list[Counter[str]], seen: Counter[str], most: int) -> list[Specialist]:
    pairs = sum(sum(c.values()) for c in came) or 1
    found = []
    for counts in came:
        share = sum(counts.values()) / pairs
        surplus = {i: n - share * seen[i] for i, n in counts.items()}
        top = sorted(surplus, key=lambda i: (-surplus[i], i))[:most]
        words = [(i, counts[i], counts[i] / seen[i]) for i in top if surplus[i] > 0]
        found.append(Specialist(share, words))
    return found
