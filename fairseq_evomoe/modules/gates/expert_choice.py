"""Expert choice: experts pick tokens. Letters: T tokens, E experts."""

import torch
from torch import Tensor

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.modules.gates.base import ScoreGate, Site
from fairseq_evomoe.modules.plan import Clock, RoutingPlan, TokenBatch


class ExpertChoiceGate(ScoreGate):
    """Each expert takes the C = round(c n / E) tokens, at least 1, that score highest (2202.09368).

    p = softmax over experts of z (section 3.2); weight p_te; c = `--moe-capacity-factor` (1 when 0)
    is the mean number of experts a token gets, which may be 0 or all. The paper's n is the batch
    (`--moe-choice-group batch`); by default it is the sentence, so that a sentence does not depend
    on its neighbours. Either way a token's experts depend on later tokens: refused in decoders.
    Load is even by construction, so no balance loss is trained.
    """

    takes_bias = False
    takes_capacity = True

    def __init__(self, cfg: MoEConfig, site: Site) -> None:
        super().__init__(cfg, site)
        if site.causal:
            raise ValueError(
                f"--moe-gate expert_choice in {site.name}: experts choose among all positions, and "
                "a decoder would see its future; use it in encoders (--encoder-moe-freq alone) and "
                "masked LMs, or another --moe-gate"
            )

    @classmethod
    def check(cls, cfg: MoEConfig) -> None:
        super().check(cfg)
        cfg.need(
            cfg.moe_choice_group in ("sentence", "batch"),
            "--moe-choice-group",
            "choose sentence or batch",
        )
        cfg.need(
            cfg.moe_capacity_factor <= cfg.moe_expert_count,
            "--moe-capacity-factor",
            f"a token cannot get more than all {cfg.moe_expert_count} experts",
        )

    def route(self, logits: Tensor, clock: Clock, tokens: TokenBatch | None) -> RoutingPlan:
        probs = logits.softmax(-1)
        if tokens is None or self.cfg.moe_choice_group == "batch":
            group = torch.zeros(len(probs), dtype=torch.int64, device=probs.device)
        else:
            group = tokens.sentence
        active = choose(probs.detach(), group, self.cfg.moe_capacity_factor or 1.0)
        return RoutingPlan(probs * active, active, probs, logits)

    def balance(self, plan: RoutingPlan, load: Tensor) -> Tensor:
        return super().balance(plan, load).detach()


def choose(probs: Tensor, group: Tensor, factor: float) -> Tensor:
    """The round(factor n / E), at least 1, best tokens of each expert in each group of n tokens.

    Args:
        probs: (T, E).
        group: (T,) int64, ids from 0.
        factor: experts per token on average.

    Returns:
        (T, E) bool; among equals the earlier token wins.
    """
    if len(probs) == 0:
        return torch.zeros_like(probs, dtype=torch.bool)
    size = group.bincount()
    limit = (factor * size / probs.size(1)).round().long().clamp(min=1)
    # a stable sort by probability, then by group, orders each column by group, then probability
    order = probs.sort(dim=0, descending=True, stable=True).indices
    order = order.gather(0, group[order].sort(dim=0, stable=True).indices)
    start = size.cumsum(0) - size
    rank = torch.arange(len(probs), device=probs.device)[:, None] - start[group[order]]
    chosen = rank < limit[group[order]]
    return torch.zeros_like(chosen).scatter_(0, order, chosen)
