"""Switch: one expert per token."""

from torch import Tensor

from fairseq_evomoe.kernels.gate import top_k_mask
from fairseq_evomoe.modules.gates.base import (
    ScoreGate,
    capacity,
    within_capacity,
)
from fairseq_evomoe.modules.plan import Clock, RoutingPlan, TokenBatch


class SwitchGate(ScoreGate):
    """Active: argmax p; weight p itself, so that the router learns (arXiv 2101.03961, eq. 2).

    Dropless, unless `--moe-capacity-factor` c limits an expert to ceil(c T / E) tokens (eq. 3)
    while training: tokens beyond pass the layer by, and what a token gets then depends on those
    before it. Evaluation never drops.
    """

    takes_capacity = True

    def route(
        self, logits: Tensor, probs: Tensor, clock: Clock, tokens: TokenBatch | None
    ) -> RoutingPlan:
        active = wanted = top_k_mask(self.scores(logits), 1)
        limits = self.training and self.cfg.moe_capacity_factor > 0
        if limits:
            surest = (probs * wanted).sum(-1) if self.cfg.moe_batch_prioritized_routing else None
            limit = capacity(self.cfg, len(probs), 1)
            (active,) = within_capacity([wanted], limit, priority=surest)
        asked = wanted if limits else None
        return RoutingPlan(probs * active, active, probs, logits, asked=asked, at_most=1)
