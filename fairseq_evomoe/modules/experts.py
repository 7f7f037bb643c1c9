"""The experts of one layer in stacked weights.

Letters: T tokens, D model width, F expert hidden width, E experts, A active (token, expert) pairs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_evomoe.kernels.grouped_ffn import moe_ffn
from fairseq_evomoe.modules.plan import RoutingPlan
from fairseq_evomoe.parallel.exchange import exchange
from fairseq_evomoe.parallel.mesh import Share


@dataclass(frozen=True)
class Part:
    """What a stacked parameter (E, ...) of a bank means for a split.

    Attributes:
        side: "fc1" before the hidden values, "fc2" behind them; None: copies never differ in it.
        axis: of the hidden units in the stacked parameter; None: it has none.
    """

    side: str | None
    axis: int | None = None


class Bank(nn.Module):
    """E experts of one kind with stacked parameters; expert 0 is the base expert.

    Attributes:
        parts: every parameter's part in a split.
        silence: the side on which a hidden unit is best silenced.
        shared: expert 0 sees every token and is not routed: plans then have E - 1 columns, and the
            output is the mean of its own and of the routed experts'.
    """

    parts: ClassVar[Mapping[str, Part]]
    silence: ClassVar[str]
    shared: bool
    share: Share | None = None
    """Which of the experts this worker holds; None: all. Before the split its first one is the
    base expert, whichever it will be."""

    @property
    def hidden(self) -> int:
        """Number of hidden units."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        """E, or the number of experts that this worker holds."""
        return next(self.parameters()).size(0)

    @property
    def slots(self) -> list[int]:
        """Which expert each entry of the stacked parameters is."""
        return list(range(self.count)) if self.share is None else self.share.slots

    def keep(self, share: Share) -> None:
        """Give up the experts that other workers hold."""
        self.share = share
        for p in self.parameters():
            p.data = share.local(p.data, split=True)
            p.expert = share  # type: ignore[attr-defined]

    def one(self, expert: int, x: Tensor) -> Tensor:
        """One expert alone, on x (..., D)."""
        raise NotImplementedError

    def base(self, x: Tensor) -> Tensor:
        """The base expert alone, on x (..., D): what the layer without experts computes."""
        return self.one(0, x)

    def compute(
        self, x: Tensor, active: Tensor, weights: Tensor, at_most: int | None = None
    ) -> Tensor:
        """sum_e weight_te FFN_e(x_t) over active pairs, of the experts that this worker holds.

        Args:
            x: (T, D). active, weights: (T, count) bool and float.
            at_most: active experts of a token, where that number has a limit.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, plan: RoutingPlan) -> Tensor:
        """sum_e weight_te FFN_e(x_t) over the plan's active pairs: x (T, D) -> (T, D)."""
        active, weights, at_most = plan.active, plan.weights, plan.at_most
        if self.share is not None:
            return self._forward_shared_out(x, active, weights, self.share)
        if self.shared:
            active, weights = self._beside_shared(active, weights * 0.5, 0.5)
            at_most = None if at_most is None else at_most + 1
        return self.compute(x, active, weights, at_most)

    @staticmethod
    def _beside_shared(active: Tensor, weights: Tensor, shared: float) -> tuple[Tensor, Tensor]:
        """The same with a first column for the shared expert, of one weight for all tokens."""
        column = torch.full_like(weights[:, :1], shared)
        on = torch.full_like(active[:, :1], shared > 0)
        return torch.cat([on, active], 1), torch.cat([column, weights], 1)

    def _forward_shared_out(
        self, x: Tensor, active: Tensor, weights: Tensor, share: Share
    ) -> Tensor:
        if not self.shared:
            return exchange(x, weights, active, share, self.compute)

        def compute(rows: Tensor, active: Tensor, weights: Tensor) -> Tensor:
            return self.compute(rows, *self._beside_shared(active, weights, 0.0))

        # every worker computes the shared expert for its own tokens
        return self.one(0, x) * 0.5 + exchange(x, weights * 0.5, active, share, compute)


class ExpertBank(Bank):
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
        shared: as for `Bank`.
    """

    parts = {
        "w1": Part("fc1", 1),
        "b1": Part("fc1", 1),
        "w2": Part("fc2", 2),
        "b2": Part("fc2"),
    }
    # a unit silenced behind the hidden layer goes on learning; a ReLU unit silenced before, never
    silence = "fc2"

    def __init__(
        self,
        fc1: nn.Linear,
        fc2: nn.Linear,
        *,
        num_experts: int,
        activation: Callable[[Tensor], Tensor],
        dropout: float,
        generator: torch.Generator,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.shared = shared
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

    @torch.no_grad()
    def reset_normal_(self, std: float, generator: torch.Generator) -> dict[str, Tensor]:
        """BERT's initial weights: N(0, std), biases 0. Expert 0 draws from the global stream, w1
        before w2, as the dense layer does; the others from `generator`.

        Returns:
            the base expert's parameters, which this worker need not hold.
        """
        base = {}
        slots = self.slots
        total = len(slots) if self.share is None else self.share.total
        for name, stacked in self.named_parameters():
            for e in range(total if stacked.dim() > 2 else 0):
                if e == 0:
                    new = base[name] = torch.empty_like(stacked[0]).normal_(0, std)
                else:
                    new = torch.randn(stacked[0].shape, generator=generator) * std
                if e in slots:
                    stacked[slots.index(e)].copy_(new)
            if stacked.dim() == 2:
                stacked.zero_()
                base[name] = torch.zeros_like(stacked[0])
        return base

    def extra_repr(self) -> str:
        e, f, d = self.w1.shape
        return f"experts={e}, width={d}, hidden={f}, dropout={self.dropout}"

    @property
    def hidden(self) -> int:
        """F."""
        return self.b1.size(1)

    def one(self, expert: int, x: Tensor) -> Tensor:
        """One expert alone, on x (..., D); expert 0 is the dense layer, to the bit."""
        h = self.activation(F.linear(x, self.w1[expert], self.b1[expert]))
        h = F.dropout(h, self.dropout, training=self.training)
        return F.linear(h, self.w2[expert], self.b2[expert])

    def compute(
        self, x: Tensor, active: Tensor, weights: Tensor, at_most: int | None = None
    ) -> Tensor:
        return moe_ffn(
            x,
            self.w1,
            self.b1,
            self.w2,
            self.b2,
            weights=weights,
            active=active,
            at_most=at_most,
            activation=self.activation,
            dropout=self.dropout if self.training else 0.0,
        )
