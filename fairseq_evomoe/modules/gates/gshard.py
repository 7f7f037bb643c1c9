"""GShard: the best expert and a second one."""

import torch
from torch import Tensor

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.kernels.gate.rule import top_k_mask
from fairseq_evomoe.modules.gates.base import ScoreGate, register_gate
from fairseq_evomoe.modules.gates.capacity import capacity, within_capacity
from fairseq_evomoe.modules.plan import Phase, RoutingPlan, TokenBatch
from fairseq_evomoe.options import SecondExpert
from fairseq_evomoe.schedule import Stage


@register_gate("gshard")
class GShardGate(ScoreGate):
    """Top-2 with a policy for the second expert (arXiv 2006.16668, algorithm 1).

    The first expert is argmax p. During training, `--moe-second-expert-policy` selects the second:
    `sampling` takes the argmax of z + Gumbel noise over the other experts, `random` takes the
    runner-up with probability min(1, 2 p_2), and `all` always takes the runner-up. Evaluation takes
    the runner-up, so that it is deterministic. The weights are p_1 and p_2 divided by their sum,
    which is taken over what the capacity ceil(2 c T / E) leaves, or before the capacity drops
    anything with `--moe-normalize-gate-prob-before-dropping`.

    The balance loss counts first choices alone: it is E sum_e f_e P_e, where f_e is the fraction of
    tokens whose argmax is e.
    """

    flags = (
        *ScoreGate.flags,
        "--moe-capacity-factor",
        "--moe-batch-prioritized-routing",
        "--moe-second-expert-policy",
        "--moe-normalize-gate-prob-before-dropping",
    )

    @classmethod
    def check(cls, cfg: MoEConfig) -> None:
        super().check(cfg)
        cfg.need_choice("--moe-second-expert-policy", SecondExpert)

    @classmethod
    def min_experts(cls, cfg: MoEConfig) -> int:
        return 2

    @classmethod
    def experts_per_token(cls, cfg: MoEConfig, stage: Stage) -> float:
        return 2

    def route(self, logits: Tensor, phase: Phase, tokens: TokenBatch | None) -> RoutingPlan:
        cfg, probs, scores = self.cfg, logits.softmax(-1), self.scores(logits)
        policy = cfg.moe_second_expert_policy if self.training else "all"
        first = top_k_mask(scores, 1)
        if policy == "sampling":
            scores = scores - torch.empty_like(scores).exponential_().log()
        second = top_k_mask(scores.masked_fill(first, -torch.inf), 1)

        pair = probs * (first | second)
        pair = pair / pair.sum(-1, keepdim=True)
        if policy == "random":
            p = pair if cfg.moe_normalize_gate_prob_before_dropping else probs
            p2 = (p * second).sum(-1)
            second = second & (torch.rand_like(p2) < 2 * p2)[:, None]

        kept = [first, second]
        limited = self.training and cfg.moe_capacity_factor is not None
        if limited:
            certainty = (probs * first).sum(-1) if cfg.moe_batch_prioritized_routing else None
            kept = within_capacity(kept, capacity(cfg, len(probs), 2), priority=certainty)
        active = kept[0] | kept[1]
        if cfg.moe_normalize_gate_prob_before_dropping:
            weights = pair * active
        else:
            weights = probs * active
            # if a token has lost both experts, its weights of 0 are divided by 1
            total = weights.sum(-1, keepdim=True)
            weights = weights / torch.where(total > 0, total, 1)
        return RoutingPlan(
            weights=weights,
            active=active,
            probs=probs,
            logits=logits,
            before_capacity=first | second if limited else None,
            max_active=2,
        )

    def expert_load(self, plan: RoutingPlan) -> Tensor:
        return top_k_mask(self.scores(plan.logits), 1).sum(0).float()
