"""How an exported model's gates choose experts, in the stage of its checkpoint.

The rules are those of evaluation in `fairseq_evomoe.modules.gates`, which has the formulas and
their sources. Fine-tuning uses the same rules: no noise, no capacity, no change over time. Letters:
T tokens, D model width, E experts, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Routing(NamedTuple):
    """A gate's decision over T tokens.

    Attributes:
        weights: combine weights, (T, E) float32, 0 where inactive.
        active: (T, E) bool.
        logits: (T, E) float32; 0 for a gate without a router.
        max_active: a bound on the number of experts per token, or None.
    """

    weights: Tensor
    active: Tensor
    logits: Tensor
    max_active: int | None = None


HARD = 2
"""Number of the last stage, in which the DTS gate takes a fixed number of experts."""


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """The k largest of each row, (T, E) bool; among equals the lower index wins."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


class Router(nn.Module):
    """A gate. Parameters and buffers have the names that they have in fairseq's checkpoint.

    Args:
        rule: `config.moe`.
        width: D.
        vocabulary: V, of the tokens that the layer sees.
    """

    table: Tensor
    bias_steps: Tensor

    def __init__(self, rule: dict[str, Any], width: int, vocabulary: int) -> None:
        super().__init__()
        self.rule, experts = rule, rule["experts"]
        if rule["gate"] != "hash":
            self.weight = nn.Parameter(torch.zeros(experts, width))
        if rule["balance_bias"]:
            self.register_buffer("bias_steps", torch.zeros(experts, dtype=torch.int64))
        if rule["token_bias"]:
            self.token_bias = nn.Parameter(torch.zeros(vocabulary, experts))
        if rule["gate"] in ("hash", "stable"):
            self.register_buffer("table", torch.full((vocabulary,), -1))

    def forward(self, x: Tensor, ids: Any, sentence: Tensor) -> Routing:
        """Route tokens: x (T, D), their ids (T,) or None, and the batch's row of each (T,).

        Raises:
            ValueError: the gate needs ids, and the model was called with embeddings.
        """
        rule = self.rule
        if ids is None and (rule["token_bias"] or hasattr(self, "table")):
            raise ValueError("this model's gates read token ids: call it with input_ids")
        with torch.autocast(x.device.type, enabled=False):
            if rule["gate"] == "hash":
                active = self._by_table(ids)
                weights = active.float()
                return Routing(weights, active, torch.zeros_like(weights), 1)
            logits = F.linear(x.float(), self.weight.float())
            if rule["token_bias"]:
                # the bias grows as the DTS gate cools from dense
                left = rule["anneal_left"] if rule["gate"] == "dts" else 0.0
                logits = logits + (1 - left) * F.embedding(ids, self.token_bias.float())
            return getattr(self, f"_{rule['gate']}")(logits, ids, sentence)

    def _by_table(self, ids: Tensor) -> Tensor:
        active = torch.zeros(len(ids), self.rule["experts"], dtype=torch.bool, device=ids.device)
        return active.scatter_(1, self.table[ids][:, None], True)

    def _scores(self, logits: Tensor) -> Tensor:
        """Logits plus the bias that balanced the load in training."""
        step = self.rule["balance_bias"]
        return logits + step * self.bias_steps.float() if step else logits

    def _dense(self, logits: Tensor, ids: Tensor | None, sentence: Tensor) -> Routing:
        weights = logits.softmax(-1)
        return Routing(weights, torch.ones_like(weights, dtype=torch.bool), logits)

    def _topk(self, logits: Tensor, ids: Tensor | None, sentence: Tensor) -> Routing:
        k = self.rule["top_k"]
        active = top_k_mask(self._scores(logits), k)
        weights = logits.softmax(-1) * active
        if k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(weights, active, logits, k)

    def _switch(self, logits: Tensor, ids: Tensor | None, sentence: Tensor) -> Routing:
        active = top_k_mask(self._scores(logits), 1)
        return Routing(logits.softmax(-1) * active, active, logits, 1)

    def _gshard(self, logits: Tensor, ids: Tensor | None, sentence: Tensor) -> Routing:
        active = top_k_mask(self._scores(logits), 2)
        weights = logits.softmax(-1) * active
        return Routing(weights / weights.sum(-1, keepdim=True), active, logits, 2)

    def _base(self, logits: Tensor, ids: Tensor | None, sentence: Tensor) -> Routing:
        active = top_k_mask(logits, 1)
        # in double precision the last bit does not depend on a token's place in the batch
        return Routing(torch.sigmoid(logits.double()).float() * active, active, logits, 1)

    def _stable(self, logits: Tensor, ids: Tensor, sentence: Tensor) -> Routing:
        frozen = bool(self.table[0] >= 0)
        active = self._by_table(ids) if frozen else top_k_mask(logits, 1)
        return Routing(torch.sigmoid(logits.double()).float() * active, active, logits, 1)

    def _dts(self, logits: Tensor, ids: Tensor | None, sentence: Tensor) -> Routing:
        rule, probs = self.rule, logits.softmax(-1)
        if rule["parity"]:
            active = top_k_mask(probs, 1)
            return Routing(probs * active, active, logits, 1)
        tempered = (logits / rule["temperature"]).softmax(-1)
        chooses = (self._scores(logits) / rule["temperature"]).softmax(-1)
        most = rule["top_k"] if rule["stage"] == HARD else rule["max_experts"]
        if rule["stage"] == HARD:
            active = top_k_mask(chooses, most)
        else:
            active = (chooses >= rule["threshold"]) | top_k_mask(chooses, 1)
            if most is not None:
                active = active & top_k_mask(chooses, most)
        weights = (probs if rule["combine"] == "softmax" else tempered) * active
        if rule["combine"] in ("renorm", "straight"):
            total = weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
            weights = weights / (total.detach() if rule["combine"] == "straight" else total)
        return Routing(weights, active, logits, most)

    def _expert_choice(self, logits: Tensor, ids: Tensor | None, sentence: Tensor) -> Routing:
        """Each expert takes the tokens of a sentence (or of the batch) that score highest."""
        rule, probs = self.rule, logits.softmax(-1)
        group = sentence if rule["choice_group"] == "sentence" else torch.zeros_like(sentence)
        size = group.bincount()
        limit = (rule["choice_experts"] * size / rule["experts"]).round().long().clamp(min=1)
        order = probs.detach().sort(dim=0, descending=True, stable=True).indices
        order = order.gather(0, group[order].sort(dim=0, stable=True).indices)
        start = size.cumsum(0) - size
        rank = torch.arange(len(probs), device=probs.device)[:, None] - start[group[order]]
        chosen = rank < limit[group[order]]
        active = torch.zeros_like(chosen).scatter_(0, order, chosen)
        return Routing(probs * active, active, logits)


GATES = (
    *("dts", "switch", "gshard", "topk", "dense", "base"),
    *("hash", "stable", "expert_choice"),
)
"""The gates that can be exported."""


def balance_loss(routings: list[Routing]) -> Tensor:
    """Mean over the layers of E sum_e f_e P_e (arXiv 2101.03961, eq. 4), scalar float32.

    f_e is an expert's share of the active pairs, P_e its mean probability. It is 1 at perfect
    balance.
    """
    losses = []
    for r in routings:
        load = r.active.float().sum(0)
        share = load / load.sum().clamp(min=1)
        losses.append(r.logits.size(1) * (share * r.logits.softmax(-1).mean(0)).sum())
    return torch.stack(losses).mean()
