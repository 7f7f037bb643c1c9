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
from fairseq_evomoe.modules.plan import TokenBatch
from fairseq_evomoe.tools import validation


@dataclass(frozen=True)
class Specialist:
    """What one expert specialises in.

    Attributes:
        share: the expert's share of its layer's (token, expert) pairs, 0 to 1.
        words: (word, number of its occurrences routed here, share of its occurrences routed here).
            Words are sorted by their surplus, largest first: how many more occurrences are routed
            here than the expert's share of all pairs predicts.
    """

    share: float
    words: list[tuple[str, int, float]]


def similarity(model: Any) -> dict[str, Tensor]:
    """Return the cosine of each pair of experts' weight matrices: layer -> (E, E) float32."""
    found = {}
    for _, layer in moe_layers(model):
        rows = [p.detach().float().flatten(1) for p in layer.experts.parameters() if p.dim() > 2]
        unit = F.normalize(torch.cat(rows, 1), dim=1)
        found[layer.name] = unit @ unit.t()
    return found


@dataclass
class Seen:
    """Routing counts of one layer over one pass.

    Attributes:
        came: for each expert, how often each token id was routed to it.
        seen: how often each token id occurred.
        active: token id -> number of active experts, summed over its occurrences.
        places: position in the sentence, from 1 -> (number of tokens at that position, their number
            of active experts, summed).
    """

    came: list[Counter[int]]
    seen: Counter[int] = field(default_factory=Counter)
    active: Counter[int] = field(default_factory=Counter)
    places: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(self, tokens: TokenBatch, active: Tensor) -> None:
        """Add the counts of a batch; `active` is (T, E) bool."""
        ids, number = tokens.token.tolist(), active.sum(1).tolist()
        place = tokens.place.tolist()
        self.seen.update(ids)
        for t, n, at in zip(ids, number, place, strict=True):
            self.active[t] += n
            there, total = self.places.get(at, (0, 0))
            self.places[at] = (there + 1, total + n)
        for row, expert in active.nonzero().tolist():
            self.came[expert][ids[row]] += 1


@torch.no_grad()
def watch(model: Any, task: Any, *, subset: str, max_tokens: int) -> dict[str, Seen]:
    """Run the model once over `subset` and return the routing counts of each MoE layer.

    Raises:
        ValueError: the set gives no batch.
    """
    model.eval()
    layers = dict(moe_layers(model))
    found = {n: Seen([Counter() for _ in range(m.cfg.moe_expert_count)]) for n, m in layers.items()}

    def count(name: str) -> Any:
        # the gate is called with states, phase and tokens
        return lambda gate, args, plan: found[name].add(args[2], plan.active)

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
            passed += 1
    finally:
        for hook in hooks:
            hook.remove()
    if not passed:
        raise ValueError(f"--subset {subset}: no batch fits; raise --max-tokens")
    return {layer.name: found[n] for n, layer in layers.items()}


def specialists(
    task: Any, found: dict[str, Seen], *, most: int = 12
) -> dict[str, list[Specialist]]:
    """Return each layer's experts, with up to `most` words per expert."""
    return {n: _of_layer(s.came, s.seen, dictionary_of(task, n), most) for n, s in found.items()}


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


def _of_layer(
    came: list[Counter[int]], seen: Counter[int], dictionary: Any, most: int
) -> list[Specialist]:
    pairs = sum(sum(c.values()) for c in came) or 1
    found = []
    for counts in came:
        share = sum(counts.values()) / pairs
        surplus = {i: n - share * seen[i] for i, n in counts.items()}
        top = sorted(surplus, key=lambda i: (-surplus[i], i))[:most]
        words = [(dictionary[i], counts[i], counts[i] / seen[i]) for i in top if surplus[i] > 0]
        found.append(Specialist(share, words))
    return found
