"""The package's kernels in exported models: experts by groups or in a few rows, native look-ups."""

from collections.abc import Callable

import torch
from torch import Tensor

from fairseq_evomoe.hf.feed_forward_evomoe import widened
from fairseq_evomoe.hf.look_up_evomoe import OPERATIONS
from fairseq_evomoe.hf.routing_evomoe import Routing
from fairseq_evomoe.kernels.experts import few_rows
from fairseq_evomoe.kernels.experts.moe_ffn import moe_ffn
from fairseq_evomoe.kernels.experts.values import ExpertWeights
from fairseq_evomoe.kernels.experts.values import Routing as KernelRouting
from fairseq_evomoe.kernels.lookup.lookup import lookup


def _experts(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    routing: Routing,
    *,
    activation: Callable[[Tensor], Tensor],
    dropout: float = 0.0,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """See `feed_forward_evomoe.run_experts`."""
    plan = KernelRouting(routing.weights, routing.active, routing.max_active)
    given = ExpertWeights(*weights)
    if scales is not None:
        # the op has no gradients, and biases can be trained beside int8 matrices
        if not (torch.is_grad_enabled() or few_rows.unsupported_int8(x, plan)):
            return few_rows.ffn(x, given, plan, activation=activation, scales=scales)
        first, second = scales
        every = slice(None)
        given = given._replace(
            w1=widened(given.w1, first, every, x.dtype),
            w2=widened(given.w2, second, every, x.dtype),
        )
    return moe_ffn(x, given, plan, activation=activation, dropout=dropout)


def install() -> None:
    """Let every exported model of this process use the package's kernels."""
    OPERATIONS.update(experts=_experts, look_up=lookup)
