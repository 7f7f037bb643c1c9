"""The package's kernels in exported models: experts by groups or in a few rows, native look-ups."""

from collections.abc import Callable

from torch import Tensor

from fairseq_evomoe.hf.look_up_evomoe import OPERATIONS
from fairseq_evomoe.hf.routing_evomoe import Routing
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
) -> Tensor:
    """See `feed_forward_evomoe.run_experts`."""
    plan = KernelRouting(routing.weights, routing.active, routing.max_active)
    return moe_ffn(x, ExpertWeights(*weights), plan, activation=activation, dropout=dropout)


def install() -> None:
    """Let every exported model of this process use the package's kernels."""
    OPERATIONS.update(experts=_experts, look_up=lookup)
