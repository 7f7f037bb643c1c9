"""The experts of one layer in stacked weights, and how they split from the first of them.

Letters: T tokens, D model width, F expert hidden width, E experts, A active (token, expert) pairs.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_evomoe.kernels import routing
from fairseq_evomoe.kernels.grouped_ffn import grouped_ffn
from fairseq_evomoe.modules.plan import RoutingPlan

DIVERSIFY_MODES = ("mask", "drop", "noise", "copy")

DENSE_FROM = 0.97
"""Density A / (T E) from which all pairs in place beat gathered rows (measured on a CPU)."""


class ExpertBank(nn.Module):
    """E feed-forward networks, weights stacked in `nn.Linear`'s layout.

    `w1` (E, F, D), `b1` (E, F), `w2` (E, D, F), `b2` (E, D). Expert 0 is the base expert: it takes
    over the two linear layers that a dense model would have here, so a dense model and the
    diversify stage agree to the bit.

    Args:
        fc1, fc2: the dense layer's linear maps D -> F -> D.
        num_experts: E.
        activation: elementwise function between them.
        dropout: on hidden units, while training.
        generator: draws experts 1 to E-1 (`nn.Linear`'s distribution).
    """

    def __init__(
        self,
        fc1: nn.Linear,
        fc2: nn.Linear,
        *,
        num_experts: int,
        activation: Callable[[Tensor], Tensor],
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.dropout = dropout

        def stack(base: Tensor, fan_in: int) -> nn.Parameter:
            bound = 1 / math.sqrt(fan_in)
            others = torch.rand(num_experts - 1, *base.shape, generator=generator)
            return nn.Parameter(torch.cat([base.detach()[None], (others * 2 - 1) * bound]))

        self.w1 = stack(fc1.weight, fc1.in_features)
        self.b1 = stack(fc1.bias, fc1.in_features)
        self.w2 = stack(fc2.weight, fc2.in_features)
        self.b2 = stack(fc2.bias, fc2.in_features)

    def extra_repr(self) -> str:
        e, f, d = self.w1.shape
        return f"experts={e}, width={d}, hidden={f}, dropout={self.dropout}"

    def base(self, x: Tensor) -> Tensor:
        """The base expert alone, on x (..., D): what the dense layer computes, to the bit."""
        h = self.activation(F.linear(x, self.w1[0], self.b1[0]))
        h = F.dropout(h, self.dropout, training=self.training)
        return F.linear(h, self.w2[0], self.b2[0])

    def forward(self, x: Tensor, plan: RoutingPlan) -> Tensor:
        """sum_e weight_te FFN_e(x_t) over the plan's active pairs: x (T, D) -> (T, D).

        Nearly dense plans run in place over all pairs (inactive ones weigh 0); sparse ones gather
        rows by expert, at a cost that follows the number of active pairs.
        """
        tokens, experts = plan.active.shape
        token: Tensor | None
        token, counts = routing.sort_pairs(plan.active)
        if sum(counts) >= DENSE_FROM * tokens * experts:
            weight, token, counts = plan.weights.t().reshape(-1), None, [tokens] * experts
        else:
            weight = plan.weights.t().masked_select(plan.active.t())
        return grouped_ffn(
            x,
            self.w1,
            self.b1,
            self.w2,
            self.b2,
            weight=weight,
            token=token,
            counts=counts,
            activation=self.activation,
            dropout=self.dropout if self.training else 0.0,
        )


class Split:
    """How E experts arise from the base expert: the same decision for weights and optimizer state.

    Args:
        mode: `mask` silences a random share of each copy's hidden units by zeroing their output
            columns in `w2` (the function of a masked unit, but still trainable, where zeroing both
            sides of a ReLU unit would kill it for good); `drop` re-initialises those units from the
            mean and standard deviation of the base's own weights (Drop-Upcycling, arXiv
            2502.19261); `noise` adds noise * std(W) * N(0, 1) to every weight; `copy` copies.
        ratio: share of hidden units for `mask` and `drop`.
        noise: scale for `noise`.
        seed: makes the split the same on every worker and in every repetition.
        experts, hidden: E and F.
    """

    def __init__(
        self, mode: str, *, ratio: float, noise: float, seed: int, experts: int, hidden: int
    ) -> None:
        self.mode, self.noise, self.seed = mode, noise, seed
        self.units = torch.zeros(experts, hidden, dtype=torch.bool)
        if mode in ("mask", "drop"):
            for e in range(1, experts):
                chosen = torch.randperm(hidden, generator=self._generator(e))
                self.units[e, chosen[: round(ratio * hidden)]] = True

    def _generator(self, expert: int, salt: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 7919 * expert + 104729 * salt)

    def replaced(self, name: str, shape: torch.Size) -> Tensor:
        """Entries of parameter `name` that are not the base's, bool, broadcast to its shape."""
        units = self.units
        if name == "w2" and self.mode in ("mask", "drop"):
            return units[:, None, :].expand(shape)
        if name == "w1" and self.mode == "drop":
            return units[:, :, None].expand(shape)
        if name == "b1" and self.mode == "drop":
            return units.expand(shape)
        return torch.zeros(1, dtype=torch.bool).expand(shape)

    @torch.no_grad()
    def weights_(self, name: str, stacked: Tensor) -> None:
        """Fill a stacked parameter (E, ...) from its expert 0, in place; that one stays exact."""
        base = stacked[0].float().cpu()
        replaced = self.replaced(name, stacked.shape)
        for e in range(1, stacked.size(0)):
            new = base.clone()
            draw = torch.randn(base.shape, generator=self._generator(e, 1 + _salt(name)))
            if self.mode == "noise":
                new += self.noise * base.std() * draw
            elif self.mode == "drop":
                new = torch.where(replaced[e], base.mean() + base.std() * draw, new)
            else:
                new.masked_fill_(replaced[e], 0)
            stacked[e].copy_(new)

    @torch.no_grad()
    def moments_(self, name: str, stacked: Tensor) -> None:
        """Give every expert the base's optimizer moments (E, ...), zero where weights are new."""
        stacked[1:] = stacked[:1].clone()
        stacked.masked_fill_(self.replaced(name, stacked.shape).to(stacked.device), 0)


def _salt(name: str) -> int:
    return ("w1", "b1", "w2", "b2").index(name)
