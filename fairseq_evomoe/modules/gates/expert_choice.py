"""Expert choice: experts pick tokens. Letters: T tokens, E experts."""

import logging
import math

import torch
from torch import Tensor

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.modules.gates.base import GateContext, ScoreGate, register_gate
from fairseq_evomoe.modules.plan import Phase, RoutingPlan, TokenBatch
from fairseq_evomoe.options import ChoiceGroup
from fairseq_evomoe.schedule import Stage

logger = logging.getLogger(__name__)


@register_gate("expert_choice")
class ExpertChoiceGate(ScoreGate):
    """Each expert takes the C = round(c n / E) tokens that score highest, at least 1.

    The scores are p = softmax of z over the experts (arXiv 2202.09368, section 3.2), and the
    combine weight is p_te. c = `--moe-choice-experts` is the mean number of experts
    per token; a token may get none or all of them. In the paper n is the number of tokens
    in the batch (`--moe-choice-group batch`). By default it is that of the sentence, so that a
    sentence does not depend on its neighbours. Either way a token's experts depend on later tokens,
    so the gate is refused in decoders. The load is even by construction, so no balance loss is
    trained.
    """

    flags = ("--moe-gate-token-bias", "--moe-choice-experts", "--moe-choice-group")
    balanced_by_loss = False

    def __init__(self, cfg: MoEConfig, context: GateContext) -> None:
        super().__init__(cfg, context)
        if context.causal:
            raise ValueError(
                f"--moe-gate expert_choice in {context.name}: experts choose among all positions, "
                "so a decoder would see future tokens; use it in encoders (--encoder-moe-freq "
                "alone) and masked LMs, or give another --moe-gate"
            )

    @classmethod
    def check(cls, cfg: MoEConfig) -> None:
        if cfg.moe_capacity_factor is not None:
            logger.warning(
                "--moe-capacity-factor %s: with --moe-gate expert_choice this is now "
                "--moe-choice-experts; the old name will go away in version 0.3.0",
                cfg.moe_capacity_factor,
            )
            cfg.moe_choice_experts, cfg.moe_capacity_factor = cfg.moe_capacity_factor, None
        super().check(cfg)
        cfg.need_choice("--moe-choice-group", ChoiceGroup)
        cfg.need(
            0 < cfg.moe_choice_experts <= cfg.moe_expert_count,
            "--moe-choice-experts",
            f"must be above 0, and a token cannot get more than all {cfg.moe_expert_count} experts",
        )

    @classmethod
    def min_experts(cls, cfg: MoEConfig) -> int:
        return math.ceil(cfg.moe_choice_experts)

    @classmethod
    def experts_per_token(cls, cfg: MoEConfig, stage: Stage) -> float:
        return cfg.moe_choice_experts

    def route(self, logits: Tensor, phase: Phase, tokens: TokenBatch | None) -> RoutingPlan:
        probs = logits.softmax(-1)
        if tokens is None or self.cfg.moe_choice_group == "batch":
            group = torch.zeros(len(probs), dtype=torch.int64, device=probs.device)
        else:
            group = tokens.sentence
        active = choose_tokens(probs.detach(), group, self.cfg.moe_choice_experts)
        return RoutingPlan(weights=probs * active, active=active, probs=probs, logits=logits)

    def balance_loss(self, plan: RoutingPlan, load: Tensor) -> Tensor:
        return super().balance_loss(plan, load).detach()


def choose_tokens(probs: Tensor, group: Tensor, factor: float) -> Tensor:
    """Select the round(factor n / E) best tokens, at least 1, of each expert in each group.

    Args:
        probs: (T, E).
        group: group of each token, (T,) int64, numbered from 0; a group has n tokens.
        factor: mean number of experts per token.

    Returns:
        (T, E) bool; among equal probabilities the earlier token wins.
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
