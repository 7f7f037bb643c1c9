"""Hash: the token's identity decides. Letters: T tokens, E experts, V vocabulary."""

import heapq
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.modules.gates.base import Gate, Site, mask_of
from fairseq_evomoe.modules.plan import Clock, RoutingPlan, TokenBatch


class HashGate(Gate):
    """A fixed table from token id to expert, weight 1, nothing to learn (arXiv 2106.04426).

    `--moe-hash-mapping`: `random` draws an expert for each id; `balanced` hands ids, most frequent
    first, to the expert with the least load so far, by the dictionary's counts (section 3.1; a
    dictionary joined over two languages counts both, so each side is balanced less well); else a
    JSON file {token: expert}, for instance of clusters, whose missing tokens are balanced over.
    The token is the one at the layer's position: the source word in an encoder, the previous target
    word in a decoder, the mask itself where a masked LM hides a word. The table is saved with the
    weights.
    """

    table: Tensor

    def __init__(self, cfg: MoEConfig, site: Site) -> None:
        super().__init__(cfg, site)
        if site.dictionary is None:
            raise ValueError(f"--moe-gate hash: layer {site.name} does not know its dictionary")
        self.register_buffer("table", _table(cfg, site))
        self._complete = False

    def ready(self) -> None:
        self.cfg.need(bool((self.table >= 0).all()), "--moe-hash-mapping", "no such file")

    @classmethod
    def check(cls, cfg: MoEConfig) -> None:
        super().check(cfg)
        cfg.need(
            cfg.moe_hash_mapping in ("random", "balanced") or cfg.moe_hash_mapping.endswith("json"),
            "--moe-hash-mapping",
            "choose random, balanced, or a file that ends in .json",
        )

    def forward(self, x: Tensor, clock: Clock, tokens: TokenBatch | None = None) -> RoutingPlan:
        if tokens is None:
            raise ValueError("--moe-gate hash routes by token ids, and this layer was given none")
        if not self._complete:
            self.ready()
            self._complete = True
        active = mask_of(self.table[tokens.token], self.cfg.moe_expert_count)
        weights = active.float()
        return RoutingPlan(weights, active, weights, torch.zeros_like(weights), at_most=1)


def _table(cfg: MoEConfig, site: Site) -> Tensor:
    vocabulary, experts = len(site.dictionary), cfg.moe_expert_count
    if cfg.moe_hash_mapping == "random":
        return torch.randint(experts, (vocabulary,), generator=site.generator)
    fixed: dict[int, int] = {}
    if cfg.moe_hash_mapping != "balanced":
        path = Path(cfg.moe_hash_mapping)
        if not path.is_file():
            # a checkpoint brings its own table; training without one is refused
            return torch.full((vocabulary,), -1)
        fixed = read_mapping(path, site.dictionary, experts)
    return balance_by_count(counts_of(site.dictionary), experts, fixed)


def counts_of(dictionary: Any) -> list[int]:
    """Occurrences of each id in the training text, as far as a fairseq dictionary knows them.

    It counts the end of a sentence and the mask of a masked LM once, though they are among the
    most frequent: they are given the count of the most frequent word.
    """
    counts = list(dictionary.count)
    frequent = {dictionary.indices.get(s) for s in (dictionary.eos_word, "<mask>")} - {None}
    most = max((n for i, n in enumerate(counts) if i not in frequent), default=1)
    for i in frequent:
        counts[i] = max(counts[i], most)
    return counts


def read_mapping(path: Path, dictionary: Any, experts: int) -> dict[int, int]:
    """{token: expert} from a JSON file, as {id: expert}, without unknown tokens.

    Raises:
        ValueError: the file is not such a mapping, names no token of the dictionary, or an expert
            that does not exist.
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
    """Ids to experts, most frequent first, each to the expert of least count so far; (V,) int64.

    Args:
        counts: occurrences of each id, V of them.
        experts: E.
        fixed: id -> expert, decided beforehand.
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
            # a token that never occurs still takes a place, so that unseen ones spread
            heapq.heapreplace(queue, (n + max(counts[token], 1), expert))
    return table
