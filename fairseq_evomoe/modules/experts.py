"""The experts of one layer, with stacked weights.

Letters: T tokens, D model width, F expert hidden width, E experts, A active (token, expert) pairs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_evomoe.kernels.experts import few_rows
from fairseq_evomoe.kernels.experts.moe_ffn import moe_ffn
from fairseq_evomoe.kernels.experts.values import ExpertWeights, Routing
from fairseq_evomoe.kernels.lookup.score import quantise
from fairseq_evomoe.modules.stored import StoredWeights
from fairseq_evomoe.parallel.exchange import exchange
from fairseq_evomoe.parallel.mesh import Shard


@dataclass(frozen=True)
class Part:
    """The role that a stacked parameter (E, ...) of a bank has in a split.

    Attributes:
        side: "fc1" before the hidden values, "fc2" behind them, or None if the split never changes
            this parameter.
        axis: axis of the hidden units in the stacked parameter, or None if it has none.
    """

    side: str | None
    axis: int | None = None


class Bank(StoredWeights):
    """E experts of one kind with stacked parameters. Expert 0 is the base expert.

    Attributes:
        parts: role of every parameter in a split.
        mask_side: side whose weights a split sets to zero to mask a hidden unit.
        shared: whether expert 0 sees every token and is not routed. Routings then have E - 1
            columns, and the output is the mean of its output and that of the routed experts.
        shard: the experts that this worker holds, or None if it holds all of them. Before the
            split, the first entry of its parameters is the base expert, whichever expert it
            becomes later.
    """

    parts: ClassVar[Mapping[str, Part]]
    mask_side: ClassVar[str]
    shared: bool
    shard: Shard | None = None

    def __init__(self) -> None:
        super().__init__()
        # what the first entry holds until the split, on a worker that lacks expert 0
        self._base: dict[str, Tensor] = {}

    @property
    def hidden(self) -> int:
        """Number of hidden units."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        """Number of experts that this worker holds: E, unless they are distributed."""
        return next(self.parameters()).size(0)

    @property
    def stacked(self) -> dict[str, Tensor]:
        """All tensors with an entry per expert: parameters, and buffers that are made of them."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def matrices(self) -> list[Tensor]:
        """The weights without biases, each (E, ...) in float32."""
        return [p.detach().float() for p in self.parameters() if p.dim() > 2]

    @property
    def expert_ids(self) -> list[int]:
        """Number of the expert that each entry of the stacked parameters holds."""
        return list(range(self.count)) if self.shard is None else self.shard.expert_ids

    def distribute(self, shard: Shard) -> None:
        """Keep only the experts of this worker's shard and drop the rest."""
        self.shard = shard
        self._base = {n: p.detach()[0].clone() for n, p in self.named_parameters()}
        for p in self.parameters():
            p.data = shard.local(p.data, has_split=True)
            p.expert = shard  # type: ignore[attr-defined]

    def start(self, *, from_base: bool) -> None:
        """Begin training: with the base expert alone, or with all experts."""
        if from_base:
            for name, base in self._base.items():
                self.get_parameter(name).data[0] = base
        self._base = {}

    def set_split(self, has_split: bool) -> None:
        """Say whether the base expert has split."""
        if self.shard is not None:
            self.shard.has_split = has_split

    def run_expert(self, expert: int, x: Tensor) -> Tensor:
        """Run one expert alone on x (..., D)."""
        raise NotImplementedError

    def run_base(self, x: Tensor) -> Tensor:
        """Run the base expert alone on x (..., D), as the layer without experts would."""
        return self.run_expert(0, x)

    def run_local(self, x: Tensor, routing: Routing) -> Tensor:
        """Return sum_e weight_te FFN_e(x_t) over the active pairs of this worker's experts.

        Args:
            x: (T, D).
            routing: over the experts that this worker holds, (T, count).
        """
        raise NotImplementedError

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return sum_e weight_te FFN_e(x_t) over the active pairs: x (T, D) -> (T, D)."""
        if self.shard is None:
            return self.run_local(x, with_shared(routing, 0.5) if self.shared else routing)
        if not self.shared:
            return exchange(x, routing, self.shard, self.run_local)

        def run(rows: Tensor, received: Routing) -> Tensor:
            return self.run_local(rows, _with_column(received, 0.0))

        # every worker runs the shared expert on its own tokens
        halved = routing._replace(weights=routing.weights * 0.5)
        return self.run_expert(0, x) * 0.5 + exchange(x, halved, self.shard, run)

    def reset_normal_(self, std: float, generator: torch.Generator) -> None:
        """Draw BERT's initial weights; look-ups keep theirs."""


def with_shared(routing: Routing, weight: float) -> Routing:
    """A routing over E - 1 experts beside a shared expert that every token visits.

    The shared expert becomes the first column and has this weight; the others have the rest.
    """
    routed = routing._replace(weights=routing.weights * (1 - weight))
    return _with_column(routed, weight)


def _with_column(routing: Routing, weight: float) -> Routing:
    """Prepend a column of one weight for all tokens; it is active only if the weight is above 0."""
    column = torch.full_like(routing.weights[:, :1], weight)
    on = torch.full_like(routing.active[:, :1], weight > 0)
    bound = routing.max_active
    return Routing(
        torch.cat([column, routing.weights], 1),
        torch.cat([on, routing.active], 1),
        None if bound is None else bound + 1,
    )


class ExpertBank(Bank):
    """E feed-forward networks whose weights are stacked in `nn.Linear`'s layout.

    The parameters are `w1` (E, F, D), `b1` (E, F), `w2` (E, D, F) and `b2` (E, D); `to_int8` stores
    the matrices in a smaller form. Expert 0 is the base expert. It takes over the two linear layers
    that a dense model would have here, so a dense model and the diversify stage agree bitwise.

    Args:
        fc1, fc2: the dense layer's linear maps D -> F -> D.
        num_experts: E.
        activation: elementwise function between them.
        dropout: dropout probability of hidden units during training.
        generator: random generator that draws experts 1 to E-1 from `nn.Linear`'s distribution.
        shared: see `Bank`.
    """

    parts = {
        "w1": Part("fc1", 1),
        "b1": Part("fc1", 1),
        "w2": Part("fc2", 2),
        "b2": Part("fc2"),
    }
    large = ("w1", "w2")
    scales = ("scale1", "scale2")
    w1: Tensor
    w2: Tensor
    scale1: Tensor
    scale2: Tensor
    # a unit whose fc2 weights are zeroed goes on learning; a ReLU unit with zeroed fc1 never does
    mask_side = "fc2"

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
        self.use_large_pages()

    @torch.no_grad()
    def reset_normal_(self, std: float, generator: torch.Generator) -> None:
        """Draw BERT's initial weights: N(0, std), and biases of 0.

        Expert 0 draws from the global random stream, w1 before w2, as the dense layer does; the
        other experts draw from `generator`.
        """
        base = {}
        ids = self.expert_ids
        total = len(ids) if self.shard is None else self.shard.total
        for name, stacked in self.named_parameters():
            for e in range(total if stacked.dim() > 2 else 0):
                if e == 0:
                    new = base[name] = torch.empty_like(stacked[0]).normal_(0, std)
                else:
                    new = torch.randn(stacked[0].shape, generator=generator) * std
                if e in ids:
                    stacked[ids.index(e)].copy_(new)
            if stacked.dim() == 2:
                stacked.zero_()
                base[name] = torch.zeros_like(stacked[0])
        self._base = base if self._base else {}

    def extra_repr(self) -> str:
        e, f, d = self.w1.shape
        return f"experts={e}, width={d}, hidden={f}, dropout={self.dropout}"

    @property
    def hidden(self) -> int:
        """F."""
        return self.b1.size(1)

    def to_int8(self) -> None:
        """Store both matrices as int8 with a scale per row, for inference.

        `w1` and `w2` become buffers, and `scale1` (E, F) and `scale2` (E, D) float32 join them.
        """
        for number in (1, 2):
            small, scale = quantise(getattr(self, f"w{number}").detach())
            del self._parameters[f"w{number}"]
            self.register_buffer(f"w{number}", small)
            self.register_buffer(f"scale{number}", scale)
        self.use_large_pages()

    @property
    def is_int8(self) -> bool:
        """Whether `to_int8` was called."""
        return self.w1.dtype == torch.int8

    def matrices(self) -> list[Tensor]:
        """See `Bank.matrices`."""
        return [self._matrix(n, slice(None), torch.float32).detach().float() for n in (1, 2)]

    def _matrix(self, number: int, expert: int | slice, dtype: torch.dtype) -> Tensor:
        """w1 or w2 of one expert or of several."""
        stored = getattr(self, f"w{number}")[expert]
        if not self.is_int8:
            return stored
        return (stored * getattr(self, f"scale{number}")[expert][..., None]).to(dtype)

    def run_expert(self, expert: int, x: Tensor) -> Tensor:
        """Run one expert alone on x (..., D). Expert 0 agrees with the dense layer bitwise."""
        self._refuse_training()
        h = self.activation(F.linear(x, self._matrix(1, expert, x.dtype), self.b1[expert]))
        h = F.dropout(h, self.dropout, training=self.training)
        return F.linear(h, self._matrix(2, expert, x.dtype), self.b2[expert])

    def run_local(self, x: Tensor, routing: Routing) -> Tensor:
        """See `Bank.run_local`."""
        self._refuse_training()
        weights = ExpertWeights(self.w1, self.b1, self.w2, self.b2)
        if self.is_int8:
            if not few_rows.unsupported_int8(x, routing):
                scales = (self.scale1, self.scale2)
                return few_rows.ffn(x, weights, routing, activation=self.activation, scales=scales)
            every = slice(None)
            w1, w2 = (self._matrix(number, every, x.dtype) for number in (1, 2))
            weights = weights._replace(w1=w1, w2=w2)
        return moe_ffn(
            x,
            weights,
            routing,
            activation=self.activation,
            dropout=self.dropout if self.training else 0.0,
        )

    def _refuse_training(self) -> None:
        if self.training and self.is_int8:
            raise ValueError(
                "--moe-expert-storage int8 is for inference; train the checkpoint that "
                "evomoe-export made it from"
            )
