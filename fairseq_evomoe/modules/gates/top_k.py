"""Top-k: a fixed number of experts per token."""

from torch import Tensor

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.kernels.gate.gate import top_k
from fairseq_evomoe.modules.gates.base import ScoreGate, register_gate
from fairseq_evomoe.modules.plan import Phase, RoutingPlan, TokenBatch
from fairseq_evomoe.schedule import Stage


@register_gate("topk")
class TopKGate(ScoreGate):
    """The experts of the `--moe-top-k` largest p are active (arXiv 1701.06538, eq. 3-5).

    Their weights are the softmax over those experts. For k = 1 it would be the constant 1 and would
    teach the router nothing, so the weight is p, as in Switch.
    """

    flags = (*ScoreGate.flags, "--moe-top-k")

    @classmethod
    def check(cls, cfg: MoEConfig) -> None:
        super().check(cfg)
        cfg.need(
            1 <= cfg.moe_top_k <= cfg.moe_expert_count,
            "--moe-top-k",
            f"choose 1 to --moe-expert-count {cfg.moe_expert_count}",
        )

    @classmethod
    def min_experts(cls, cfg: MoEConfig) -> int:
        return cfg.moe_top_k

    @classmethod
    def experts_per_token(cls, cfg: MoEConfig, stage: Stage) -> float:
        return cfg.moe_top_k

    def route(self, logits: Tensor, phase: Phase, tokens: TokenBatch | None) -> RoutingPlan:
        k = self.cfg.moe_top_k
        weights, active, probs, sums = top_k(
            logits, k, self.bias, renorm=k > 1, sums=self.needs_sums
        )
        return RoutingPlan(
            weights=weights,
            active=active,
            probs=probs,
            logits=logits,
            max_active=k,
            gate_sums=sums,
        )
