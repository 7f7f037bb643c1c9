"""What a layer leaves behind for the criterion, and how routing losses reach the gate.

A criterion cannot simply add the layers' losses to its own: under `--checkpoint-activations` they
are computed without a graph, and again, with one, only during the backward pass. So a loss enters
the graph where it arises: `attach` ties it to the layer's output, and its gradient is fetched from
a `LossPort`, a leaf that the criterion's loss runs through and that backward reaches first. Loss
scaling, gradient accumulation and dummy batches act on it as on everything else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fairseq_evomoe.schedule import Stage

LOSSES = ("balance", "z", "entropy", "distill")
"""Order of the routing losses in every loss vector."""


@dataclass(frozen=True)
class RoutingRecord:
    """One layer's routing of one batch; counts cover real tokens only, nothing is differentiable.

    Attributes:
        name: the layer, "encoder.1" for the second layer of the encoder.
        stage, temperature: of the gate in this forward pass.
        tokens: number of real tokens, scalar float32.
        load: pairs of each expert, before any capacity, (E,) float32.
        entropy: sum over tokens of the clean gate's entropy in nats, scalar float32.
        dropped: how many of them a capacity turned away, scalar float32.
        losses: values of `LOSSES`, (4,) float32.
    """

    name: str
    stage: Stage
    temperature: float
    tokens: Tensor
    load: Tensor
    entropy: Tensor
    dropped: Tensor
    losses: Tensor


class LossPort:
    """Where a layer's routing losses meet the criterion's loss."""

    def __init__(self) -> None:
        self.leaf: Tensor | None = None

    def open(self, losses: Tensor) -> Tensor:
        """The layer's loss vector, (4,), as a leaf to build the criterion's loss on."""
        self.leaf = losses.detach().clone().requires_grad_()
        return self.leaf


class RecordingLayer(nn.Module):
    """A layer that can be asked for a record of its last forward pass; see `recording`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.record: RoutingRecord | None = None
        self.recording = False
        self.port = LossPort()


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, losses, port):
        ctx.port = port
        ctx.like = losses
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        leaf = ctx.port.leaf
        if leaf is None or leaf.grad is None:
            return dy, torch.zeros_like(ctx.like), None
        return dy, leaf.grad.to(ctx.like), None


def attach(y: Tensor, losses: Tensor, port: LossPort) -> Tensor:
    """`y` unchanged; its backward also sends the criterion's gradient into `losses`, (4,)."""
    return _Attach.apply(y, losses, port)


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, *unused):
        ctx.save_for_backward(*unused)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        return dy, *(torch.zeros_like(p) for p in ctx.saved_tensors)


def touch(y: Tensor, *unused: Tensor) -> Tensor:
    """`y` unchanged; parameters that played no part get a zero gradient, as DDP demands."""
    return _Touch.apply(y, *unused)


@contextmanager
def recording(model: nn.Module) -> Iterator[list[RecordingLayer]]:
    """Within, every MoE layer of `model` keeps the record of its last forward pass.

    Yields the layers; each has `.record` and `.port`. Records are dropped on the way out.
    """
    layers = [m for m in model.modules() if isinstance(m, RecordingLayer)]
    for layer in layers:
        layer.record, layer.recording = None, True
    try:
        yield layers
    finally:
        for layer in layers:
            layer.record, layer.recording = None, False
