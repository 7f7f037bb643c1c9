"""The reference of the expert ops: plain torch, one expert after another, gradients by autograd.

Letters: T tokens, D model width, F expert hidden width, E experts, A active (token, expert) pairs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fairseq_evomoe.kernels.experts.values import ExpertWeights, Pairs


def expert_order(active: Tensor) -> tuple[Tensor, list[int]]:
    """The tokens of the active pairs in expert order, by two plain loops.

    Args:
        active: (T, E) bool.

    Returns:
        token of every pair, (A,) int64, experts ascending and tokens ascending within an expert;
        number of pairs of each expert, E ints.
    """
    tokens, counts = [], []
    for e in range(active.size(1)):
        chosen = [t for t in range(active.size(0)) if bool(active[t, e])]
        tokens += chosen
        counts.append(len(chosen))
    return torch.tensor(tokens, dtype=torch.int64, device=active.device), counts


def grouped_ffn(
    x: Tensor,
    experts: ExpertWeights,
    pairs: Pairs,
    *,
    activation: Callable[[Tensor], Tensor],
    dropout: float = 0.0,
) -> Tensor:
    """y_t = sum over the pairs (t, e) of weight * FFN_e(x_t), (T, D); see `eager.grouped_ffn`."""
    w1, b1, w2, b2 = experts
    weight, token, counts = pairs
    y = x * 0  # x is part of the graph even when no pair is active
    start = 0
    for e, n in enumerate(counts):
        if n == 0:
            continue
        rows = (
            torch.arange(x.size(0), device=x.device) if token is None else token[start : start + n]
        )
        h = activation(x[rows] @ w1[e].t() + b1[e])
        h = torch.nn.functional.dropout(h, dropout, training=dropout > 0)
        out = h @ w2[e].t() + b2[e]
        y = y.index_add(0, rows, out * weight[start : start + n, None].to(out.dtype))
        start += n
    return y
