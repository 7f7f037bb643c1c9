"""StableMoE: learn to route, then freeze. Letters: T tokens, E experts, V vocabulary."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.kernels.gate import top_k_mask
from fairseq_evomoe.modules.gates.base import ScoreGate, Site, mask_of
from fairseq_evomoe.modules.plan import Clock, RoutingPlan, TokenBatch
from fairseq_evomoe.schedule import Stage


class StableGate(ScoreGate):
    """Two stages (arXiv 2204.08396).

    1. Until `--stable-freeze-update`: a(t) = argmax_e z_te, combine weight sigmoid(z_{t, a(t)})
       (eq. 1-3). A router of words alone, softmax of W' v(token) with embeddings v of
       `--moe-distill-dim`, is distilled from it by cross entropy (eq. 8, `--moe-distill-loss-wt`).
       Balance loss: 1/T sum_e (n_e - n) / n sum_{t: a(t) = e} sigmoid(z_te) (eq. 6, per token).
    2. Then the distilled router is frozen into a table from token to expert, which routes in
       training and in evaluation; the weight stays sigmoid(z), which goes on learning.

    The table is saved with the weights. The authors weigh balance with 0.3.
    """

    takes_bias = takes_token_bias = False
    changes_over_time = True
    table: Tensor

    def __init__(self, cfg: MoEConfig, site: Site) -> None:
        super().__init__(cfg, site)
        if site.dictionary is None:
            raise ValueError(f"--moe-gate stable: layer {site.name} does not know its dictionary")
        experts, dim, vocabulary = cfg.moe_expert_count, cfg.moe_distill_dim, len(site.dictionary)
        nn.init.orthogonal_(self.weight, gain=0.1, generator=site.generator)
        words = torch.randn(vocabulary, dim, generator=site.generator) * dim**-0.5
        self.words = nn.Parameter(words)
        self.distilled = nn.Parameter(torch.empty(experts, dim))
        nn.init.orthogonal_(self.distilled, gain=0.1, generator=site.generator)
        self.register_buffer("table", torch.full((vocabulary,), -1))

    @classmethod
    def check(cls, cfg: MoEConfig) -> None:
        super().check(cfg)
        cfg.need(cfg.moe_distill_dim >= 1, "--moe-distill-dim", "give a width of 1 or more")

    @property
    def frozen(self) -> bool:
        """Whether the distilled router has become the table."""
        return bool(self.table[0] >= 0)

    @torch.no_grad()
    def freeze(self) -> None:
        """Make the distilled router, as it is now, the table; once."""
        if not self.frozen:
            self.table.copy_(F.linear(self.words.float(), self.distilled.float()).argmax(-1))

    def route(self, logits: Tensor, clock: Clock, tokens: TokenBatch | None) -> RoutingPlan:
        if tokens is None:
            raise ValueError("--moe-gate stable routes by token ids, and this layer was given none")
        distill = None
        # a restart that resets the updates does not thaw the router
        if self.frozen:
            active = mask_of(self.table[tokens.token], logits.size(1))
        else:
            active = top_k_mask(logits, 1)
            distill = self._distill(active, tokens) if self.training else None
        weights, probs = torch.sigmoid(logits) * active, logits.softmax(-1)
        return RoutingPlan(weights, active, probs, logits, distill=distill, at_most=1)

    def _distill(self, active: Tensor, tokens: TokenBatch) -> Tensor:
        words = F.linear(self.words[tokens.token].float(), self.distilled.float())
        if len(words) == 0:
            return words.sum()
        return F.cross_entropy(words, active.int().argmax(-1))

    def balance(self, plan: RoutingPlan, load: Tensor) -> Tensor:
        if plan.weights.size(0) == 0:
            return plan.weights.sum()
        even = load.float().mean().clamp(min=1)
        per_expert = plan.weights.sum(0) / plan.weights.size(0)
        if plan.distill is None:
            # stage 2: nothing can change the routing any more, the value is for the logs
            per_expert = per_expert.detach()
        return ((load - even) / even * per_expert).sum()

    def idle(self, clock: Clock) -> Sequence[nn.Parameter]:
        if clock.stage == Stage.DIVERSIFY or not self.frozen:
            return super().idle(clock)
        return [self.words, self.distilled]
