"""GShard: the best expert and a second one."""

import torch
from torch import Tensor

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.kernels.gate import top_k_mask
from fairseq_evomoe.modules.gates.base import (
    ScoreGate,
    capacity,
    within_capacity,
)
from fairseq_evomoe.modules.plan import Clock, RoutingPlan, TokenBatch

POLICIES = ("sampling", "random", "all")


class GShardGate(ScoreGate):
    """Top-2 with a policy for the second expert (arXiv 2006.16668, algorithm 1).

    First: argmax p. Second, while training, by `--moe-second-expert-policy`: `sampling` the argmax
    of z + Gumbel noise over the others; `random` the runner-up, kept with probability
    min(1, 2 p_2); `all` the runner-up. Evaluation takes the runner-up, so that it is deterministic.
    Weights p_1 and p_2, divided by their sum: over what is left by the capacity ceil(2 c T / E), or
    before it drops anything with `--moe-normalize-gate-prob-before-dropping`.

    Its balance loss counts first choices alone: E sum_e f_e P_e, f_e the share of tokens whose
    argmax is e.
    """

    takes_capacity = True

    @classmethod
    def check(cls, cfg: MoEConfig) -> None:
        super().check(cfg)
        cfg.need(
            cfg.moe_second_expert_policy in POLICIES,
            "--moe-second-expert-policy",
            f"choose one of {', '.join(POLICIES)}",
        )
        cfg.need(cfg.moe_expert_count >= 2, "--moe-expert-count", "gshard needs 2 experts or more")

    def route(self, logits: Tensor, clock: Clock, tokens: TokenBatch | None) -> RoutingPlan:
        cfg, probs, scores = self.cfg, logits.softmax(-1), self.scores(logits)
        policy = cfg.moe_second_expert_policy if self.training else "all"
        first = top_k_mask(scores, 1)
        if policy == "sampling":
            scores = scores - torch.empty_like(scores).exponential_().log()
        second = top_k_mask(scores.masked_fill(first, -torch.inf), 1)

        pair = probs * (first | second)
        pair = pair / pair.sum(-1, keepdim=True)
        if policy == "random":
            shares = pair if cfg.moe_normalize_gate_prob_before_dropping else probs
            p2 = (shares * second).sum(-1)
            second = second & (torch.rand_like(p2) < 2 * p2)[:, None]

        kept = [first, second]
        limits = self.training and cfg.moe_capacity_factor > 0
        if limits:
            surest = (probs * first).sum(-1) if cfg.moe_batch_prioritized_routing else None
            kept = within_capacity(kept, capacity(cfg, len(probs), 2), priority=surest)
        active = kept[0] | kept[1]
        if cfg.moe_normalize_gate_prob_before_dropping:
            weights = pair * active
        else:
            weights = probs * active
            # a token that lost both experts divides 0 by 1
            total = weights.sum(-1, keepdim=True)
            weights = weights / torch.where(total > 0, total, 1)
        asked = first | second if limits else None
        return RoutingPlan(weights, active, probs, logits, asked=asked, at_most=2)

    def load(self, plan: RoutingPlan) -> Tensor:
        return top_k_mask(self.scores(plan.logits), 1).sum(0).float()
