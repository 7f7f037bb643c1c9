"""Hash gate: the token id determines the expert. Letters: T tokens, E experts, V vocabulary."""

import heapq
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.modules.gates.base import Gate, GateContext, mask_of, register_gate
from fairseq_evomoe.modules.plan import Phase, RoutingPlan, TokenBatch
from fairseq_evomoe.schedule import Stage


@register_gate("hash")
class HashGate(Gate):
    """A fixed table from token id to expert, with weight 1 and nothing to learn (arXiv 2106.04426).

    `--moe-hash-mapping random` draws an expert for each id. `balanced` assigns ids, most frequent
    first, to the expert with the least load so far, by the dictionary's counts (section 3.1). A
    dictionary joined over two languages counts both, so each side is balanced less well. Otherwise
    the flag names a JSON file {token: expert}, for instance of clusters; tokens that are not in it
    are balanced over the experts. The token is the one at the layer's position: the source word in
    an encoder, the previous target word in a decoder, and the mask itself where a masked LM hides a
    word. The table is saved with the weights.
    """

    flags = ("--moe-hash-mapping",)
    can_lose_experts = False
    balanced_by_loss = False
    has_router = False
    table: Tensor

    def __init__(self, cfg: MoEConfig, context: GateContext) -> None:
        super().__init__(cfg, context)
        context.vocabulary("--moe-gate hash")
        self.register_buffer("table", _table(cfg, context))
        self._complete = False

    def check_ready(self) -> None:
        self.cfg.need(bool((self.table >= 0).all()), "--moe-hash-mapping", "no such file")

    @classmethod
    def check(cls, cfg: MoEConfig) -> None:
        super().check(cfg)
        cfg.need(
            cfg.moe_hash_mapping in ("random", "balanced") or cfg.moe_hash_mapping.endswith("json"),
            "--moe-hash-mapping",
            "choose random, balanced, or a file that ends in .json",
        )

    @classmethod
    def experts_per_token(cls, cfg: MoEConfig, stage: Stage) -> float:
        return 1

    def forward(self, x: Tensor, phase: Phase, tokens: TokenBatch | None = None) -> RoutingPlan:
        if tokens is None:
            raise ValueError("--moe-gate hash routes by token ids, and this layer was given none")
        if not self._complete:
            self.check_ready()
            self._complete = True
        active = mask_of(self.table[tokens.token], self.cfg.moe_expert_count)
        weights = active.float()
        return RoutingPlan(
            weights=weights,
            active=active,
            probs=weights,
            logits=torch.zeros_like(weights),
            max_active=1,
        )


def _table(cfg: MoEConfig, context: GateContext) -> Tensor:
    vocabulary, experts = len(context.dictionary), cfg.moe_expert_count
    if cfg.moe_hash_mapping == "random":
        return torch.randint(experts, (vocabulary,), generator=context.generator)
    fixed: dict[int, int] = {}
    if cfg.moe_hash_mapping != "balanced":
        path = Path(cfg.moe_hash_mapping)
        if not path.is_file():
            # a checkpoint brings its own table; training is refused as long as there is none
            return torch.full((vocabulary,), -1)
        fixed = read_mapping(path, context.dictionary, experts)
    return balance_by_count(counts_of(context.dictionary), experts, fixed)


def counts_of(dictionary: Any) -> list[int]:
    """Return the count of each id in the training text, as far as a fairseq dictionary knows it.

    A dictionary counts the end of a sentence and the mask of a masked LM once, although they are
    among the most frequent tokens. They are given the count of the most frequent word.
    """
    counts = list(dictionary.count)
    frequent = {dictionary.indices.get(s) for s in (dictionary.eos_word, "<mask>")} - {None}
    most = max((n for i, n in enumerate(counts) if i not in frequent), default=1)
    for i in frequent:
        counts[i] = max(counts[i], most)
    return counts


def read_mapping(path: Path, dictionary: Any, experts: int) -> dict[int, int]:
    """Read {token: expert} from a JSON file and return it as {id: expert}, without unknown tokens.

    Raises:
        ValueError: the file is not such a mapping, names no token of the dictionary, or names an
            expert that does not exist.
    """
    flag = f"--moe-hash-mapping {path}"
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{flag}: not a JSON file ({error})") from error
    if not isinstance(mapping, dict):
        raise ValueError(f"{flag}: holds a {type(mapping).__name__}, expected {{token: expert}}")
    wrong = [t for t, e in mapping.items() if type(e) is not int or not 0 <= e < experts]
    if wrong:
        raise ValueError(
            f"{flag}: {wrong[0]!r} goes to expert {mapping[wrong[0]]!r}; --moe-expert-count "
            f"{experts} allows the whole numbers 0 to {experts - 1}"
        )
    fixed = {dictionary.indices[t]: e for t, e in mapping.items() if t in dictionary.indices}
    if not fixed:
        raise ValueError(f"{flag}: none of its tokens is in the dictionary")
    return fixed


def balance_by_count(counts: list[int], experts: int, fixed: dict[int, int]) -> Tensor:
    """Assign ids to experts, most frequent first, each to the expert with the lowest count so far.

    Args:
        counts: number of occurrences of each of the V ids.
        experts: E.
        fixed: id -> expert, for ids that are assigned beforehand.

    Returns:
        expert of each id, (V,) int64.
    """
    load = [0] * experts
    table = torch.zeros(len(counts), dtype=torch.int64)
    for token, expert in fixed.items():
        table[token] = expert
        load[expert] += counts[token]
    queue = [(n, e) for e, n in enumerate(load)]
    heapq.heapify(queue)
    for token in sorted(range(len(counts)), key=lambda t: -counts[t]):
        if token not in fixed:
            n, expert = queue[0]
            table[token] = expert
            # a token that never occurs still counts as one, so that unseen tokens spread
            heapq.heapreplace(queue, (n + max(counts[token], 1), expert))
    return table
