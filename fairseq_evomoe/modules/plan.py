"""The routing plan: which tokens go to which experts with what weights.

Letters: T tokens, E experts.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fairseq_evomoe.kernels.experts.values import Routing
from fairseq_evomoe.kernels.gate.sums import RoutingSums, routing_sums
from fairseq_evomoe.schedule import Stage


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What a gate needs to know about training time.

    Attributes:
        stage, temperature: the values that the schedule gives.
        anneal_left: fraction of the temperature's fall that is still to come, 1 at the split and 0
            from the end of the annealing on.
    """

    stage: Stage
    temperature: float
    anneal_left: float = 0.0


class TokenBatch:
    """The tokens behind a batch of states (L, B, D): which are real, their ids, their sentences.

    `real`, `token` and `sentence` are computed on first use, once for all layers. Most gates use
    only `real`, whose computation makes a GPU wait for the host.

    Args:
        ids: token ids, (B, L) int64.
        pad: id of padding.
    """

    def __init__(self, ids: Tensor, pad: int) -> None:
        self.ids, self.pad = ids, pad

    @cached_property
    def real(self) -> Tensor | None:
        """Rows of the flattened (L, B) states that are not padding, (T,) int64; None if all are."""
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
        """Position of each real token in its sentence, from 1, without padding, (T,) int64."""
        return self._real(self.ids.ne(self.pad).cumsum(1).t())


@dataclass(frozen=True, kw_only=True)
class RoutingPlan:
    """A gate's decision over T real tokens. It is made once and recomputed nowhere.

    Attributes:
        weights: combine weights, (T, E) float32, 0 where inactive; differentiable.
        active: the pairs to compute, (T, E) bool.
        probs: clean gate probabilities (no noise, temperature 1), (T, E) float32; rows sum to 1.
        logits: gate logits, (T, E) float32.
        before_capacity: the chosen pairs before a capacity dropped some, (T, E) bool, or None if
            no capacity applies.
        distill_loss: distillation loss of StableMoE's word router, scalar, or None for every other
            gate.
        max_active: largest number of active experts per token, or None if there is no limit. With
            it a GPU need not wait for a count.
        gate_sums: the sums over the tokens, if the gate's own pass computed them; if None, `sums`
            makes another pass.
    """

    weights: Tensor
    active: Tensor
    probs: Tensor
    logits: Tensor
    before_capacity: Tensor | None = None
    distill_loss: Tensor | None = None
    max_active: int | None = None
    gate_sums: RoutingSums | None = None

    @property
    def routing(self) -> Routing:
        """The part of the plan that the experts need."""
        return Routing(self.weights, self.active, self.max_active)

    @property
    def chosen(self) -> Tensor:
        """The pairs that the gate chose, whether a capacity dropped them or not, (T, E) bool."""
        return self.active if self.before_capacity is None else self.before_capacity

    @cached_property
    def sums(self) -> RoutingSums:
        """Sums over the tokens that losses and metrics need."""
        return self.gate_sums or routing_sums(self.logits, self.probs, self.chosen)

    @cached_property
    def means(self) -> RoutingSums:
        """The sums divided by the number of tokens, except the load, which stays a count."""
        return self.sums.means(len(self.probs))


def real_rows(x: Tensor, tokens: TokenBatch | None) -> tuple[Tensor, Tensor | None]:
    """The states of real tokens: x (L, B, D) -> (T, D), and their rows (T,) or None for all rows.

    Raises:
        ValueError: `tokens` belongs to a batch of another size.
    """
    flat = x.reshape(-1, x.size(-1))
    if tokens is None:
        return flat, None
    if tokens.ids.numel() != len(flat):
        raise ValueError(
            f"states of {len(flat)} positions came with token ids of shape "
            f"{tuple(tokens.ids.shape)}: hand the layer the tokens of the same batch, or none"
        )
    rows = tokens.real
    return (flat if rows is None else flat.index_select(0, rows)), rows


def put_back(y: Tensor, x: Tensor, rows: Tensor | None) -> Tensor:
    """The inverse of `real_rows`: y (T, D) -> the shape of x (L, B, D), with 0 at padding."""
    if rows is not None:
        y = torch.zeros_like(x).view(-1, x.size(-1)).index_copy(0, rows, y)
    return y.view_as(x)
