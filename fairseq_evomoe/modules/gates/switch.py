"""Switch: one expert per token."""

from torch import Tensor

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.kernels.gate.gate import top_k
from fairseq_evomoe.modules.gates.base import ScoreGate, register_gate
from fairseq_evomoe.modules.gates.capacity import capacity, within_capacity
from fairseq_evomoe.modules.plan import Phase, RoutingPlan, TokenBatch
from fairseq_evomoe.schedule import Stage


@register_gate("switch")
class SwitchGate(ScoreGate):
    """The active expert is argmax p; its weight is p, so that the router learns.

    This is eq. 2 of arXiv 2101.03961. No token is dropped unless `--moe-capacity-factor` c limits
    an expert to ceil(c T / E) tokens (eq. 3) during training. Tokens beyond the limit bypass the
    layer, so a token's output then depends on the tokens before it. Evaluation never drops a token.
    """

    flags = (*ScoreGate.flags, "--moe-capacity-factor", "--moe-batch-prioritized-routing")

    @classmethod
    def experts_per_token(cls, cfg: MoEConfig, stage: Stage) -> float:
        return 1

    def route(self, logits: Tensor, phase: Phase, tokens: TokenBatch | None) -> RoutingPlan:
        weights, chosen, probs, sums = top_k(logits, 1, self.bias, sums=self.needs_sums)
        active, before_capacity = chosen, None
        if self.training and self.cfg.moe_capacity_factor is not None:
            limit = capacity(self.cfg, len(probs), 1)
            certainty = weights.sum(-1) if self.cfg.moe_batch_prioritized_routing else None
            (active,) = within_capacity([chosen], limit, priority=certainty)
            weights, before_capacity = weights * active, chosen
        return RoutingPlan(
            weights=weights,
            active=active,
            probs=probs,
            logits=logits,
            before_capacity=before_capacity,
            max_active=1,
            gate_sums=sums,
        )
