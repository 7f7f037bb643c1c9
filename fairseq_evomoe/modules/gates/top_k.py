"""Top-k: a fixed number of experts per token."""

from torch import Tensor

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.kernels.gate import top_k
from fairseq_evomoe.modules.gates.base import ScoreGate
from fairseq_evomoe.modules.plan import Clock, RoutingPlan, TokenBatch


class TopKGate(ScoreGate):
    """Active: the `--moe-top-k` largest p; weights softmax over those (arXiv 1701.06538, eq. 3-5).

    For k = 1 that softmax is the constant 1 and would teach the router nothing: the weight is p,
    as in Switch.
    """

    @classmethod
    def check(cls, cfg: MoEConfig) -> None:
        super().check(cfg)
        cfg.need(
            1 <= cfg.moe_top_k <= cfg.moe_expert_count,
            "--moe-top-k",
            f"choose 1 to --moe-expert-count {cfg.moe_expert_count}",
        )

    def route(self, logits: Tensor, clock: Clock, tokens: TokenBatch | None) -> RoutingPlan:
        k = self.cfg.moe_top_k
        weights, active, probs, sums = top_k(
            logits, k, self.bias, renorm=k > 1, sums=self.wants_sums
        )
        return RoutingPlan(weights, active, probs, logits, at_most=k, summed=sums)
