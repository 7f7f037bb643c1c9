"""What the experts of a trained model are like: which words they get, how alike they are."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_evomoe.modules.moe_layer import moe_layers
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


@torch.no_grad()
def specialists(
    model: Any, task: Any, *, subset: str, max_tokens: int, most: int = 12
) -> dict[str, list[Specialist]]:
    """One pass over `subset`: layer -> its experts and their words.

    Raises:
        ValueError: the set is empty.
    """
    model.eval()
    layers = dict(moe_layers(model))
    came: dict[str, list[Counter[int]]] = {
        n: [Counter() for _ in range(m.cfg.moe_expert_count)] for n, m in layers.items()
    }
    seen: dict[str, Counter[int]] = {n: Counter() for n in layers}

    def count(name: str, layer: Any):
        def hook(gate, args, plan):
            tokens = layer.tokens.token.tolist()
            seen[name].update(tokens)
            for t, e in plan.active.nonzero().tolist():
                came[name][e][tokens[t]] += 1

        return hook

    hooks = [m.gate.register_forward_hook(count(n, m)) for n, m in layers.items()]
    passed = 0
    try:
        for sample in validation.batches(model, task, subset, max_tokens):
            model(**sample["net_input"])
            passed += 1
    finally:
        for hook in hooks:
            hook.remove()
    if not passed:
        raise ValueError(f"--subset {subset}: no batch fits; raise --max-tokens")
    return {
        layer.name: _of_layer(came[n], seen[n], dictionary_of(task, layer.name), most)
        for n, layer in layers.items()
    }


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
