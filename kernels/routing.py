"""(token, expert) pairs -> expert-sorted order.

Letters: T tokens, E experts, A active pairs.
"""

from torch import Tensor


def sort_pairs(active: Tensor) -> tuple[Tensor, list[int]]:
    """Expert-sorted order of the active pairs.

    `active.t().nonzero()` walks expert-major with tokens ascending, which *is* the sorted order:
    no sort, any number of experts per token, deterministic.

    Args:
        active: (T, E) bool.

    Returns:
        token index of every pair, (A,) int64; number of pairs of each expert, E ints.
    """
    token = active.t().nonzero()[:, 1].contiguous()
    return token, active.sum(0).tolist()
