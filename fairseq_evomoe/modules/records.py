"""What the MoE layers of one call leave behind for the criterion.

A `RoutingLog` belongs to the call that opened it, never to a layer: layers add to the log that is
open in their thread, so that threads can share a model and forward passes can come in any order. A
record holds the layer's routing losses with their autograd graph. A criterion adds them to its own
loss, and from there they reach the gate like every other loss.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fairseq_evomoe.schedule import Stage

LOSSES = ("balance", "z", "entropy", "distill")
"""Order of the routing losses in every loss vector."""


@dataclass(frozen=True, kw_only=True)
class RoutingRecord:
    """One layer's routing of one batch. Counts cover real tokens only.

    Attributes:
        name: name of the layer; "encoder.1" is the second layer of the encoder.
        stage, temperature: those of the gate in this forward pass.
        tokens: number of real tokens, scalar float32.
        load: number of pairs of each expert, before any capacity, (E,) float32.
        entropy: sum over tokens of the clean gate's entropy in nats, scalar float32.
        dropped: number of pairs that a capacity dropped, scalar float32.
        losses: values of `LOSSES`, (4,) float32; the only differentiable field.
        first: in evaluation mode the expert with the largest weight for each real token, (T,)
            int64; None in training and before the split.
    """

    name: str
    stage: Stage
    temperature: float
    tokens: Tensor
    load: Tensor
    entropy: Tensor
    dropped: Tensor
    losses: Tensor
    first: Tensor | None = None


@dataclass
class RoutingLog:
    """The records of one call, in the order in which the layers ran."""

    records: list[RoutingRecord] = field(default_factory=list)

    def of(self, name: str) -> list[RoutingRecord]:
        """The records of one layer: none if it was dropped, several if it ran several times."""
        return [r for r in self.records if r.name == name]


_LOG: ContextVar[RoutingLog | None] = ContextVar("routing_log", default=None)


def current_log() -> RoutingLog | None:
    """The log that is open in this thread, or None if nobody wants records.

    A compiled layer records nothing: a graph cannot hold what happens beside it.
    """
    return None if torch.compiler.is_compiling() else _LOG.get()


@contextmanager
def recording(*, isolated: bool = False) -> Iterator[RoutingLog]:
    """Within, every MoE layer that runs in this thread adds a record to the log yielded.

    Logs nest: when an inner log closes, its records also join the outer one, unless it is
    `isolated`.
    """
    outer, log = _LOG.get(), RoutingLog()
    token = _LOG.set(log)
    try:
        yield log
    finally:
        _LOG.reset(token)
        if outer is not None and not isolated:
            outer.records.extend(log.records)


class _WithZeroGrads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *unused: Tensor) -> Tensor:
        ctx.save_for_backward(*unused)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return dy, *(torch.zeros_like(p) for p in ctx.saved_tensors)


def with_zero_grads(y: Tensor, *unused: Tensor) -> Tensor:
    """Return `y` unchanged, with a gradient of zero for parameters that it does not depend on.

    DDP demands a gradient for every parameter.
    """
    return _WithZeroGrads.apply(y, *unused)
