"""What the experts of a trained model are like: which words they get, how alike they are, and how
many of them a token uses."""

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
    """One expert.

    Attributes:
        share: of its layer's pairs, 0 to 1.
        words: (word, times it came here, share of its occurrences that did), the most telling
            first: by how many more of them come than the expert's share would bring.
    """

    share: float
    words: list[tuple[str, int, float]]


def similarity(model: Any) -> dict[str, Tensor]:
    """Cosines of each two experts' weight matrices: layer -> (E, E) float32."""
    found = {}
    for _, layer in moe_layers(model):
        rows = [p.detach().float().flatten(1) for p in layer.experts.parameters() if p.dim() > 2]
        unit = F.normalize(torch.cat(rows, 1), dim=1)
        found[layer.name] = unit @ unit.t()
    return found


@dataclass
class Seen:
    """What one layer did in a pass.

    Attributes:
        came: for each expert, how often each token id came to it.
        seen: how often each token id passed.
        active: token id -> active experts, summed over its occurrences.
        places: place in the sentence, from 1 -> (tokens there, their active experts in sum).
    """

    came: list[Counter[int]]
    seen: Counter[int] = field(default_factory=Counter)
    active: Counter[int] = field(default_factory=Counter)
    places: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(self, tokens: TokenBatch, active: Tensor) -> None:
        """Count a batch; active: (T, E) bool."""
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
    """One pass over `subset`: MoE layer -> what it did.

    Raises:
        ValueError: the set is empty.
    """
    model.eval()
    layers = dict(moe_layers(model))
    found = {n: Seen([Counter() for _ in range(m.cfg.moe_expert_count)]) for n, m in layers.items()}

    def count(name: str, layer: Any):
        return lambda gate, args, plan: found[name].add(layer.tokens, plan.active)

    hooks = [m.gate.register_forward_hook(count(n, m)) for n, m in layers.items()]
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
    """Layer -> its experts and their words."""
    return {n: _of_layer(s.came, s.seen, dictionary_of(task, n), most) for n, s in found.items()}


@dataclass(frozen=True)
class Activity:
    """How many experts a layer's tokens use.

    Attributes:
        mean: over all tokens.
        by_frequency: (words of the class, tokens, mean active experts); words by falling
            frequency, cut into classes of about equally many tokens.
        by_place: (first place, last place, tokens, mean active experts), places from 1; each class
            twice as long as the one before, the last open.
    """

    mean: float
    by_frequency: list[tuple[int, int, float]]
    by_place: list[tuple[int, int, int, float]]


def activity(seen: Seen, *, classes: int = 5, lengths: int = 6) -> Activity:
    """The number of active experts against how frequent a word is, and where it stands."""
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
    """The words that a layer sees: the source's in a translation model's encoder."""
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
