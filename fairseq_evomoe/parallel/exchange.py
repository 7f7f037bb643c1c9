"""Tokens to the workers that hold their experts, and back.

Letters: T tokens of this worker, D model width, E routed experts, S workers, L = E / S experts a
worker, R rows that a worker receives.

A token goes once to each worker that holds one of its active experts, with its weights there, and
one row comes back from each: the sum over that worker's experts. That is the least that can travel
when experts do not move: 2 D values a token and worker, forward, and as many backward.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fairseq_evomoe.parallel.mesh import Share

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        ctx.splits, ctx.group = (receive, send), group
        y = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(y, x.contiguous(), receive, send, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(dy, *ctx.splits, ctx.group), None, None, None


def _counts(to: Tensor, group: Any) -> tuple[list[int], list[int]]:
    """Rows that go to each worker and come from each; to: (T, S) bool."""
    send = to.sum(0)
    receive = torch.empty_like(send)
    dist.all_to_all_single(receive, send, group=group)
    both = torch.stack([send, receive]).tolist()
    return both[0], both[1]


def exchange(x: Tensor, weights: Tensor, active: Tensor, share: Share, compute: Compute) -> Tensor:
    """y_t = sum over the active pairs (t, e) of what the worker of e computes.

    Every worker of the group must call it, with any number of tokens, none included; in backward
    all meet again in the opposite order.

    Args:
        x: (T, D).
        weights, active: of the routed experts, (T, E) float and bool; weights are not negative.
        compute: (rows (R, D), active (R, L) bool, weights (R, L)) -> (R, D), at the receiver.

    Returns:
        (T, D), dtype of `x`.
    """
    mesh = share.mesh
    experts = active.view(len(active), mesh.size, share.per_worker)
    to = experts.any(-1)
    send, receive = _counts(to, mesh.group)
    worker, token = to.t().nonzero(as_tuple=True)
    # an inactive expert travels as weight -1: no second message for the mask
    marked = weights.masked_fill(~active, -1).view(experts.shape)[token, worker]

    rows = _AllToAll.apply(x.index_select(0, token), send, receive, mesh.group)
    marked = _AllToAll.apply(marked, send, receive, mesh.group)
    there = ~(marked < 0)
    out = compute(rows, there, marked.masked_fill(~there, 0))
    back = _AllToAll.apply(out, receive, send, mesh.group)

    y = torch.zeros_like(x)
    # one worker's rows are of different tokens, so every sum is made in the order of workers
    for at, part in zip(token.split(send), back.split(send), strict=True):
        y.index_add_(0, at, part.to(y.dtype))
    return y
