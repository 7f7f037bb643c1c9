"""The op behind every MoE layer: weighted sums of feed-forward networks over a routing.

Letters: T tokens, D model width, F expert hidden width, E experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fairseq_evomoe.kernels.experts.compiled import compiled_moe_ffn, name_of
from fairseq_evomoe.kernels.experts.serve import run_experts, to_autocast
from fairseq_evomoe.kernels.experts.values import ExpertWeights, Routing


def moe_ffn(
    x: Tensor,
    experts: ExpertWeights,
    routing: Routing,
    *,
    activation: Callable[[Tensor], Tensor],
    dropout: float = 0.0,
) -> Tensor:
    """y_t = sum over the active pairs (t, e) of weight * (W2_e drop(act(W1_e x_t + b1_e)) + b2_e).

    Args:
        x: token states, (T, D).
        experts: stacked weights.
        routing: combine weights and active pairs, (T, E).
        activation: elementwise function of a tensor.
        dropout: probability of zeroing a hidden unit; 0 outside training.

    Returns:
        (T, D), in the dtype of `x`, or of autocast if that is on. Differentiable in x, the experts'
        weights and the combine weights.
    """
    x, experts = to_autocast(x, experts)
    if not torch.compiler.is_compiling():
        return run_experts(x, experts, routing, activation=activation, dropout=dropout)
    # Both passes of the compiled op draw the same units from this seed.
    seed = torch.zeros((), dtype=torch.int64)
    if dropout > 0:
        seed = torch.randint(2**62, (), dtype=torch.int64)
    return compiled_moe_ffn(
        x,
        *experts,
        routing.weights,
        routing.active,
        seed,
        routing.max_active,
        name_of(activation),
        dropout,
    )
