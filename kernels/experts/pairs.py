"""Active (token, expert) pairs in expert order.

Letters: T tokens, E experts, A active pairs.
"""

from torch import Tensor

from fairseq_evomoe.kernels.experts.values import Pairs, Routing

DENSE_FROM = 0.97
"""Density A / (T E) from which computing all pairs in place is faster than gathering rows by
expert (measured on a CPU)."""


def expert_order(active: Tensor) -> tuple[Tensor, list[int]]:
    """The tokens of the active pairs, expert after expert.

    `active.t().nonzero()` walks through the experts with tokens ascending, which is the sorted
    order: no sort is needed, any number of experts per token is the same case, and the result is
    deterministic.

    Args:
        active: (T, E) bool.

    Returns:
        token of every pair, (A,) int64; number of pairs of each expert, E ints.
    """
    token = active.t().nonzero()[:, 1].contiguous()
    return token, active.sum(0).tolist()


def all_pairs(routing: Routing) -> Pairs:
    """Every token with every expert, in place; inactive pairs have weight 0."""
    tokens, experts = routing.active.shape
    return Pairs(routing.weights.t().reshape(-1), None, [tokens] * experts)


def sparse_pairs(routing: Routing) -> Pairs:
    """The active pairs, or all pairs if nearly all are active."""
    token, counts = expert_order(routing.active)
    if sum(counts) >= DENSE_FROM * routing.active.numel():
        return all_pairs(routing)
    weight = routing.weights.t().masked_select(routing.active.t())
    return Pairs(weight, token, counts)
