"""The routing plan: who goes where with what weight. Letters: T tokens, E experts."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fairseq_evomoe.kernels.routing_sums import RoutingSums, routing_sums
from fairseq_evomoe.schedule import Stage


@dataclass(frozen=True)
class Clock:
    """What a gate needs to know of time.

    Attributes:
        stage, temperature: as the schedule has them.
        warmth: how much of the annealing is still to come: 1 at its start, 0 from its end on.
    """

    stage: Stage
    temperature: float
    warmth: float = 0.0


class TokenBatch:
    """The tokens behind a batch of states (L, B, D): which are real, what and whose they are.

    Everything is computed when first asked for, once for all layers: most gates ask for nothing
    beyond `real`, which makes a GPU wait for the host.

    Args:
        ids: token ids, (B, L) int64.
        pad: id of padding.
    """

    def __init__(self, ids: Tensor, pad: int) -> None:
        self.ids, self.pad = ids, pad

    @cached_property
    def real(self) -> Tensor | None:
        """Rows of the flattened (L, B) states that are not padding, (T,) int64; None: all."""
        keep = self.ids.t().reshape(-1).ne(self.pad)
        rows = keep.nonzero().squeeze(1)
        return None if rows.numel() == keep.numel() else rows

    def _real(self, values: Tensor) -> Tensor:
        flat = values.reshape(-1)
        return flat if self.real is None else flat.index_select(0, self.real)

    @cached_property
    def token(self) -> Tensor:
        """Ids of the real tokens, (T,) int64."""
        return self._real(self.ids.t())

    @cached_property
    def sentence(self) -> Tensor:
        """Row of the batch that each real token belongs to, (T,) int64."""
        rows = torch.arange(self.ids.size(0), device=self.ids.device)
        return self._real(rows.expand(self.ids.size(1), -1))

    @property
    def place(self) -> Tensor:
        """Place of each real token in its row, from 1, padding not counted, (T,) int64."""
        return self._real(self.ids.ne(self.pad).cumsum(1).t())


@dataclass(frozen=True)
class RoutingPlan:
    """A gate's decision over T real tokens; made once, recomputed nowhere.

    Attributes:
        weights: combine weights, (T, E) float32, 0 where inactive; differentiable.
        active: the pairs to compute, (T, E) bool.
        probs: clean gate probabilities (no noise, temperature 1), (T, E) float32; rows sum to 1.
        logits: gate logits, (T, E) float32.
        asked: the pairs before a capacity turned some away, (T, E) bool; None: none was.
        distill: loss of a router in training beside the gate (StableMoE), scalar; None: no such.
        at_most: active experts of a token, where the rule limits their number; it spares a GPU the
            wait for a count. None: it may be all.
        summed: the sums, where the gate's own pass gave them; None: `sums` makes another.
    """

    weights: Tensor
    active: Tensor
    probs: Tensor
    logits: Tensor
    asked: Tensor | None = None
    distill: Tensor | None = None
    at_most: int | None = None
    summed: RoutingSums | None = None

    @cached_property
    def sums(self) -> RoutingSums:
        """What losses and metrics need of it."""
        return self.summed or routing_sums(self.logits, self.probs, self.wanted)

    @cached_property
    def means(self) -> RoutingSums:
        """The same over the number of tokens."""
        return self.sums.over(len(self.probs))

    @property
    def wanted(self) -> Tensor:
        """The gate's choice, whether a capacity allowed it or not, (T, E) bool."""
        return self.active if self.asked is None else self.asked
