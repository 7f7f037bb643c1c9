"""StableMoE: learn to route, then freeze the router.

Letters: T tokens, E experts, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_evomoe.config import EvolutionConfig, MoEConfig
from fairseq_evomoe.kernels.gate.rule import top_k_mask
from fairseq_evomoe.modules.gates.base import (
    GateContext,
    ScoreGate,
    mask_of,
    prune_rows,
    register_gate,
    sigmoid,
)
from fairseq_evomoe.modules.plan import Phase, RoutingPlan, TokenBatch
from fairseq_evomoe.schedule import EvolutionSchedule, Stage, resolve_schedule


@register_gate("stable")
class StableGate(ScoreGate):
    """Routing in two stages (arXiv 2204.08396).

    1. Until `--stable-freeze-update`, a(t) = argmax_e z_te with combine weight sigmoid(z_{t, a(t)})
       (eq. 1-3). A second router that sees words alone, the softmax of W' v(token) with embeddings
       v of width `--stable-distill-dim`, is distilled from the first by cross entropy (eq. 8,
       weighted by `--stable-distill-loss-wt`). The balance loss is 1/T sum_e (n_e - n) / n sum_{t:
       a(t) = e} sigmoid(z_te) (eq. 6, per token).
    2. Then the distilled router is frozen into a table from token to expert, which routes in
       training and in evaluation. The combine weight stays sigmoid(z), which goes on learning.

    The table is saved with the weights. The authors weight the balance loss with 0.3.
    """

    flags = ("--stable-distill-dim",)
    needs_losses = ("distill",)
    changes_over_time = True
    table: Tensor

    def __init__(self, cfg: MoEConfig, context: GateContext) -> None:
        super().__init__(cfg, context)
        vocabulary = context.vocabulary("--moe-gate stable")
        experts, dim = cfg.moe_expert_count, cfg.stable_distill_dim
        nn.init.orthogonal_(self.weight, gain=0.1, generator=context.generator)
        words = torch.randn(vocabulary, dim, generator=context.generator) * dim**-0.5
        self.words = nn.Parameter(words)
        self.distilled = nn.Parameter(torch.empty(experts, dim))
        nn.init.orthogonal_(self.distilled, gain=0.1, generator=context.generator)
        self.register_buffer("table", torch.full((vocabulary,), -1))

    @classmethod
    def check(cls, cfg: MoEConfig) -> None:
        super().check(cfg)
        cfg.need(cfg.stable_distill_dim >= 1, "--stable-distill-dim", "give a width of 1 or more")

    @classmethod
    def schedule(cls, flags: EvolutionConfig) -> EvolutionSchedule:
        return resolve_schedule(
            spawn=cls.spawn_update(flags),
            anneal=0,
            hard=flags.stable_freeze_update,
            hard_flag="--stable-freeze-update",
            hard_follows_anneal=False,
            max_update=flags.max_update,
        )

    @classmethod
    def experts_per_token(cls, cfg: MoEConfig, stage: Stage) -> float:
        return 1

    @property
    def frozen(self) -> bool:
        """Whether the distilled router has become the table."""
        return bool(self.table[0] >= 0)

    @torch.no_grad()
    def freeze(self) -> None:
        """Freeze the distilled router, as it is now, into the table. Only the first call acts."""
        if not self.frozen:
            self.table.copy_(F.linear(self.words.float(), self.distilled.float()).argmax(-1))

    def route(self, logits: Tensor, phase: Phase, tokens: TokenBatch | None) -> RoutingPlan:
        if tokens is None:
            raise ValueError("--moe-gate stable routes by token ids, and this layer was given none")
        distill_loss = None
        # a restart that resets the number of updates does not unfreeze the router
        if self.frozen:
            active = mask_of(self.table[tokens.token], logits.size(1))
        else:
            active = top_k_mask(logits, 1)
            distill_loss = self._distill(active, tokens) if self.training else None
        weights, probs = sigmoid(logits) * active, logits.softmax(-1)
        return RoutingPlan(
            weights=weights,
            active=active,
            probs=probs,
            logits=logits,
            distill_loss=distill_loss,
            max_active=1,
        )

    def _distill(self, active: Tensor, tokens: TokenBatch) -> Tensor:
        words = F.linear(self.words[tokens.token].float(), self.distilled.float())
        if len(words) == 0:
            return words.sum()
        return F.cross_entropy(words, active.int().argmax(-1))

    def balance_loss(self, plan: RoutingPlan, load: Tensor) -> Tensor:
        if plan.weights.size(0) == 0:
            return plan.weights.sum()
        even = load.float().mean().clamp(min=1)
        per_expert = plan.weights.sum(0) / plan.weights.size(0)
        if plan.distill_loss is None:
            # in stage 2 nothing can change the routing any more; the value is only logged
            per_expert = per_expert.detach()
        return ((load - even) / even * per_expert).sum()

    def unused_parameters(self, phase: Phase) -> Sequence[nn.Parameter]:
        if phase.stage == Stage.DIVERSIFY:
            return super().unused_parameters(phase)
        # the distilled router learns from its own loss alone, and from nothing once it is frozen
        return [self.words, self.distilled]

    def after_update(self, phase: Phase, load: Callable[[], Tensor]) -> str:
        """Freeze the distilled router at the beginning of the hard stage."""
        if self.frozen or phase.stage != Stage.HARD:
            return ""
        self.freeze()
        return "froze the router"

    def prune(self, state: dict[str, Tensor], prefix: str, experts: Tensor) -> None:
        """Words stay with their expert; those of a dropped one go where the router sends them."""
        prune_rows(state, prefix, ("weight", "distilled"), experts)
        table = state[f"{prefix}table"]
        if (table < 0).any():
            return
        new_number = torch.full((self.cfg.moe_expert_count,), -1)
        new_number[experts] = torch.arange(len(experts))
        moved = new_number[table]
        words, distilled = (state[prefix + n].float() for n in ("words", "distilled"))
        routed = F.linear(words, distilled).argmax(-1)
        state[f"{prefix}table"] = torch.where(moved >= 0, moved, routed)
