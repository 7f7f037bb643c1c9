"""What every gate shares. Letters: T tokens, D model width, E experts."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.modules.plan import Clock, RoutingPlan


class Gate(nn.Module):
    """Linear router z = W_g x in float32, then a rule (`route`) that each gate states.

    Softmax over a few logits is where half precision loses the ranking of experts, so logits and
    probabilities are float32 whatever the model's dtype (Switch, arXiv 2101.03961, section 2.4).

    Args:
        dim: model width D.
        cfg: the flags; `cfg.moe_expert_count` is E.
        generator: draws the initial weights, so that the global stream stays as in a dense model.
    """

    needs_schedule = False
    """True where the rule changes over time, so that training without a schedule is a mistake."""

    def __init__(self, dim: int, cfg: MoEConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.cfg = cfg
        weight = torch.randn(cfg.moe_expert_count, dim, generator=generator)
        self.weight = nn.Parameter(weight * cfg.moe_gate_init_std)

    def forward(self, x: Tensor, clock: Clock) -> RoutingPlan:
        """Route T real tokens: x (T, D) of any float dtype -> RoutingPlan."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
            probs = logits.softmax(-1)
            weights, active = self.route(logits, probs, clock)
        return RoutingPlan(weights, active, probs, logits)

    def route(self, logits: Tensor, probs: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        """(T, E) logits and their softmax -> combine weights (T, E) and active pairs (T, E)."""
        raise NotImplementedError


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """The k largest of each row, (T, E) bool; among equals the lower index wins."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
