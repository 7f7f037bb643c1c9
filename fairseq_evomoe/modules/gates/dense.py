"""The dense mixture: every token sees every expert."""

import torch
from torch import Tensor

from fairseq_evomoe.modules.gates.base import ScoreGate, register_gate
from fairseq_evomoe.modules.plan import Phase, RoutingPlan, TokenBatch


@register_gate("dense")
class DenseGate(ScoreGate):
    """All experts, weighted by softmax(z) (Jacobs et al. 1991).

    No other gate computes as much.
    """

    flags = ("--moe-gate-token-bias",)

    def route(self, logits: Tensor, phase: Phase, tokens: TokenBatch | None) -> RoutingPlan:
        probs = logits.softmax(-1)
        active = torch.ones_like(probs, dtype=torch.bool)
        return RoutingPlan(
            weights=probs, active=active, probs=probs, logits=logits, max_active=probs.size(1)
        )
