"""Switch: one expert per token."""

from torch import Tensor

from fairseq_evomoe.kernels.gate import top_k
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

    def route(self, logits: Tensor, clock: Clock, tokens: TokenBatch | None) -> RoutingPlan:
        weights, wanted, probs, sums = top_k(logits, 1, self.bias, sums=self.wants_sums)
        if not (self.training and self.cfg.moe_capacity_factor):
            return RoutingPlan(weights, wanted, probs, logits, at_most=1, summed=sums)
        surest = weights.sum(-1) if self.cfg.moe_batch_prioritized_routing else None
        limit = capacity(self.cfg, len(probs), 1)
        (active,) = within_capacity([wanted], limit, priority=surest)
        return RoutingPlan(
            weights * active, active, probs, logits, asked=wanted, at_most=1, summed=sums
        )
