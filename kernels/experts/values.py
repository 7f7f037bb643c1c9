"""Values that travel together through the expert kernels.

Letters: T tokens, D model width, F expert hidden width, E experts, A active (token, expert) pairs.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class ExpertWeights(NamedTuple):
    """The stacked weights of E feed-forward networks, each in `nn.Linear`'s layout.

    Attributes:
        w1: (E, F, D).
        b1: (E, F).
        w2: (E, D, F).
        b2: (E, D).
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


class Routing(NamedTuple):
    """Which experts each token visits, and with which weights.

    Attributes:
        weights: combine weights, (T, E) float, 0 where inactive.
        active: (T, E) bool.
        max_active: a bound on the number of active experts per token, if the gate's rule has one.
            It spares a GPU the wait for a count. None means that a token may use all experts.
    """

    weights: Tensor
    active: Tensor
    max_active: int | None = None


class Pairs(NamedTuple):
    """The active (token, expert) pairs in expert order.

    Attributes:
        weight: combine weight of each pair, (A,) float.
        token: token of each pair, (A,) int64, ascending within an expert. None means that every
            expert takes every token in order, so that A = T * E.
        counts: number of pairs of each expert, E ints that sum to A.
    """

    weight: Tensor
    token: Tensor | None
    counts: Sequence[int]
