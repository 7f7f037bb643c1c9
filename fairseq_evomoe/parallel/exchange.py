"""All-to-all dispatch of tokens to the workers that hold their experts, and combine.

Letters: T tokens of this worker, D model width, E routed experts, S workers, L = E / S experts per
worker, R rows that a worker receives.

A token is sent once to each worker that holds at least one of its active experts, together with its
weights for that worker's experts. Each of these workers sends one row back, the weighted sum over
its experts. This is the minimum traffic if experts do not move: 2 D values per token and worker in
forward, and as many in backward.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fairseq_evomoe.kernels.experts.values import Routing
from fairseq_evomoe.parallel.mesh import Shard

RunExperts = Callable[[Tensor, Routing], Tensor]


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
    """Return the numbers of rows sent to and received from each worker; `to` is (T, S) bool."""
    send = to.sum(0)
    receive = torch.empty_like(send)
    dist.all_to_all_single(receive, send, group=group)
    both = torch.stack([send, receive]).tolist()
    return both[0], both[1]


def exchange(x: Tensor, routing: Routing, shard: Shard, run: RunExperts) -> Tensor:
    """y_t = sum of what `run` returns for the active pairs (t, e) on the worker that holds e.

    Every worker of the group must call it, even if it has no tokens. In backward all workers run
    these exchanges in the opposite order.

    Args:
        x: (T, D).
        routing: over the routed experts, (T, E); weights are not negative.
        run: maps rows (R, D) and their routing (R, L) over the local experts to (R, D). The worker
            that receives the rows calls it.

    Returns:
        (T, D), dtype of `x`.
    """
    mesh, (weights, active, bound) = shard.mesh, routing
    experts = active.view(len(active), mesh.size, shard.per_worker)
    to = experts.any(-1)
    send, receive = _counts(to, mesh.group)
    worker, token = to.t().nonzero(as_tuple=True)
    # an inactive expert is sent as weight -1, which saves a second message for the mask
    marked = weights.masked_fill(~active, -1).view(experts.shape)[token, worker]

    rows = _AllToAll.apply(x.index_select(0, token), send, receive, mesh.group)
    marked = _AllToAll.apply(marked, send, receive, mesh.group)
    there = ~(marked < 0)
    bound = None if bound is None else min(bound, shard.per_worker)
    out = run(rows, Routing(marked.masked_fill(~there, 0), there, bound))
    back = _AllToAll.apply(out, receive, send, mesh.group)

    y = torch.zeros_like(x)
    # each worker returns at most one row per token, so every sum runs in the order of workers
    for at, part in zip(token.split(send), back.split(send), strict=True):
        y.index_add_(0, at, part.to(y.dtype))
    return y
