"""The dense mixture: every token sees every expert."""

import torch
from torch import Tensor

from fairseq_evomoe.modules.gates.base import ScoreGate
from fairseq_evomoe.modules.plan import Clock, RoutingPlan, TokenBatch


class DenseGate(ScoreGate):
    """w = softmax(z) over all experts (Jacobs et al. 1991); the upper bound in compute."""

    takes_bias = False

    def route(self, logits: Tensor, clock: Clock, tokens: TokenBatch | None) -> RoutingPlan:
        probs = logits.softmax(-1)
        active = torch.ones_like(probs, dtype=torch.bool)
        return RoutingPlan(probs, active, probs, logits, at_most=probs.size(1))
